"""The shared state of the core: settings, time, the effects of the current input, what exists, and what is to be done.

The parts of the core (see `core`) call only the parts below them. What a part causes above it is an entry in one of the
sets here (`to_advance`, `to_replay`), which the Coalescer passes to the part concerned at the end of each input.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from coalesce.effects import CloseUpstream, Effect, EndSession, OpenUpstream, Send
from coalesce.history import History, HistoryBudget
from coalesce.inputs import UpstreamLost
from coalesce.limits import CoreLimits
from coalesce.listing import GroupLists
from coalesce.model import (
    Backfill,
    FragmentRun,
    Group,
    NotifiedWatches,
    PendingCreate,
    Session,
    Source,
    Trunk,
    Upstream,
    Watch,
)
from coalesce.ranges import CoverBranch, CoverTable, TrunkName
from coalesce.stats import Stats
from coalesce.timers import Timers
from proto.framing import frame
from proto.scan import Header, encode_created, encode_response


@dataclass(slots=True)
class SourceEnd:
    """Why the watches of a source end, and how many are still to be examined."""

    # Its upstream watch is lost, or compacted at this revision.
    reason: UpstreamLost | int
    left: int
    # The creates that waited for it when it was lost; later ones get another trunk.
    creates: list[PendingCreate]


@dataclass(slots=True, eq=False, repr=False)
class CoreState:
    """The shared state of one Coalescer."""

    limits: CoreLimits
    # etcd orders manual progress with events, and answers it for quiet watches (3.4.31, 3.5.13 and later).
    ordered_progress: bool
    stats: Stats = field(default_factory=Stats)
    ledger: HistoryBudget = field(init=False)
    # Seconds, monotonic: the latest time passed in.
    now: float = 0.0
    # Effects of the current input.
    effects: list[Effect] = field(default_factory=list)
    # The newest header of any answer; None = none yet.
    header: Header | None = None
    # When an answer with the store's revision was last received; events do not count.
    header_at: float = float("-inf")
    # The highest revision at which a compaction ended an upstream watch; it applies to every range.
    compact_revision: int = 0
    # Progress requests made so far (see progress_requests).
    progress_serial: int = 0
    lists: GroupLists = field(default_factory=GroupLists)
    sessions: dict[Session, None] = field(default_factory=dict)
    # Sessions that are to end UNAVAILABLE, with this text: without a leader, or at a limit.
    to_end: dict[Session, str] = field(default_factory=dict)
    # Ended sessions whose watches are not all removed yet.
    leaving: dict[Session, None] = field(default_factory=dict)
    # Trunks by name, covers included.
    trunks: dict[TrunkName, Trunk] = field(default_factory=dict)
    # Trunks without an upstream watch, whose histories are kept; ordered by when they were parked, oldest first.
    parked: dict[TrunkName, Trunk] = field(default_factory=dict)
    # The prefixes of the covers.
    covers: CoverTable = field(init=False)
    # Trunks whose watches are to move to a cover, and covers whose watches are to leave it, see `moving`.
    to_move: dict[Trunk, None] = field(default_factory=dict)
    # All backfills, upgrades included.
    backfills: dict[Backfill, None] = field(default_factory=dict)
    # Sources whose upstream watch has ended, and whose watches end or get another source.
    ending: dict[Source, SourceEnd] = field(default_factory=dict)
    # Since the store has another history: its header then, the trunks that are not restarted yet, and how many of
    # the watches of each are still to be examined (None = all). None = it has not, or all are restarted.
    restored: Header | None = None
    restoring: dict[Trunk, int | None] = field(default_factory=dict)
    # All upstream watches that are open at etcd.
    upstreams: dict[Upstream, None] = field(default_factory=dict)
    # Sources whose run is incomplete.
    runs: dict[Source, FragmentRun] = field(default_factory=dict)
    # Sessions that are stalled or have lagging watches, those that have been behind longest first.
    lagging_sessions: dict[Session, None] = field(default_factory=dict)
    # Watches queued for a backfill, by range: that of their trunk, or of their branch below a cover.
    queued: dict[Trunk | CoverBranch[Group], dict[Watch, None]] = field(default_factory=dict)
    # Trunks without watches.
    lingers: Timers[Trunk] = field(default_factory=Timers)
    # Trunks with watches that asked for progress_notify.
    notices: Timers[NotifiedWatches] = field(default_factory=Timers)
    # Sessions whose requests may be decided: at the end of this input, and at the next timer.
    to_advance: dict[Session, None] = field(default_factory=dict)
    to_advance_later: dict[Session, None] = field(default_factory=dict)
    # Creates whose trunk has ended; they need another one at the end of this input.
    to_prepare: dict[PendingCreate, None] = field(default_factory=dict)
    # Backfills some of whose watches may move to the trunk, and how many of them are to be examined.
    to_promote: dict[Backfill, int] = field(default_factory=dict)
    # Sessions to be replayed, in turn: at the end of this input, and at the next timer; and how many bytes each
    # takes now; None: not known.
    to_replay: dict[Session, int | None] = field(default_factory=dict)
    to_replay_later: dict[Session, int | None] = field(default_factory=dict)
    # Upstream watches to be asked for progress, besides those of sessions that wait.
    to_ask: dict[Upstream, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ledger = HistoryBudget(self.limits, self.stats)
        self.covers = CoverTable(self.limits.covers)

    def new_history(self, floor: int, has_prev_kv: bool) -> History:
        """Return an empty history that begins at `floor`."""
        return History(self.ledger, floor, has_prev_kv)

    def open_upstream(self, source: Source, start_revision: int | None, prev_kv: bool, is_backfill: bool) -> None:
        """Open an upstream watch for a source."""
        source.upstream = upstream = Upstream(source, start_revision, prev_kv, is_backfill)
        self.upstreams[upstream] = None
        self.stats.upstreams_opened += 1
        self.effects.append(OpenUpstream(upstream))

    def close_upstream(self, upstream: Upstream, *, gone: bool = False) -> None:
        """Close an upstream watch; `gone`: etcd has ended it already, so no effect is needed."""
        upstream.closed = True
        self.upstreams.pop(upstream, None)
        self.to_ask.pop(upstream, None)
        if not gone:
            self.effects.append(CloseUpstream(upstream))

    def note_behind(self, session: Session) -> None:
        """Record since when a session is behind, or that it no longer is: it is stalled, or has lagging watches."""
        behind = (session.stalled or session.has_lagging) and not session.ended
        if behind == (session.lagging_since is not None):
            return
        if behind:
            session.lagging_since = self.now
            self.lagging_sessions[session] = None
        else:
            session.lagging_since = None
            del self.lagging_sessions[session]

    def want_replay(self, session: Session, room_bytes: int | None = None) -> None:
        """Replay a session's lagging watches when this input ends."""
        if session.has_lagging and not session.stalled and not session.ended:
            self.to_replay[session] = room_bytes

    def is_ending(self, trunk: Trunk, prev_kv: bool) -> bool:
        """Whether the watches of a trunk, or only those with prev_kv, end in steps: a further one would end as well."""
        return trunk in self.ending or (prev_kv and trunk.upgrade in self.ending)

    def end_run(self, source: Source) -> None:
        """End the run of a source, if there is one: replay the sessions that waited."""
        run, source.run = source.run, None
        if run is not None:
            del self.runs[source]
            for session in run.sessions:
                self.want_replay(session)

    def observe_header(self, header: Header) -> None:
        """Remember the newest header."""
        if header.revision and (self.header is None or header.revision >= self.header.revision):
            self.header = header
            self.header_at = self.now

    def header_now(self, revision: int | None = None) -> Header:
        """Return the newest header known, or that at another revision."""
        header = self.header or Header.make(0, 0, 0, 0)
        return header if revision is None else header.at(revision)

    def answer(
        self,
        session: Session,
        watch_id: int,
        header: Header,
        *,
        created: bool = False,
        canceled: bool = False,
        compact_revision: int = 0,
        cancel_reason: str = "",
    ) -> None:
        """Send a control answer."""
        message = encode_response(
            header,
            watch_id,
            created=created,
            canceled=canceled,
            compact_revision=compact_revision,
            cancel_reason=cancel_reason,
        )
        self._send(session, frame(message))

    def created(self, session: Session, watch_id: int, header: Header) -> None:
        """Answer a create."""
        self._send(session, frame(encode_created(header, watch_id)))

    def _send(self, session: Session, message: bytes) -> None:
        last = self.effects[-1] if self.effects else None
        if type(last) is Send and last.session is session:
            last.messages.append(message)
        else:
            self.effects.append(Send(session, [message]))

    def end_session(self, session: Session, status: int, text: str) -> None:
        """End a session's stream."""
        self.effects.append(EndSession(session, status, text))
