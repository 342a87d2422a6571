"""Delivery: payloads and control answers of the core are written to the outlets of sessions.

A payload of a read that brought nothing else is written at once (`deliver_alone`). Any other is queued on the
connections of its watches (`deliver`) and written at the end of the read or of the turn: watch by watch, or for a large
group connection by connection, where the only code that runs once per watch and event is the loop in
`SendSide.send_each`. The bytes are shared in all cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from coalesce.batch import Payload
from coalesce.effects import Deliver, Effect, Send
from coalesce.model import Session, Watch
from proxy.watch.outlets import DeliveryPlan, Outlet, Output, on_distinct_connections, plan_of

BULKY_BYTES = 8 * 1024
"""Payloads of at least this size are not copied for each stream."""

TURN_BYTES = 1024 * 1024
"""Each time this much has been queued, it may be written in the middle of a turn: one read from etcd may contain
hundreds of events for thousands of watches, which would all be in memory before the first byte is written."""

ALONE_MAX = 512
"""Watches of a payload that is written at once: 10 ms of writes. One for more is queued, and written in parts."""


class BackPressure(Protocol):
    """The part of `coalesce.core.Coalescer` that takes reports of what clients do not read."""

    def stalled(self, session: Session) -> None: ...
    def undelivered(self, watch: Watch, payload: Payload) -> None: ...


@dataclass(slots=True)
class DeliveryStats:
    """Counts since the start, of what is delivered."""

    delivered_bytes: int = 0
    coalesced: int = 0
    """Payloads that etcd did not have to send, because it had already sent them for another stream."""


class Delivery:
    """Carries out the effects that write to clients."""

    def __init__(self, core: BackPressure, output: Output) -> None:
        self.core = core
        """The core that the sessions belong to; the engine sets another one when it failed."""

        self.stats = DeliveryStats()
        self.received_at = 0.0
        """When the events of this input were received (time.perf_counter), if delays are measured; otherwise 0."""

        self._output = output

    def deliver(self, effect: Deliver) -> None:
        """Queue one payload for its watches."""
        payload, watches = effect.payload, effect.watches
        count = len(watches)
        plan = plan_of(watches)
        many = count > self._output.part
        if plan is None:
            sent = self._deliver_each(payload, watches, many)
        else:
            sent = self._deliver_planned(payload, plan, many)
        stats, output = self.stats, self._output
        stats.coalesced += count - 1
        stats.delivered_bytes += sent
        if not output.since:
            output.since = self.received_at
        output.queued_bytes += sent
        if output.queued_bytes >= TURN_BYTES:
            output.relieve()

    def deliver_alone(self, effect: Effect) -> bool:
        """Deliver the only effect of a read, if it is a small payload for watches on different connections.

        Nothing else is to be joined with it, so it is written at once, or queued where output already waits. Returns
        False, having done nothing, for any other effect.
        """
        if type(effect) is not Deliver:
            return False
        payload, watches = effect.payload, effect.watches
        count = len(watches)
        if payload.size > BULKY_BYTES or not payload.event_count or count > ALONE_MAX:
            return False
        if count > 1 and not on_distinct_connections(watches):
            return False
        watch_id = watches[0].watch_id
        message = payload.message(watch_id)
        if message is None:
            return False
        size = len(message)
        stats = self.stats
        stats.coalesced += count - 1
        for watch in watches:
            outlet: Outlet = watch.outlet
            if watch.watch_id != watch_id:
                watch_id = watch.watch_id
                message = payload.message(watch_id) or b""
                size = len(message)
            if not outlet.stalled and outlet.connection.write_now(outlet.stream, message, size):
                stats.delivered_bytes += size
            else:
                self.deliver(Deliver(payload, (watch,)))
        on_written = self._output.on_written
        if on_written is not None:
            on_written(self.received_at)
        return True

    def send(self, effect: Send) -> None:
        """Write control answers to their session."""
        outlet: Outlet = effect.session.outlet
        if not outlet.send(effect.messages) and not outlet.stalled:
            self._stall(effect.session, outlet)

    def _deliver_each(self, payload: Payload, watches: Sequence[Watch], many: bool) -> int:
        """Queue a payload for watches one by one; return the number of bytes."""
        pieces_of = payload.pieces
        sent = 0
        size = 0
        pieces: Sequence[bytes] = ()
        watch_id: int | None = None
        for watch in watches:
            outlet: Outlet = watch.outlet
            if outlet.stalled:
                # The core moves no watch when a session stalls, but each one at the first event that it returns.
                self.core.undelivered(watch, payload)
                continue
            connection = outlet.connection
            if not connection.dirty:
                connection.schedule_flush(many)
            if watch.watch_id != watch_id:
                # Most clients have one watch per stream, with the id 0: then this is done once.
                watch_id = watch.watch_id
                pieces = pieces_of(watch_id)
                size = len(pieces[0]) if len(pieces) == 1 else sum(map(len, pieces))
            sent += size
            if size > BULKY_BYTES:
                connection.bulky = True
            if not connection.h2.send(outlet.stream, pieces, size):
                self._stall(watch.session, outlet)
        return sent

    def _deliver_planned(self, payload: Payload, plan: DeliveryPlan, many: bool) -> int:
        """Queue a payload connection by connection; the hot loop is inside `send_each`."""
        sent = self._deliver_each(payload, plan.apart, many)
        for run in plan.runs:
            columns = payload.columns(run.ids)
            size = len(columns[0][0]) if len(columns) == 1 else sum(len(column[0]) for column in columns)
            connection = run.connection
            if not connection.dirty:
                connection.schedule_flush(many)
            if size > BULKY_BYTES:
                connection.bulky = True
            left = connection.h2.send_each(run.together, columns, size)
            sent += size * (len(run.watches) - len(left))
            if left:
                sent += self._deliver_each(payload, [run.watches[place] for place in left], many)
        return sent

    def _stall(self, session: Session, outlet: Outlet) -> None:
        """The stream of a session has taken only a part of a message: nothing more is delivered to it for now."""
        outlet.stalled = True
        self.core.stalled(session)
