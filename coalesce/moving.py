"""Moves watches between trunks and covers, while their clients notice nothing.

- A cover is configured while the proxy runs, or etcd accepts one that it had refused: the watches below it move to it.
- A cover is removed, or etcd refuses it: its watches move to trunks of their own ranges.
- A watch wants prev_kv and the cover has none: a cover with prev_kv is opened, and the watches of the other one move.

A watch moves when its new trunk can serve the revision that it needs next. So each move is a change of place only: the
watch is in step, ahead of the new trunk, or replayed from its history. Each step moves a bounded number of watches.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Final

from coalesce.cover import Cover, cover_name
from coalesce.limits import CoreLimits
from coalesce.model import Trunk, Watch
from coalesce.notifying import ProgressNotifier
from coalesce.place import Place
from coalesce.placement import Placement
from coalesce.progress_requests import ProgressRequests
from coalesce.ranges import CoverTable
from coalesce.state import CoreState
from coalesce.trunk import Trunks
from coalesce.waiting import ProgressWaiters

# How often trunks are examined whose watches cannot move yet: until then their position may be below the cover's start.
LOOK_S: Final = 1.0
# Maximum trunks, and watches of each, that are examined in one step.
EXAMINED_MAX: Final = 1000


class CoverMover:
    """Moves the watches of the trunks in `to_move`."""

    def __init__(
        self,
        state: CoreState,
        waiters: ProgressWaiters,
        requests: ProgressRequests,
        notifying: ProgressNotifier,
        placement: Placement,
        trunks: Trunks,
    ) -> None:
        self._state = state
        self._waiters = waiters
        self._requests = requests
        self._notifying = notifying
        self._placement = placement
        self._trunks = trunks
        # Trunks that may lie below a cover now.
        self._to_examine: deque[Trunk] = deque()
        # Covers that are kept open for the watches that are to move there.
        self._awaited: set[Cover] = set()
        # Those seen since `to_move` was last examined from its beginning.
        self._awaited_now: set[Cover] = set()
        # Trunks of `to_move` that were examined since a watch last moved.
        self._idle = 0
        # When to examine the trunks in `to_move` again.
        self._look_at = float("-inf")

    def configure(self, limits: CoreLimits) -> None:
        """Apply other settings: move watches to the covers that are new, and from those that are gone."""
        state = self._state
        before = state.covers
        if before.prefixes == frozenset(limits.covers):
            return
        state.covers = CoverTable(limits.covers)
        state.covers.suspended = {
            prefix: until for prefix, until in before.suspended.items() if prefix in state.covers.prefixes
        }
        for trunk in list(state.trunks.values()):
            if isinstance(trunk, Cover) and not (trunk.retired and trunk.upstream.closed):
                trunk.retired = trunk.prefix not in state.covers.prefixes
                if trunk.retired:
                    state.to_move[trunk] = None
        self._examine_all()

    def _examine_all(self) -> None:
        self._to_examine = deque(self._state.trunks.values())
        self._look_at = float("-inf")

    def next_deadline(self) -> float | None:
        """Return when `expire` is due."""
        state = self._state
        if self._to_examine:
            return state.now
        at = max(self._look_at, state.now) if state.to_move or self._awaited else None
        if state.covers.suspended and state.trunks:
            first = min(state.covers.suspended.values())
            at = first if at is None else min(at, first)
        return at

    def expire(self) -> None:
        """Move as many watches as one step allows."""
        state = self._state
        suspended = state.covers.suspended
        for prefix in [prefix for prefix, until in suspended.items() if until <= state.now]:
            del suspended[prefix]
            self._examine_all()
        for _ in range(min(len(self._to_examine), EXAMINED_MAX)):
            trunk = self._to_examine.popleft()
            if state.trunks.get(trunk.name) is trunk and self._cover_for(trunk) is not None:
                state.to_move[trunk] = None
        if self._look_at > state.now:
            return
        left, examined = state.limits.step_watches_max, 0
        while left > 0 and examined < EXAMINED_MAX and self._idle < len(state.to_move):
            trunk = next(iter(state.to_move))
            # Behind the others, if it is not finished.
            del state.to_move[trunk]
            state.to_move[trunk] = None
            moved = self._move(trunk, left)
            left -= moved
            examined += 1
            # One that has nothing to move any more has left `to_move`.
            self._idle = 0 if moved else self._idle + (trunk in state.to_move)
        if self._idle >= len(state.to_move):
            self._end_circle()

    def _end_circle(self) -> None:
        """No watch can move now: look again a little later, and release the covers that are not awaited any more."""
        for cover in self._awaited - self._awaited_now:
            cover.awaited = False
            self._trunks.unused(cover)
        self._awaited, self._awaited_now = self._awaited_now, set()
        self._idle = 0
        self._look_at = self._state.now + LOOK_S

    def _cover_for(self, trunk: Trunk) -> tuple[bytes, bool] | None:
        """Return the cover that the watches of a trunk are to move to: its prefix, and whether it has prev_kv."""
        state = self._state
        if isinstance(trunk, Cover) and not trunk.retired:
            name = cover_name(trunk.prefix, True)
            return (trunk.prefix, True) if not trunk.prev_kv and name in state.trunks else None
        prefix = state.covers.choose(trunk.key, trunk.range_end, state.now)
        if prefix is None:
            return None
        return prefix, trunk.prev_kv_watches > 0 or cover_name(prefix, True) in state.trunks

    def _move(self, trunk: Trunk, most: int) -> int:
        """Move up to so many watches of a trunk; return their number."""
        state = self._state
        wanted = self._cover_for(trunk)
        if isinstance(trunk, Cover) and trunk.retired and (wanted is None or trunk.upstream.closed):
            return self._dissolve(trunk, most)
        if wanted is None or not trunk.is_used:
            del state.to_move[trunk]
            return 0
        cover = state.trunks.get(cover_name(*wanted))
        if cover is None:
            cover = self._trunks.open(cover_name(*wanted), None, wanted[1])
        assert isinstance(cover, Cover), "the name is that of a cover"
        if cover.retired:
            return 0
        if not cover.awaited:
            cover.awaited = True
            state.lingers.stop(cover)
        self._awaited.add(cover)
        self._awaited_now.add(cover)
        if trunk.opening or not cover.is_live:
            return 0
        if trunk.next_revision < cover.history.floor:
            # Its next bookmark is above the cover's start.
            self._requests.want(trunk.upstream)
            return 0
        ready: list[Watch] = []
        for watch in list(islice(trunk.watches, EXAMINED_MAX)):
            if len(ready) == most:
                break
            if watch.source is trunk and cover.serves(watch):
                ready.append(watch)
            else:
                # Behind the others, which are examined next.
                del trunk.watches[watch]
                trunk.watches[watch] = None
        for watch in ready:
            self._move_watch(watch, cover)
        return len(ready)

    def _dissolve(self, cover: Cover, most: int) -> int:
        """Move up to so many watches of a cover to trunks of their own ranges.

        While trunks_max trunks are open, those that need a further one stay, if etcd serves the cover. On a cover that
        etcd has refused they would receive nothing, so their sessions end.
        """
        state = self._state
        moved = 0
        waiting: list[Watch] = []
        refused, limit = cover.upstream.closed, state.limits.trunks_max
        # From the end: to find the first one of a dict takes time for each one deleted before it, 65 ms for 8 million.
        while cover.watches and moved < most and len(waiting) < EXAMINED_MAX:
            watch, _ = cover.watches.popitem()
            branch = watch.branch
            assert branch is not None, "each watch of a cover has a branch"
            trunk = state.trunks.get(branch.span)
            if trunk is None:
                if len(state.trunks) - refused >= limit:
                    cover.watches[watch] = None
                    if refused and not watch.session.ended and watch.session not in state.to_end:
                        state.stats.refused_at["trunks_max"] += 1
                        text = f"watchmux: the limit of {limit} different ranges is reached, and etcd refuses a cover"
                        state.to_end[watch.session] = text
                        moved += 1
                    break
                trunk = self._trunks.open(branch.span, cover.next_revision, watch.wants_prev_kv)
            elif state.is_ending(trunk, watch.wants_prev_kv):
                waiting.append(watch)
                continue
            if not trunk.is_used:
                # A new trunk, or one that lingers since its watches have moved away: it may be below another cover.
                self._to_examine.append(trunk)
            self._move_watch(watch, trunk)
            moved += 1
        if waiting:
            cover.watches.update(dict.fromkeys(waiting))
            state.lingers.stop(cover)
        if not cover.watches and not cover.joining:
            state.to_move.pop(cover, None)
            cover.awaited = False
            state.lingers.stop(cover)
            self._trunks.remove(cover, gone=cover.upstream.closed)
        return moved

    def _move_watch(self, watch: Watch, target: Trunk) -> None:
        """Move a watch to another trunk that contains its range."""
        source = watch.trunk
        span = (source.key, source.range_end) if watch.branch is None else watch.branch.span
        self._notifying.forget(watch)
        self._placement.unplace(watch)
        self._placement.detach(watch)
        watch.place = Place.LAGGING
        source.quit(watch)
        watch.branch = None
        watch.trunk = target
        target.join(watch, span)
        self._state.lingers.stop(target)
        self._waiters.unblock(watch.session)
        self._notifying.began(watch)
        self._placement.place((watch,))
        self._trunks.unused(source)
        self._state.stats.moved += 1
