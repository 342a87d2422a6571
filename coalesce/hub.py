"""CoreState, shared by all parts of the core: settings, time, the effects of the current input, and what exists.

Each part (joining, trunks, backfills, replays, runs, progress, notifying, endings) owns one concern and reaches the
others through this object.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from coalesce.batch import framed
from coalesce.effects import CloseUpstream, Effect, EndSession, OpenUpstream, Send
from coalesce.history import HistoryBudget
from coalesce.limits import CoreLimits
from coalesce.session import Place, Session, Watch
from coalesce.stats import Stats
from coalesce.timers import Timers
from proto.scan import Header, encode_response

if TYPE_CHECKING:
    from coalesce.backfill import Backfill, Backfills
    from coalesce.ending import Cancellation
    from coalesce.joining import Admission
    from coalesce.notifying import Notices, Notifying
    from coalesce.progress import Progress
    from coalesce.replay import Replayer
    from coalesce.runs import Runs
    from coalesce.source import Upstream
    from coalesce.trunk import Trunk, Trunks


class CoreState:
    """The shared state of one Coalescer."""

    __slots__ = (
        "backfills",
        "compact_revision",
        "effects",
        "endings",
        "header",
        "header_at",
        "joining",
        "lagging_sessions",
        "leaving",
        "ledger",
        "limits",
        "lingers",
        "notices",
        "notifying",
        "now",
        "ordered_progress",
        "parked",
        "progress",
        "progress_serial",
        "queued",
        "replays",
        "runs",
        "sessions",
        "stats",
        "trunks",
        "trunks_open",
        "upstreams",
    )

    # The parts; set by the Coalescer.
    backfills: Backfills
    endings: Cancellation
    joining: Admission
    notifying: Notifying
    progress: Progress
    replays: Replayer
    runs: Runs
    trunks: Trunks

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
        # Progress requests made so far (see progress).
        self.progress_serial = 0
        self.sessions: dict[Session, None] = {}
        # Ended sessions whose watches are not all removed yet.
        self.leaving: dict[Session, None] = {}
        self.trunks_open: dict[tuple[bytes, bytes], Trunk] = {}
        # Trunks without an upstream watch, whose histories are kept; ordered by when they were parked, oldest first.
        self.parked: dict[tuple[bytes, bytes], Trunk] = {}
        # Sessions with lagging watches, those that have lagged longest first.
        self.lagging_sessions: dict[Session, None] = {}
        # Watches queued for a backfill.
        self.queued: dict[Watch, None] = {}
        # All upstream watches that are open at etcd.
        self.upstreams: dict[Upstream, None] = {}
        # Trunks without watches.
        self.lingers: Timers[Trunk] = Timers()
        # Trunks with watches that asked for progress_notify.
        self.notices: Timers[Notices] = Timers()

    def open_upstream(self, upstream: Upstream) -> None:
        """Open an upstream watch."""
        self.upstreams[upstream] = None
        self.stats.upstreams_opened += 1
        self.effects.append(OpenUpstream(upstream))

    def close_upstream(self, upstream: Upstream, *, gone: bool = False) -> None:
        """Close an upstream watch; `gone`: etcd has ended it already, so no effect is needed."""
        upstream.closed = True
        self.upstreams.pop(upstream, None)
        self.progress.closed(upstream)
        if not gone:
            self.effects.append(CloseUpstream(upstream))

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
        self.effects.append(Send(session, framed(message)))

    def end_session(self, session: Session, status: int, text: str) -> None:
        """End a session's stream."""
        self.effects.append(EndSession(session, status, text))

    # places

    def mark_lagging(self, watch: Watch) -> None:
        """Place an unplaced watch as lagging: in its session's turn it is replayed, or gets a new source."""
        session = watch.session
        watch.place = Place.LAGGING
        session.lagging[watch] = None
        self.stats.lagging += 1
        if session.lagging_since is None:
            session.lagging_since = self.now
            self.lagging_sessions[session] = None

    def unplace(self, watch: Watch) -> None:
        """Remove a watch from its current place and record its position. The caller must place it again at once."""
        place = watch.place
        if place is Place.LAGGING:
            session = watch.session
            del session.lagging[watch]
            self.stats.lagging -= 1
            if not session.lagging:
                session.lagging_since = None
                del self.lagging_sessions[session]
        elif place is Place.QUEUED:
            del self.queued[watch]
            self.stats.queued -= 1
        elif watch.source is not None:
            watch.source.fanout.remove(watch)

    def attach(self, watch: Watch, backfill: Backfill | None) -> None:
        """Set the source of an unplaced watch: a backfill, or (None) its trunk."""
        self.detach(watch)
        watch.source = backfill if backfill is not None else watch.trunk
        if backfill is not None:
            backfill.watches[watch] = None

    def detach(self, watch: Watch) -> None:
        """Remove an unplaced watch from its source."""
        source = watch.source
        watch.source = None
        if source is not None and source is not watch.trunk:
            self.backfills.on_watch_left(source, watch)

    def place(self, watches: Iterable[Watch]) -> None:
        """Place unplaced watches: in step, ahead, lagging, or on a backfill."""
        for watch in watches:
            trunk = watch.trunk
            if trunk.serves(watch):
                self.attach(watch, None)
                if watch.session.stalled or watch.position < trunk.next_revision:
                    self.mark_lagging(watch)
                    self.replays.want(watch.session)
                else:
                    trunk.fanout.add(watch)
            elif watch.session.stalled:
                self.detach(watch)
                self.mark_lagging(watch)
            else:
                self.backfills.house(watch)
