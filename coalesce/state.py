"""The shared state of the core: settings, time, the effects of the current input, what exists, and what is to be done.

The parts of the core (see `core`) call only the parts below them. What a part causes above it is an entry in one of the
sets here (`to_advance`, `to_replay`), which the Coalescer passes to the part concerned at the end of each input.
"""

from __future__ import annotations

from dataclasses import dataclass

from coalesce.effects import CloseUpstream, Effect, EndSession, OpenUpstream, Send
from coalesce.history import History, HistoryBudget
from coalesce.inputs import UpstreamLost
from coalesce.limits import CoreLimits
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


class CoreState:
    """The shared state of one Coalescer."""

    __slots__ = (
        "backfills",
        "compact_revision",
        "covers",
        "effects",
        "ending",
        "header",
        "header_at",
        "lagging_sessions",
        "leaving",
        "ledger",
        "limits",
        "lingers",
        "notices",
        "now",
        "ordered_progress",
        "parked",
        "progress_serial",
        "queued",
        "restored",
        "restoring",
        "runs",
        "sessions",
        "stats",
        "to_advance",
        "to_advance_later",
        "to_ask",
        "to_end",
        "to_move",
        "to_prepare",
        "to_promote",
        "to_replay",
        "to_replay_later",
        "trunks",
        "upstreams",
    )

    def __init__(self, limits: CoreLimits, ordered_progress: bool) -> None:
        self.limits = limits
        # etcd orders manual progress with events, and answers it for quiet watches (3.4.31, 3.5.13 and later).
        self.ordered_progress = ordered_progress
        self.stats = Stats()
        self.ledger = HistoryBudget(limits, self.stats)
        # Seconds, monotonic: the latest time passed in.
        self.now = 0.0
        # Effects of the current input.
        self.effects: list[Effect] = []
        # The newest header of any answer; None = none yet.
        self.header: Header | None = None
        # When an answer with the store's revision was last received; events do not count.
        self.header_at = float("-inf")
        # The highest revision at which a compaction ended an upstream watch; it applies to every range.
        self.compact_revision = 0
        # Progress requests made so far (see progress_requests).
        self.progress_serial = 0
        self.sessions: dict[Session, None] = {}
        # Sessions that are to end UNAVAILABLE, with this text: without a leader, or at a limit.
        self.to_end: dict[Session, str] = {}
        # Ended sessions whose watches are not all removed yet.
        self.leaving: dict[Session, None] = {}
        # Trunks by name, covers included.
        self.trunks: dict[TrunkName, Trunk] = {}
        # Trunks without an upstream watch, whose histories are kept; ordered by when they were parked, oldest first.
        self.parked: dict[TrunkName, Trunk] = {}
        # The prefixes of the covers.
        self.covers = CoverTable(limits.covers)
        # Trunks whose watches are to move to a cover, and covers whose watches are to leave it, see `moving`.
        self.to_move: dict[Trunk, None] = {}
        # All backfills, upgrades included.
        self.backfills: dict[Backfill, None] = {}
        # Sources whose upstream watch has ended, and whose watches end or get another source.
        self.ending: dict[Source, SourceEnd] = {}
        # Since the store has another history: its header then, the trunks that are not restarted yet, and how many of
        # the watches of each are still to be examined (None = all). None = it has not, or all are restarted.
        self.restored: Header | None = None
        self.restoring: dict[Trunk, int | None] = {}
        # All upstream watches that are open at etcd.
        self.upstreams: dict[Upstream, None] = {}
        # Sources whose run is incomplete.
        self.runs: dict[Source, FragmentRun] = {}
        # Sessions that are stalled or have lagging watches, those that have been behind longest first.
        self.lagging_sessions: dict[Session, None] = {}
        # Watches queued for a backfill, by range: that of their trunk, or of their branch below a cover.
        self.queued: dict[Trunk | CoverBranch[Group], dict[Watch, None]] = {}
        # Trunks without watches.
        self.lingers: Timers[Trunk] = Timers()
        # Trunks with watches that asked for progress_notify.
        self.notices: Timers[NotifiedWatches] = Timers()
        # Sessions whose requests may be decided: at the end of this input, and at the next timer.
        self.to_advance: dict[Session, None] = {}
        self.to_advance_later: dict[Session, None] = {}
        # Creates whose trunk has ended; they need another one at the end of this input.
        self.to_prepare: dict[PendingCreate, None] = {}
        # Backfills some of whose watches may move to the trunk, and how many of them are to be examined.
        self.to_promote: dict[Backfill, int] = {}
        # Sessions to be replayed, in turn: at the end of this input, and at the next timer; and how many bytes each
        # takes now; None: not known.
        self.to_replay: dict[Session, int | None] = {}
        self.to_replay_later: dict[Session, int | None] = {}
        # Upstream watches to be asked for progress, besides those of sessions that wait.
        self.to_ask: dict[Upstream, None] = {}

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
        behind = (session.stalled or bool(session.lagging)) and not session.ended
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
        if session.lagging and not session.stalled and not session.ended:
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
        self.effects.append(Send(session, frame(message)))

    def created(self, session: Session, watch_id: int, header: Header) -> None:
        """Answer a create."""
        self.effects.append(Send(session, frame(encode_created(header, watch_id))))

    def end_session(self, session: Session, status: int, text: str) -> None:
        """End a session's stream."""
        self.effects.append(EndSession(session, status, text))
