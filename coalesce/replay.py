"""Stalled sessions, and how their watches catch up.

A stalled session costs nothing: its watches leave their groups and keep only the revision they need next. When the
shell reports that everything is written, they are replayed from the histories of their sources, several revisions
joined into one response, and are in step again when they have reached the end. Revisions that a history no longer holds
come by a backfill.

Replaying is done in turns. A turn of a session is bounded in bytes and in events examined (filters may drop all of
them), and serves its watches round robin; the rest follows at the next timer, which is due at once, so that live events
and other sessions are served in between. Events examined are counted over all inputs between two timers: a hundred
creates in one read of a socket are a hundred inputs. A stall ends a turn: the shell returns the deliveries that it has
not started.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

from coalesce.backfill import Backfill
from coalesce.batch import Payload
from coalesce.effects import Deliver
from coalesce.history import Replayed
from coalesce.session import Place, Session, Watch

if TYPE_CHECKING:
    from coalesce.hub import CoreState
    from coalesce.source import Source

# Maximum payloads cached: sessions that stalled together replay the same ones.
_REMEMBERED_MAX: Final = 8
# The cost of a watch itself, in events examined: placing it, or sending it a cached payload.
WATCH_EVENTS: Final = 10


class Replayer:
    """Handles stalls and undelivered payloads, and replays lagging watches."""

    __slots__ = ("_due", "_hub", "_joined", "fresh", "left_events")

    def __init__(self, hub: CoreState) -> None:
        self._hub = hub
        # Sessions to be replayed at the next timer, in turn.
        self._due: dict[Session, None] = {}
        # Sessions added by this input: their first turn is at its end.
        self.fresh: dict[Session, None] = {}
        # Cached replays, by source, position and variant, each with the version of the history it was made from.
        self._joined: dict[tuple[Source, int, int], tuple[int, Replayed]] = {}
        # Events that may be examined until the next timer; slightly below 0 if the last turn exceeded its share.
        self.left_events = hub.limits.replay_turn_events_max

    def stalled(self, session: Session) -> None:
        """Remove the watches of a session from their groups. No effects: it is called while effects are carried out."""
        if session.stalled or session.ended:
            return
        session.stalled = True
        self._hub.stats.stalls += 1
        self.forget(session)
        for watch in session.watches.values():
            if watch.place is not Place.LAGGING:
                self._hub.unplace(watch)
                self._hub.mark_lagging(watch)

    def returned(self, watch: Watch, payload: Payload) -> None:
        """Take back a payload that was not sent. No effects."""
        if watch.place is Place.ENDED:
            return
        self.stalled(watch.session)
        self._hub.stats.returned += 1
        self._hub.stats.delivered -= 1
        self._hub.stats.delivered_events -= payload.event_count
        watch.position = min(watch.position, payload.first_revision)

    def drained(self, session: Session) -> None:
        """All bytes of a session are written: replay its watches."""
        if session.ended:
            return
        session.stalled = False
        self.want(session)
        if session.progress_needs:
            self._hub.progress.want()

    def want(self, session: Session) -> None:
        """Replay a session's lagging watches when this input ends."""
        if session.lagging and not session.stalled and not session.ended:
            self.fresh[session] = None

    def forget(self, session: Session) -> None:
        """Stop replaying a session, because it has ended or is stalled."""
        self._due.pop(session, None)
        self.fresh.pop(session, None)
        if not self._due and self._joined:
            # No session is left to share the cache.
            self._joined.clear()

    def finish(self) -> None:
        """Give the sessions added by this input their first turn."""
        fresh = tuple(self.fresh)
        self.postpone()
        self._turns(fresh)
        # Placing watches may have added sessions.
        self.postpone()

    def postpone(self) -> None:
        """Postpone the first turn of the sessions added by this input to the next timer."""
        self._due.update(self.fresh)
        self.fresh.clear()

    def expire(self) -> None:
        """Give the sessions that are due another turn."""
        self.left_events = self._hub.limits.replay_turn_events_max
        self._turns(tuple(self._due))

    def next_deadline(self) -> float | None:
        """Return `now` if a session is due."""
        return self._hub.now if self._due else None

    def is_due(self, session: Session) -> bool:
        """Whether a session is replayed at the next timer; for checks."""
        return session in self._due

    def _turns(self, sessions: tuple[Session, ...]) -> None:
        budget = self._hub.limits.replay_turn_bytes_max
        runs = self._hub.runs
        for session in sessions:
            if budget <= 0 or self.left_events <= 0:
                return
            if session in self._due:
                del self._due[session]
                budget -= self._turn(session)
                if session.lagging and not (runs.open and runs.hold(session)):
                    self._due[session] = None
        if not self._due:
            self._joined.clear()

    def _turn(self, session: Session) -> int:
        """Replay a session's watches up to its share; return the bytes sent."""
        limits = self._hub.limits
        runs = self._hub.runs
        spent = 0
        least = self.left_events - limits.replay_events_max
        for watch in tuple(islice(session.lagging, limits.replay_events_max // WATCH_EVENTS + 1)):
            if spent >= limits.replay_bytes_max or self.left_events <= least:
                break
            if watch.place is Place.LAGGING:
                self.left_events -= WATCH_EVENTS
                if runs.open and runs.waits(watch):
                    runs.wake_later(watch)
                else:
                    spent += self._replay(watch)
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
        hub = self._hub
        source = watch.source
        if source is None or not source.serves(watch) or watch.position >= source.next_revision:
            hub.unplace(watch)
            if source is not None and source is not watch.trunk and source.serves(watch):
                self._settle(watch, source)
            else:
                hub.place((watch,))
            return 0
        payload, following = self._join(source, watch)
        position = source.next_revision if following is None else following
        watch.position = position
        if payload is not None:
            hub.effects.append(Deliver(payload, (watch,)))
            hub.stats.replays += 1
            hub.stats.delivered += 1
            hub.stats.delivered_events += payload.event_count
            watch.sent_revision = payload.last_revision
        if position >= source.next_revision or (source is not watch.trunk and watch.trunk.serves(watch)):
            hub.unplace(watch)
            self._settle(watch, source)
        else:
            # Behind the others of its session.
            del watch.session.lagging[watch]
            watch.session.lagging[watch] = None
        return 0 if payload is None else payload.size

    def _settle(self, watch: Watch, source: Source) -> None:
        """Place an unplaced watch that has caught up with its source, or can be served by its trunk."""
        hub = self._hub
        if not isinstance(source, Backfill) or watch.trunk.serves(watch):
            hub.place((watch,))
            return
        hub.backfills.resume_live(watch, source)

    def _join(self, source: Source, watch: Watch) -> tuple[Payload | None, int | None]:
        """Join the events that a watch has missed, or reuse the result for another one at the same position."""
        key = (source, watch.position, watch.variant)
        version = source.history.version
        known = self._joined.get(key)
        if known is not None and known[0] == version:
            return known[1].payload, known[1].following
        limits = self._hub.limits
        replayed = source.history.replay(watch.position, watch.variant, limits)
        # A single revision may have more events, and is never split.
        self.left_events -= min(replayed.looked, limits.replay_events_max)
        if len(self._joined) >= _REMEMBERED_MAX:
            self._joined.clear()
        self._joined[key] = (version, replayed)
        return replayed.payload, replayed.following
