"""The connections to one endpoint: as many as the calls need, each replaced when its server closes it in good order.

A server limits each connection: concurrent streams (SETTINGS_MAX_CONCURRENT_STREAMS), stream ids, requests (nginx
closes a connection after 1,000), age (gRPC's maximum connection age). So another connection is opened before the places
for streams run out, up to a limit, and is closed again when it has not been needed for a while.

Some places of each connection are reserved for the proxy's own calls, and these calls may open one connection beyond
the limit: the proxy can always send its own calls to etcd, however many streams clients have open.

A connection that its server closes in good order (GOAWAY with NO_ERROR), or whose stream ids are used up, is *rotated*:
its streams continue until they end, and if it was the last connection, the next one is opened at once, without backoff.
The endpoint is lost when the last connection breaks or cannot be replaced.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Final

from upstream.connection import ClientConnection
from upstream.endpoints import Backoff
from upstream.errors import Logger, Unreachable
from upstream.settings import ConnectionSettings, UpstreamSettings

# Places reserved on each connection: this share (1/8) of them, and at most this many. The proxy's own calls use them.
# Also, a server may count a stream a moment longer than we do, and refuse the next one (grpc-go does).
_KEPT_SHARE: Final = 8
_KEPT_MAX: Final = 8
# Another connection is opened when this share (1/4) of one connection's places is left, or this many, so that the next
# calls do not wait for it.
_AHEAD_SHARE: Final = 4
_AHEAD_MAX: Final = 64
# How long the replacement of the last connection may take before the endpoint counts as lost. Its server has just
# closed the connection in good order: either it accepts another one at once, or it is shutting down and another
# endpoint is needed.
_REPLACE_S: Final = 1.0
# The endpoint counts as lost after this many consecutive connections that closed before they were useful.
_USELESS_MAX: Final = 3


def _kept(places: int) -> int:
    """Return how many places are reserved on a connection that has `places`."""
    return min(max(1, places // _KEPT_SHARE), _KEPT_MAX) if places > 1 else 0


def full_text(what: str, count: int) -> str:
    """Return the problem text for the time that `what` ("calls", "watches") wait for a place on `count` connections."""
    return (
        f"{what} wait for a place at etcd, which allows no more streams on {count} connections; raise "
        "--connections-per-endpoint-max, or the limit of concurrent streams at etcd or the load balancer in front of it"
    )


class Connections:
    """See the module. Starts with one connection; ends with the call of `on_lost`, or by `retire` or `close`."""

    def __init__(
        self,
        first: ClientConnection,
        settings: UpstreamSettings,
        log: Logger,
        *,
        open_another: Callable[[], Awaitable[ClientConnection]],
        on_change: Callable[[], None],
        on_ended: Callable[[ClientConnection, bool], None],
        on_lost: Callable[[Unreachable], None],
    ) -> None:
        """`open_another` connects to the endpoint; it raises Unreachable. `on_change`: calls that wait for a place may
        try again, or `full` has changed. `on_ended`: this connection takes no more calls; True: its server closed it in
        good order. `on_lost`: no connection is left.

        `on_lost` may be called before this returns, if `first` has ended already.
        """
        self.endpoint = first.endpoint
        # Calls have waited for a place for a while, although all allowed connections are open.
        self.full = False
        self._settings = settings
        self._log = log
        self._open_another = open_another
        self._on_change = on_change
        self._on_ended = on_ended
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        # Connections that take calls, oldest first; and those that take no more but still have open calls.
        self._open: list[ClientConnection] = []
        self._leaving: list[ClientConnection] = []
        self._opening: asyncio.Task[None] | None = None
        self._backoff = Backoff(settings.backoff_first_s, settings.backoff_max_s)
        # The number of connections last logged; logged again when it doubles.
        self._logged_count = 1
        # Consecutive connections that closed before they were useful.
        self._useless = 0
        # The next attempt after a failure.
        self._retry: asyncio.TimerHandle | None = None
        # A call got no place and waits for `on_change`; and the timer that reports the wait.
        self._wanted = False
        self._report: asyncio.TimerHandle | None = None
        self._change: asyncio.Handle | None = None
        # The last stream id of each connection at the last check for idle ones.
        self._seen: dict[ClientConnection, int] = {}
        self._trim: asyncio.TimerHandle | None = None
        self._over = False
        self._add(first)

    def __iter__(self) -> Iterator[ClientConnection]:
        """All connections, including those that take no more calls."""
        yield from self._open
        yield from self._leaving

    @property
    def count(self) -> int:
        """The number of connections that take calls."""
        return len(self._open)

    @property
    def alive(self) -> bool:
        """Calls can be made, now or once the next connection is open."""
        return self._opening is not None or any(connection.healthy for connection in self._open)

    @property
    def open_calls(self) -> int:
        """The number of calls open on all connections."""
        return sum(connection.open_calls for connection in self)

    def owes_answer(self, now: float) -> bool:
        """Whether the server may hang; see `answer_due`."""
        return any(connection.owes_answer(now) for connection in self._open)

    def pick(self, own: bool = False) -> ClientConnection | None:
        """Return a connection with a place for a call; None when there is none now: `on_change` is called when it is
        worth trying again. `own`: the call is the proxy's own.
        """
        if self._open and (connection := self._open[0]).room > _AHEAD_MAX and not self.full and self._report is None:
            # The usual case: the server sets no limit, or it is far from reached.
            return connection
        places = self._open[0].http2.peer_max_streams if self._open else 0
        kept = 0 if own else _kept(places)
        chosen: ClientConnection | None = None
        free = 0
        for connection in self._open:
            room = connection.room - kept
            if room > 0:
                free += room
                chosen = chosen or connection
        if places and free <= min(places // _AHEAD_SHARE, _AHEAD_MAX):
            self._grow(own)
        if chosen is not None:
            if not own and (self.full or self._report is not None):
                self._found()
            return chosen
        self._want()
        return None

    def retire(self, reason: Unreachable) -> None:
        """Take no more calls; each connection closes when its last call has ended."""
        self._stop()
        for connection in self._open:
            connection.on_closed = connection.on_room = None
            connection.retire(reason)
        self._leaving += self._open
        self._open.clear()

    def close(self) -> None:
        """Close all connections now. No callback follows."""
        self._stop()
        for connection in [*self._open, *self._leaving]:
            connection.on_closed = connection.on_room = None
            connection.close()
        self._open.clear()
        self._leaving.clear()

    # Inside.

    def _add(self, connection: ClientConnection) -> None:
        self._open.append(connection)
        now = self._loop.time()
        self._backoff.succeeded(now)
        connection.opened_at = now
        if not connection.healthy:
            self._closed(connection)
            return
        connection.on_closed = self._closed
        connection.on_room = self._report_room if self._wanted else None
        if len(self._open) > 1 and self._trim is None:
            self._trim = self._loop.call_later(self._settings.surplus_idle_s, self._close_idle)

    def _grow(self, own: bool) -> None:
        """Open another connection, unless one is being opened or the limit is reached."""
        limit = self._settings.connections_per_endpoint_max + own
        if self._opening is None and self._retry is None and len(self._open) < limit and not self._over:
            self._opening = self._loop.create_task(self._open_one(), name=f"connect {self.endpoint.text}")

    async def _open_one(self) -> None:
        try:
            async with asyncio.timeout(None if self._open else _REPLACE_S):
                connection = await self._open_another()
        except (Unreachable, TimeoutError) as error:
            self._opening = None
            if isinstance(error, TimeoutError):
                error = Unreachable(self.endpoint.text, "no new connection in time", "check that etcd is up")
            if not self._open:
                self._lose(error)
                return
            self._log.warning("cannot open another connection to etcd", endpoint=self.endpoint.text, problem=str(error))
            delay_s = max(self._backoff.failed(self._loop.time()), self._settings.backoff_first_s)
            self._retry = self._loop.call_later(delay_s, self._try_again)
        else:
            self._opening = None
            self._add(connection)
            if len(self._open) >= 2 * self._logged_count:
                self._logged_count = len(self._open)
                self._log.info("more connections to etcd", endpoint=self.endpoint.text, connections=self._logged_count)
            self._report_room()

    def _try_again(self) -> None:
        self._retry = None
        self._report_room()

    def _closed(self, connection: ClientConnection) -> None:
        """Handle a connection that takes no more calls."""
        self._open.remove(connection)
        self._seen.pop(connection, None)
        connection.on_room = None
        self._leaving = [each for each in self._leaving if each.open_calls]
        if connection.open_calls:
            self._leaving.append(connection)
        # A server that answers only the first call of each connection, even if it closes them in good order, must not
        # be connected to again and again without a pause.
        age_s = self._loop.time() - connection.opened_at
        useful = connection.answered > 1 or age_s >= self._settings.backoff_max_s
        self._useless = 0 if useful else self._useless + 1
        rotated = connection.ended_well and self._useless < _USELESS_MAX
        self._on_ended(connection, rotated)
        if self._over or self._open or self._opening is not None:
            return
        if rotated:
            if self._retry is not None:
                self._retry.cancel()
                self._retry = None
            self._grow(True)
        else:
            self._lose(connection.failure)

    def _lose(self, failure: Unreachable | None) -> None:
        self._stop()
        self._on_lost(failure or Unreachable(self.endpoint.text, "the connection was closed", "try again"))

    def _stop(self) -> None:
        self._over = True
        if self._opening is not None and self._opening is not asyncio.current_task():
            self._opening.cancel()
        for timer in (self._retry, self._report, self._trim, self._change):
            if timer is not None:
                timer.cancel()
        self._opening = self._retry = self._report = self._trim = self._change = None

    # Waiting for a place.

    def _want(self) -> None:
        """Have `on_change` called when a place is free again."""
        if self._wanted or self._over:
            return
        self._wanted = True
        for connection in self._open:
            connection.on_room = self._report_room
        if self._report is None and not self.full:
            self._report = self._loop.call_later(self._settings.place_wait_s, self._set_full, True)

    def _found(self) -> None:
        """A call got a place: stop the report, and reset `full`."""
        if self._report is not None:
            self._report.cancel()
        self._report = None
        if self.full:
            self._set_full(False)

    def _report_room(self) -> None:
        """Schedule `on_change`: not at once, since the cause of the change is still being handled."""
        if self._change is None and not self._over:
            self._change = self._loop.call_soon(self._report_room_now)

    def _report_room_now(self) -> None:
        self._change = None
        self._wanted = False
        for connection in self._open:
            connection.on_room = None
        if self.full:
            self.pick()
        self._on_change()

    def _set_full(self, full: bool) -> None:
        self._report = None
        self.full = full
        log = self._log.warning if full else self._log.info
        event = "etcd allows no more streams; calls or watches wait" if full else "etcd allows more streams again"
        log(event, endpoint=self.endpoint.text, connections=len(self._open), calls=self.open_calls)
        self._report_room()

    # Closing surplus connections.

    def _close_idle(self) -> None:
        """Close connections that had no call for a while, as long as enough places are left."""
        self._trim = None
        seen = {connection: connection.http2.last_stream_id for connection in self._open}
        for connection in self._open[:0:-1]:
            idle = not connection.open_calls and self._seen.get(connection) == seen[connection]
            others = sum(each.room for each in self._open if each is not connection and each.room > 0)
            if idle and others > 2 * min(connection.http2.peer_max_streams // _AHEAD_SHARE, _AHEAD_MAX):
                self._open.remove(connection)
                connection.on_closed = connection.on_room = None
                connection.close()
        self._seen = {connection: seen[connection] for connection in self._open}
        if len(self._open) > 1:
            self._trim = self._loop.call_later(self._settings.surplus_idle_s, self._close_idle)


def settings_after(connection: ClientConnection, settings: ConnectionSettings) -> ConnectionSettings:
    """Return the settings for the next connection: with fewer PINGs if the server refused ours (too_many_pings)."""
    if not connection.pinged_too_often:
        return settings
    # As gRPC's keep-alive specification (gRFC A8) requires.
    return replace(settings, keepalive_s=2 * settings.keepalive_s)
