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

from itertools import islice
from typing import Final

from coalesce.cover import Cover, KeyedHistory, cover_name
from coalesce.model import PendingCreate, Trunk
from coalesce.placement import Placement
from coalesce.ranges import TrunkName
from coalesce.state import CoreState
from coalesce.stats import CoverStats
from proto.scan import Header
from proto.spans import prefix_of

# A header received within the last so many seconds is recent enough to choose where a trunk starts.
_NEWS_S = 0.25
# To drop so many batches of a history takes as long as to end a watch.
BATCHES_DROPPED: Final = 10


class Trunks:
    """Opens, lingers, parks and closes trunks."""

    def __init__(self, state: CoreState, placement: Placement) -> None:
        self._state = state
        self._placement = placement

    def hold(self, create: PendingCreate) -> bool:
        """Assign a create its trunk, opened if necessary. False: this needs a read of "now" first."""
        if create.trunk is not None:
            return True
        state = self._state
        name = self._name(create)
        start = create.request.start_revision
        trunk = state.trunks.get(name)
        if trunk is None and name in state.parked:
            newest = self._newest(create)
            if start is not None and (newest is None or (create.header is None and start > newest)):
                return False
            trunk = self._resume(create, name, newest or 0)
        if trunk is None:
            if start is not None:
                newest = self._newest(create)
                if newest is None or (create.header is None and start > newest + 1):
                    # The trunk would start at newest + 1; if that is outdated, it is in the past, maybe compacted.
                    return False
                # A trunk does not start in the future: other watches may want the revisions before.
                start = min(start, newest + 1) if newest - start <= state.limits.trunk_catch_up_revisions else None
            trunk = self.open(name, start, create.request.prev_kv)
        create.trunk = trunk
        trunk.joining[create] = None
        state.lingers.stop(trunk)
        return True

    def is_open(self, create: PendingCreate) -> bool:
        """Whether the trunk that a create needs is open."""
        return self._name(create) in self._state.trunks

    def _name(self, create: PendingCreate) -> TrunkName:
        """Return the name of the trunk for a create: an open one of its range, else a cover, else one of its range."""
        state = self._state
        span = create.key, create.range_end
        prefix = state.covers.choose(*span, state.now) if state.covers.prefixes else None
        if prefix is None:
            return span
        trunk = state.trunks.get(span)
        if trunk is not None:
            state.to_move[trunk] = None
            return span
        name, bare = cover_name(prefix, True), cover_name(prefix, False)
        if not create.request.prev_kv:
            # The cover with prev_kv, unless it has to be opened, or only the other one can serve the watch at once.
            cover, start = state.trunks.get(name), create.request.start_revision
            waits = cover is None or cover.opening or (start is not None and start < cover.history.floor)
            if (bare in state.trunks and waits) or (cover is None and name not in state.parked):
                name = bare
        if bare in state.trunks and (create.request.prev_kv or cover_name(prefix, True) in state.trunks):
            # Its watches are to move to the one with prev_kv.
            state.to_move[state.trunks[bare]] = None
        cover = state.trunks.get(name)
        return span if isinstance(cover, Cover) and cover.retired else name

    def open(self, name: TrunkName, start: int | None, prev_kv: bool) -> Trunk:
        """Open a trunk from a revision that exists, or (None) from now. The name of a cover decides its prev_kv."""
        state = self._state
        trunk: Trunk
        prefix = prefix_of(name[0], name[1]) if len(name) > 2 else None
        if prefix is None:
            trunk = Trunk(name[0], name[1], state.new_history(start or 0, prev_kv), state.now)
        else:
            prev_kv = name == cover_name(prefix, True)
            stats = state.stats.covers.setdefault(prefix, CoverStats(state.now))
            trunk = Cover(prefix, KeyedHistory(state.ledger, start or 0, prev_kv), stats, state.now)
            other = state.trunks.get(cover_name(prefix, False))
            if prev_kv and other is not None:
                # Its watches are to move to this one.
                state.to_move[other] = None
        parked = state.parked.pop(name, None)
        if parked is not None:
            state.stats.parked -= 1
            parked.history.discard()
        state.trunks[name] = trunk
        state.stats.trunks += 1
        state.open_upstream(trunk, start, prev_kv, False)
        return trunk

    def _newest(self, create: PendingCreate) -> int | None:
        """Return the approximate revision of the store, to choose where a trunk starts; None = it must be read.

        It is never used as "now".
        """
        state = self._state
        if create.header is not None:
            return create.header.revision
        if state.header is not None and state.header_at + _NEWS_S > state.now:
            return state.header.revision
        return None

    def release(self, create: PendingCreate) -> None:
        """Release the trunk that a create held, because the create has joined or never will."""
        trunk, create.trunk = create.trunk, None
        if trunk is not None:
            del trunk.joining[create]
            if not trunk.watches:
                self.unused(trunk)

    def unused(self, trunk: Trunk) -> None:
        """Start the linger of a trunk that is not needed any more."""
        state = self._state
        if not trunk.is_used and state.trunks.get(trunk.name) is trunk:
            state.lingers.start(trunk, state.now + state.limits.linger_s)

    def created(self, trunk: Trunk, header: Header) -> None:
        """Etcd has registered the trunk: waiting creates may join."""
        trunk.opening = False
        trunk.upstream.created = True
        if isinstance(trunk, Cover):
            trunk.stats.problem = ""
        trunk.refused_tokens.clear()
        if trunk.upstream.start_revision is None:
            trunk.start_over(header.revision + 1)
            # Watches of a lost cover may have come meanwhile.
            self._placement.restore_upgrade(trunk)
        trunk.proven_at = self._state.now
        self._state.to_advance.update((create.session, None) for create in trunk.joining)

    def reopen(self, trunk: Trunk, next_revision: int) -> None:
        """Reopen a trunk, from the revision it needs next, after etcd has ended its upstream watch."""
        prev_kv = trunk.prev_kv_from is not None
        if trunk.opening and trunk.upstream.start_revision is None:
            self._state.open_upstream(trunk, None, prev_kv, False)
            return
        trunk.opening = True
        if next_revision > trunk.next_revision:
            trunk.start_over(next_revision)
        self._state.open_upstream(trunk, next_revision, prev_kv, False)

    def _resume(self, create: PendingCreate, name: TrunkName, newest: int) -> Trunk | None:
        """Reopen the upstream watch of a parked trunk, or drop the trunk and return None.

        Its watches wait for the catch-up, so this is bounded: by what etcd sends in one response, or, for a watch that
        the history serves, by what a backfill would have to bring instead. A watch from now, or from the future, must
        not wait at all: a compaction meanwhile would cancel it, though it has missed nothing.
        """
        state, request = self._state, create.request
        trunk = state.parked.pop(name)
        state.stats.parked -= 1
        position, start = trunk.next_revision, request.start_revision
        served = start is not None and trunk.history.floor <= start <= position
        furthest = state.limits.backfill_share_revisions if served else state.limits.trunk_catch_up_revisions
        if start is None or start > newest or position < state.compact_revision or newest - position > furthest:
            trunk.history.discard()
            return None
        if request.prev_kv and trunk.prev_kv_from is None:
            trunk.prev_kv_from = position
            trunk.history.has_prev_kv = True
        trunk.opening = True
        state.open_upstream(trunk, position, trunk.prev_kv_from is not None, False)
        state.trunks[name] = trunk
        state.stats.trunks += 1
        state.stats.resumed += 1
        return trunk

    def _park(self, trunk: Trunk) -> None:
        """Close a trunk, and keep its history if there is one and the limits allow it."""
        state = self._state
        limits = state.limits
        if isinstance(trunk, Cover) and trunk.retired:
            self.remove(trunk)
            return
        if not len(trunk.history) or not limits.history_linger_s or not limits.parked_max:
            self.remove(trunk)
            return
        while len(state.parked) >= limits.parked_max:
            self._drop_first("parked_max")
        self._close(trunk, gone=False)
        trunk.parked_at = trunk.proven_at = state.now
        trunk.refused_tokens.clear()
        # The interval between notifications is not measured across the time while it is parked.
        trunk.noticed_at, trunk.noticed_events = -1.0, trunk.events
        state.parked[trunk.name] = trunk
        state.stats.parked += 1

    def drop_parked(self, left: int) -> int:
        """Drop parked trunks, whose histories may be wrong; return what is left of the `left` of this step."""
        parked = self._state.parked
        while parked and left > 0:
            left -= 1
            self._drop_first(None)
        return left

    def _drop_first(self, limit: str | None) -> None:
        """Drop the trunk that has been parked longest; `limit` is the one that was reached, if any."""
        state = self._state
        trunk = state.parked.pop(next(iter(state.parked)))
        state.stats.parked -= 1
        if limit is not None:
            state.stats.evicted_at[limit] += len(trunk.history)
        trunk.history.discard()

    def remove(self, trunk: Trunk, *, gone: bool = False) -> None:
        """Remove an unused trunk; `gone`: etcd has ended its upstream watch already."""
        self._close(trunk, gone=gone)
        trunk.history.discard()

    def _close(self, trunk: Trunk, *, gone: bool) -> None:
        state = self._state
        assert not trunk.is_used, "a closed trunk has neither watches nor creates"
        state.lingers.stop(trunk)
        if trunk.upgrade is not None:
            self._placement.close(trunk.upgrade)
        del state.trunks[trunk.name]
        state.stats.trunks -= 1
        state.to_move.pop(trunk, None)
        state.ending.pop(trunk, None)
        state.restoring.pop(trunk, None)
        if not trunk.upstream.closed:
            state.close_upstream(trunk.upstream, gone=gone)
        trunk.upstream.leave(trunk)
        state.end_run(trunk)

    def expire(self) -> None:
        """Park the trunks whose linger has ended, and drop those that were parked for history_linger_s."""
        state = self._state
        left = state.limits.step_watches_max
        for trunk in islice(state.lingers.due(state.now), left):
            self._park(trunk)
            left -= 1
        while left > 0 and (at := self.next_deadline()) is not None and at <= state.now:
            self._drop_first("history_linger_s")
            left -= 1

    def next_deadline(self) -> float | None:
        """Return when the first parked trunk is to be dropped."""
        parked = self._state.parked
        return next(iter(parked.values())).parked_at + self._state.limits.history_linger_s if parked else None
