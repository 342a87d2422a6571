"""Trunks: the one upstream watch that all watches of a range share.

A trunk opens with the first create that needs it and holds that create, and those that arrive meanwhile, until etcd has
answered `created`. It starts at "now", or at the start of its first watch if that is recent: never so far back that a
live watch would wait for the catch-up. A trunk that started at "now" is complete above the revision in the header of
its `created`: etcd reads that header after it has registered the watch, so events at or below it may be incomplete, and
no watch needs them. A trunk with a start revision is complete from that revision; the header of its `created` proves
nothing.

Without watches a trunk lingers for `linger_s`, then it is *parked*: its upstream watch is closed, and its history is
kept for clients that reconnect. The first of them reopens the upstream watch, from the revision that the history needs
next, unless that is compacted or too far back for a quick catch-up: then the history is dropped, and the range is cold.
When a compaction ends its upstream watch, a trunk reopens at the compact revision for the watches that missed nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from coalesce.session import PendingCreate, Session, Watch
from coalesce.source import Source
from proto.scan import Header

# A header received within the last so many seconds is recent enough to choose where a trunk starts.
_NEWS_S = 0.25

if TYPE_CHECKING:
    from coalesce.backfill import Backfill
    from coalesce.hub import CoreState
    from coalesce.notifying import Notices


class Trunk(Source):
    """The upstream watch of a range, its history and all watches of that range."""

    __slots__ = (
        "backfills",
        "joining",
        "noticed_at",
        "noticed_events",
        "notices",
        "opening",
        "parked_at",
        "prev_kv_from",
        "prev_kv_watches",
        "timer_at",
        "upgrade",
    )

    def __init__(self, hub: CoreState, key: bytes, range_end: bytes, start_revision: int | None, prev_kv: bool) -> None:
        super().__init__(hub, key, range_end, start_revision or 0, prev_kv)
        # Creates that hold it open until they join.
        self.joining: dict[PendingCreate, None] = {}
        # How many of its watches want prev_kv.
        self.prev_kv_watches = 0
        self.backfills: list[Backfill] = []
        # It waits for `created`; until then its position may be unknown.
        self.opening = True
        # The revision from which on the history has prev_kv; None = it has none.
        self.prev_kv_from: int | None = (start_revision or 0) if prev_kv else None
        # The second upstream watch, with prev_kv, that will replace the first one.
        self.upgrade: Backfill | None = None
        # Its watches that asked for progress_notify; None = there are none.
        self.notices: Notices | None = None
        # When etcd last notified it, and how many events it had received by then.
        self.noticed_at = -1.0
        self.noticed_events = 0
        # When its linger ends; None = it is in use.
        self.timer_at: float | None = None
        # When it was last parked.
        self.parked_at = 0.0
        self.open(start_revision, prev_kv, False)

    def serves(self, watch: Watch) -> bool:
        """Whether it can bring this watch the revisions it needs next, with prev_kv if the watch wants that."""
        position = watch.next_revision
        if watch.wants_prev_kv and (self.prev_kv_from is None or position < self.prev_kv_from):
            return False
        return position >= self.history.floor

    def sessions(self) -> Iterator[Session]:
        """Walk the sessions with watches of the range, or with creates that wait for it."""
        for watch in self.watches:
            yield watch.session
        for create in self.joining:
            yield create.session

    def start_over(self, next_revision: int) -> None:
        """Drop the history and continue at `next_revision`. The watches must be unplaced."""
        self.fanout.next_revision = next_revision
        self.history.drop(next_revision)
        if self.prev_kv_from is not None:
            self.prev_kv_from = next_revision


class Trunks:
    """Opens, lingers, parks and closes trunks."""

    __slots__ = ("_hub",)

    def __init__(self, hub: CoreState) -> None:
        self._hub = hub

    def hold(self, create: PendingCreate) -> bool:
        """Assign a create its trunk, opened if necessary. False: this needs a read of "now" first."""
        if create.trunk is not None:
            return True
        hub = self._hub
        span = create.key, create.range_end
        start = create.request.start_revision
        trunk = hub.trunks_open.get(span)
        if trunk is None and span in hub.parked:
            newest = self._newest(create)
            if start is not None and (newest is None or (create.header is None and start > newest)):
                return False
            trunk = self._resume(create, newest or 0)
        if trunk is None:
            if start is not None:
                newest = self._newest(create)
                if newest is None or (create.header is None and start > newest + 1):
                    # The trunk would start at newest + 1; if that is outdated, it is in the past, maybe compacted.
                    return False
                # A trunk does not start in the future: other watches may want the revisions before.
                start = min(start, newest + 1) if newest - start <= hub.limits.trunk_catch_up_revisions else None
            trunk = Trunk(hub, create.key, create.range_end, start, create.request.prev_kv)
            hub.trunks_open[span] = trunk
            hub.stats.trunks += 1
        create.trunk = trunk
        trunk.joining[create] = None
        hub.lingers.stop(trunk)
        return True

    def _newest(self, create: PendingCreate) -> int | None:
        """Return the approximate revision of the store, to choose where a trunk starts; None = it must be read.

        It is never used as "now".
        """
        hub = self._hub
        if create.header is not None:
            return create.header.revision
        if hub.header is not None and hub.header_at + _NEWS_S > hub.now:
            return hub.header.revision
        return None

    def release(self, create: PendingCreate) -> None:
        """Release the trunk that a create held, because the create has joined or never will."""
        trunk, create.trunk = create.trunk, None
        if trunk is not None:
            del trunk.joining[create]
            self.unused(trunk)

    def unused(self, trunk: Trunk) -> None:
        """Start the linger of a trunk that is not needed any more."""
        hub = self._hub
        if not trunk.watches and not trunk.joining and (trunk.key, trunk.range_end) in hub.trunks_open:
            hub.lingers.start(trunk, hub.now + hub.limits.linger_s)

    def created(self, trunk: Trunk, header: Header) -> None:
        """Etcd has registered the trunk: waiting creates may join."""
        trunk.opening = False
        trunk.upstream.created = True
        trunk.refused_tokens.clear()
        if trunk.upstream.start_revision is None:
            trunk.start_over(header.revision + 1)
        trunk.proven_at = self._hub.now
        for create in list(trunk.joining):
            self._hub.joining.advance(create.session)

    def reopen(self, trunk: Trunk, next_revision: int) -> None:
        """Reopen a trunk, from the revision it needs next, after etcd has ended its upstream watch."""
        prev_kv = trunk.prev_kv_from is not None
        if trunk.opening and trunk.upstream.start_revision is None:
            trunk.open(None, prev_kv, False)
            return
        trunk.opening = True
        if next_revision > trunk.next_revision:
            trunk.start_over(next_revision)
        trunk.open(next_revision, prev_kv, False)

    def _resume(self, create: PendingCreate, newest: int) -> Trunk | None:
        """Reopen the upstream watch of a parked trunk, or drop the trunk and return None.

        Its watches wait for the catch-up, so this is bounded: by what etcd sends in one response, or, for a watch that
        the history serves, by what a backfill would have to bring instead. A watch from now, or from the future, must
        not wait at all: a compaction meanwhile would cancel it, though it has missed nothing.
        """
        hub, request = self._hub, create.request
        trunk = hub.parked.pop((create.key, create.range_end))
        hub.stats.parked -= 1
        position, start = trunk.next_revision, request.start_revision
        served = start is not None and trunk.history.floor <= start <= position
        furthest = hub.limits.backfill_share_revisions if served else hub.limits.trunk_catch_up_revisions
        if start is None or start > newest or position < hub.compact_revision or newest - position > furthest:
            self._drop(trunk)
            return None
        if request.prev_kv and trunk.prev_kv_from is None:
            trunk.prev_kv_from = position
            trunk.history.has_prev_kv = True
        trunk.opening = True
        trunk.open(position, trunk.prev_kv_from is not None, False)
        hub.trunks_open[trunk.key, trunk.range_end] = trunk
        hub.stats.trunks += 1
        hub.stats.resumed += 1
        return trunk

    def _park(self, trunk: Trunk) -> None:
        """Close a trunk, and keep its history if there is one and the limits allow it."""
        hub = self._hub
        limits = hub.limits
        if not len(trunk.history) or not limits.history_linger_s or not limits.parked_max:
            self.remove(trunk)
            return
        while len(hub.parked) >= limits.parked_max:
            self._drop_first("parked_max")
        self._close(trunk, gone=False)
        trunk.parked_at = trunk.proven_at = hub.now
        trunk.refused_tokens.clear()
        # The interval between notifications is not measured across the time while it is parked.
        trunk.noticed_at, trunk.noticed_events = -1.0, trunk.events
        hub.parked[trunk.key, trunk.range_end] = trunk
        hub.stats.parked += 1

    def drop_parked(self) -> None:
        """Drop all parked trunks: their histories may be wrong."""
        while self._hub.parked:
            self._drop_first(None)

    def _drop_first(self, limit: str | None) -> None:
        """Drop the trunk that has been parked longest; `limit` is the one that was reached, if any."""
        hub = self._hub
        trunk = hub.parked.pop(next(iter(hub.parked)))
        hub.stats.parked -= 1
        if limit is not None:
            hub.stats.evicted_at[limit] += len(trunk.history)
        self._drop(trunk)

    def _drop(self, trunk: Trunk) -> None:
        trunk.history.drop(trunk.next_revision)

    def remove(self, trunk: Trunk, *, gone: bool = False) -> None:
        """Remove an unused trunk; `gone`: etcd has ended its upstream watch already."""
        self._close(trunk, gone=gone)
        self._drop(trunk)

    def _close(self, trunk: Trunk, *, gone: bool) -> None:
        hub = self._hub
        assert not trunk.watches, "a closed trunk has no watches"
        assert not trunk.joining, "a closed trunk has no creates"
        hub.lingers.stop(trunk)
        if trunk.upgrade is not None:
            hub.backfills.close(trunk.upgrade)
        del hub.trunks_open[trunk.key, trunk.range_end]
        hub.stats.trunks -= 1
        hub.close_upstream(trunk.upstream, gone=gone)
        trunk.upstream.leave(trunk)
        hub.runs.end(trunk)

    def expire(self) -> None:
        """Park the trunks whose linger has ended, and drop those that were parked for history_linger_s."""
        hub = self._hub
        left = hub.limits.step_watches_max
        for trunk in islice(hub.lingers.due(hub.now), left):
            self._park(trunk)
            left -= 1
        while left > 0 and (at := self.next_deadline()) is not None and at <= hub.now:
            self._drop_first("history_linger_s")
            left -= 1

    def next_deadline(self) -> float | None:
        """Return when the first parked trunk is to be dropped."""
        parked = self._hub.parked
        return next(iter(parked.values())).parked_at + self._hub.limits.history_linger_s if parked else None
