"""Stalled sessions, and how their watches catch up.

A session that stalls moves none of its watches: they stay in step while there are no events for them. The first event
for one of them is returned by the shell: that watch leaves its group and keeps only the revision it needs next. When
the shell reports that everything is written, these watches are replayed from the histories of their sources, several
revisions joined into one response, and are in step again when they have reached the end. Revisions that a history no
longer holds come by a backfill.

Own groups (see `fanout`) that an event left behind are replayed as well, each with one payload for all of its watches.
If the payloads would be large, or come by a backfill, these watches leave the group and lag one by one.

Replaying is done in turns. A turn of a session is bounded in bytes and in events examined (filters may drop all of
them), and serves its watches round robin; the rest follows at the next timer, which is due at once, so that live events
and other sessions are served in between. Events examined are counted over all inputs between two timers: a hundred
creates in one read of a socket are a hundred inputs. A stall ends a turn: the shell returns the deliveries that it has
not started.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import chain, islice
from typing import Final

from coalesce.batch import FRAGMENT, Payload
from coalesce.effects import Deliver
from coalesce.history import EvictionHook, Replayed
from coalesce.model import Backfill, Group, Session, Source, Watch
from coalesce.place import Place
from coalesce.placement import Placement
from coalesce.progress_requests import ProgressRequests
from coalesce.ranges import CoverBranch
from coalesce.state import CoreState

# Maximum payloads cached: sessions that stalled together replay the same ones.
_REMEMBERED_MAX: Final = 8
# The cost of a watch itself, in events examined: placing it, or sending it a cached payload.
WATCH_EVENTS: Final = 10
# The cost of a watch of an own group, which is sent the same payload as the others.
_MEMBER_EVENTS: Final = 2


class Replayer:
    """Handles stalls and undelivered payloads, and replays lagging watches."""

    def __init__(self, state: CoreState, requests: ProgressRequests, placement: Placement) -> None:
        self._state = state
        self._requests = requests
        self._placement = placement
        # Cached replays, by source, branch, position and variant, each with the version of its history.
        self._joined: dict[tuple[Source, CoverBranch[Group] | None, int, int], tuple[int, Replayed]] = {}
        # Events that may be examined until the next timer; slightly below 0 if the last turn exceeded its share.
        self.left_events = state.limits.replay_turn_events_max

    def stalled(self, session: Session) -> None:
        """Send a session nothing more. No effects: it is called while effects are carried out."""
        if session.stalled or session.ended:
            return
        session.stalled = True
        self._state.stats.stalls += 1
        self.forget(session)
        self._state.note_behind(session)

    def returned(self, watch: Watch, payload: Payload) -> None:
        """Take back a payload that was not sent; with events, its watch lags from now on. No effects."""
        if watch.place is Place.ENDED:
            return
        self.stalled(watch.session)
        self._state.stats.returned += 1
        self._state.stats.delivered -= 1
        self._state.stats.delivered_events -= payload.event_count
        if payload.event_count:
            self._placement.set_aside(watch)
            watch.position = min(watch.position, payload.first_revision)

    def drained(self, session: Session, room_bytes: int | None) -> None:
        """All bytes of a session are written: replay its watches. See `Coalescer.drained`."""
        if session.ended:
            return
        session.stalled = False
        self._state.note_behind(session)
        self._state.want_replay(session, room_bytes)
        if session.progress_needs:
            self._requests.want()

    def forget(self, session: Session) -> None:
        """Stop replaying a session, because it has ended or is stalled."""
        state = self._state
        state.to_replay_later.pop(session, None)
        state.to_replay.pop(session, None)
        if not state.to_replay_later and self._joined:
            # No session is left to share the cache.
            self._joined.clear()

    def finish(self) -> None:
        """Give the sessions added by this input their first turn."""
        fresh = tuple(self._state.to_replay)
        self.postpone()
        self._turns(fresh)
        # Placing watches may have added sessions.
        self.postpone()

    def postpone(self) -> None:
        """Postpone the first turn of the sessions added by this input to the next timer."""
        state = self._state
        state.to_replay_later.update(state.to_replay)
        state.to_replay.clear()

    def expire(self) -> None:
        """Give the sessions that are due another turn."""
        self.left_events = self._state.limits.replay_turn_events_max
        self._turns(tuple(self._state.to_replay_later))

    def _turns(self, sessions: tuple[Session, ...]) -> None:
        state = self._state
        due = state.to_replay_later
        budget = state.limits.replay_turn_bytes_max
        for session in sessions:
            if budget <= 0 or self.left_events <= 0:
                return
            if session in due:
                budget -= self._turn(session, due.pop(session))
                if session.has_lagging and not (state.runs and self._waits_for_runs(session)):
                    due[session] = None
        if not due:
            self._joined.clear()

    def _turn(self, session: Session, room_bytes: int | None) -> int:
        """Replay a session's watches up to its share, but at least one; return the bytes sent.

        What exceeds the room stalls the session, and each further watch would be replayed only to be returned.
        """
        limits = self._state.limits
        bytes_max = limits.replay_bytes_max
        if room_bytes is not None and room_bytes < bytes_max:
            bytes_max = room_bytes
        spent = 0
        least = self.left_events - limits.replay_events_max
        count = limits.replay_events_max // WATCH_EVENTS + 1
        first_group = next(iter(session.groups_behind), None)
        for watch in tuple(islice(session.lagging, count)):
            if watch.place is Place.LAGGING:
                if first_group is not None and first_group.behind is not None and first_group.behind < watch.position:
                    # It has waited for longer.
                    break
                if watch.awaits_run:
                    self._register(watch)
                    _move_back(watch)
                    if first_group is not None:
                        # The groups do not wait for the run.
                        break
                else:
                    spent += self._replay(watch)
                self.left_events -= WATCH_EVENTS
            if spent >= bytes_max or self.left_events <= least:
                return spent
        for group in tuple(islice(session.groups_behind, count)):
            before = self.left_events
            spent += self._replay_group(group, session)
            # A group is never split.
            self.left_events = max(self.left_events, before - limits.replay_events_max - WATCH_EVENTS)
            if spent >= bytes_max or self.left_events <= least:
                break
        return spent

    def replay_now(self, watch: Watch) -> None:
        """Send a lagging watch its next response at once, like a live one; its session must not be stalled.

        This uses up the share of turns until the next timer, but is not bounded by it.
        """
        before = self.left_events
        self._replay(watch)
        self.left_events = max(self.left_events, min(before, 0))

    def _replay(self, watch: Watch) -> int:
        """Send a watch its next response and place the watch after it; return the response's bytes."""
        state, placement = self._state, self._placement
        source = watch.source
        if source is None or not source.serves(watch) or watch.position >= source.next_revision:
            placement.unplace(watch)
            if source is not None and source.serves(watch):
                self._settle(watch, source)
            else:
                placement.place((watch,))
            return 0
        payload, following = self._join(source, watch)
        position = source.next_revision if following is None else following
        watch.position = position
        if payload is not None:
            state.effects.append(Deliver(payload, (watch,)))
            state.stats.replays += 1
            state.stats.delivered += 1
            state.stats.delivered_events += payload.event_count
            watch.sent_revision = payload.last_revision
        if position >= source.next_revision or (source is not watch.trunk and watch.trunk.serves(watch)):
            placement.unplace(watch)
            self._settle(watch, source)
        else:
            _move_back(watch)
        return 0 if payload is None else payload.size

    def _replay_group(self, group: Group, session: Session) -> int:
        """Send an own group its next response; return the bytes. Where that is too much, its watches lag one by one."""
        state = self._state
        first = next(iter(group.members))
        source = first.source
        assert source is not None, "in step"
        self.left_events -= WATCH_EVENTS
        if source.serves(first):
            payload, following = self._join(source, first)
            count = len(group.members)
            size = 0 if payload is None else payload.size * count
            if size <= state.limits.replay_bytes_max or count == 1:
                if payload is not None:
                    self.left_events -= count * _MEMBER_EVENTS
                    state.effects.append(Deliver(payload, state.lists.of(group)))
                    state.stats.replays += 1
                    state.stats.delivered += count
                    state.stats.delivered_events += count * payload.event_count
                    group.sent_revision = payload.last_revision
                if following is None or following >= source.next_revision:
                    self._placement.catch_up(group, session)
                else:
                    group.behind = following
                    session.groups_behind[group] = session.groups_behind.pop(group)
                return size
        for watch in tuple(islice(group.members, max(1, self.left_events // WATCH_EVENTS))):
            self.left_events -= WATCH_EVENTS
            self._placement.set_aside(watch)
        return 0

    def _settle(self, watch: Watch, source: Source) -> None:
        """Place an unplaced watch that has caught up with its source, or can be served by its trunk."""
        if not isinstance(source, Backfill) or watch.trunk.serves(watch):
            self._placement.place((watch,))
        else:
            self._placement.resume_live(watch, source)

    def _join(self, source: Source, watch: Watch) -> tuple[Payload | None, int | None]:
        """Join the events that a watch has missed, or reuse the result for another one at the same position."""
        key = (source, watch.branch, watch.next_revision, watch.variant)
        version = source.history.version
        known = self._joined.get(key)
        if known is not None and known[0] == version:
            return known[1].payload, known[1].following
        limits = self._state.limits
        replayed = source.replay(watch, limits)
        # A single revision may have more events, and is never split.
        self.left_events -= min(replayed.looked, limits.replay_events_max)
        if len(self._joined) >= _REMEMBERED_MAX:
            self._joined.clear()
        self._joined[key] = (version, replayed)
        return replayed.payload, replayed.following

    # watches held back until the end of a run

    def break_run(self, source: Source) -> None:
        """Send the pieces of a run now, while the history still holds all of them, and end the run."""
        for watch in self._held(source):
            self.replay_now(watch)
        self._state.end_run(source)

    def hook_eviction(self, source: Source, position: int) -> None:
        """Set a hook at this position: held-back watches get their events before these are evicted."""
        hook = source.history.eviction_hook
        if hook is None or position < hook.first_revision:
            source.history.eviction_hook = EvictionHook(position, partial(self._release, source))

    def _release(self, source: Source, last_revision: int) -> None:
        """Before a history evicts the batch with this last revision, send it to the held-back watches."""
        held = self._held(source)
        if any(watch.position <= last_revision for watch in held):
            self.break_run(source)
        elif held:
            self.hook_eviction(source, min(watch.position for watch in held))

    def _held(self, source: Source) -> list[Watch]:
        """Return the watches that wait for the run of a source and can be sent its pieces now."""
        lagging: Iterable[Watch] = source.watches
        if len(source.watches) > self._state.stats.lagging:
            lagging = chain.from_iterable(session.lagging for session in self._state.lagging_sessions)
        return [
            watch
            for watch in lagging
            if watch.place is Place.LAGGING
            and watch.source is source
            and watch.variant & FRAGMENT
            and not watch.session.stalled
        ]

    def _register(self, watch: Watch) -> None:
        """Register a watch that waits for a run with it."""
        source = watch.source
        assert source is not None, "it waits for the run of its source"
        assert source.run is not None, "it waits for a run"
        source.run.sessions[watch.session] = None
        self.hook_eviction(source, watch.position)

    def _waits_for_runs(self, session: Session) -> bool:
        """Whether all lagging watches of a session wait for runs; if so, the end of the first one replays it."""
        if session.groups_behind or not all(watch.awaits_run for watch in session.lagging):
            return False
        for watch in session.lagging:
            self._register(watch)
        return True


def _move_back(watch: Watch) -> None:
    """Let the other lagging watches of its session be replayed before this one."""
    lagging = watch.session.lagging
    del lagging[watch]
    lagging[watch] = None
