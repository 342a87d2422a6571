"""
The connections to one endpoint: as many as the calls on them need, each replaced when its server ends it in good order.

A server counts per connection: the streams that are open at a time (SETTINGS_MAX_CONCURRENT_STREAMS), stream ids,
requests (nginx ends a connection after 1,000), age (a maximum connection age of gRPC). So another connection is opened
before the places for streams run out, up to a limit, and is closed again when it has not been needed for a while.

Some places of each are kept for the proxy's own calls, and these may open one connection beyond the limit: whatever
clients have open, the proxy can ask etcd something.

A connection that its server ends in good order (GOAWAY with NO_ERROR), or whose stream ids are used up, is *rotated*:
the streams on it go on until they end, and if it was the last one, the next one is opened at once, without backoff.
The endpoint is lost when the last connection breaks, or cannot be replaced.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from upstream.connection import ClientConnection
from upstream.endpoints import Backoff
from upstream.errors import Logger, Unreachable
from upstream.settings import UpstreamSettings

# Places that are kept on each connection: this part of them, and at most so many. The proxy's own calls use them; and a
# server may count a stream a moment longer than we do, and refuse the one that takes its place (grpc-go does).
_KEPT_SHARE: Final = 8
_KEPT_MAX: Final = 8
# Another connection is opened when this part of one connection's places is left, or so many: the next calls find it
# ready.
_AHEAD_SHARE: Final = 4
_AHEAD_MAX: Final = 64
# How long the replacement of the last connection may take before the endpoint counts as lost. Its server has just said
# goodbye in good order, so it is either there at once, or it is being stopped and another endpoint is wanted.
_REPLACE_S: Final = 1.0
# Connections in a row that end before they were of use, from which on the endpoint counts as lost.
_USELESS_MAX: Final = 3


def _kept(places: int) -> int:
    """Return how many places are kept on a connection that has `places`."""
    return min(max(1, places // _KEPT_SHARE), _KEPT_MAX) if places > 1 else 0


def full_text(what: str, count: int) -> str:
    """Return what to say, for people, while `what` waits for a place on `count` connections."""
    return (
        f"{what} wait for a place at etcd, which allows no more streams on {count} connections; raise "
        "--connections-per-endpoint-max, or the limit of concurrent streams at etcd or what stands in front of it"
    )


class Connections:
    """See the module. Begins with one connection, and is over when `on_lost` was called, or after `close`."""

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
        """
        `open_another` connects to the endpoint; it raises Unreachable. `on_change`: calls that wait for a place may try
        again, or `full` has changed. `on_ended`: this one takes no calls any more; True: its server ended it in good
        order. `on_lost`: there is none left.

        `on_lost` may be called before this returns, when `first` has ended already.
        """
        self.endpoint = first.endpoint
        # No place has been found for a while, although all connections that are allowed are open.
        self.full = False
        self._settings = settings
        self._log = log
        self._open_another = open_another
        self._on_change = on_change
        self._on_ended = on_ended
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        # Those that take calls, oldest first; and those that do not any more and still have some.
        self._open: list[ClientConnection] = []
        self._leaving: list[ClientConnection] = []
        self._opening: asyncio.Task[None] | None = None
        self._backoff = Backoff(settings.backoff_first_s, settings.backoff_max_s)
        # How many connections the log knows of: it is told when they double.
        self._said = 1
        # Connections in a row that ended in good order before they were of use.
        self._useless = 0
        # After a failure: the next try.
        self._retry: asyncio.TimerHandle | None = None
        # Somebody was not given a place and wants to be told of one; since when, and when that is reported.
        self._wanted = False
        self._report: asyncio.TimerHandle | None = None
        self._change: asyncio.Handle | None = None
        # The last stream id of each connection when idle ones were last looked for.
        self._seen: dict[ClientConnection, int] = {}
        self._trim: asyncio.TimerHandle | None = None
        self._over = False
        self._add(first)

    def __iter__(self) -> Iterator[ClientConnection]:
        """All connections, those that are leaving included."""
        yield from self._open
        yield from self._leaving

    @property
    def count(self) -> int:
        """Connections that take calls."""
        return len(self._open)

    @property
    def alive(self) -> bool:
        """Calls can be made, now or when the next connection is there."""
        return self._opening is not None or any(connection.healthy for connection in self._open)

    @property
    def open_calls(self) -> int:
        """Calls open on all of them."""
        return sum(connection.open_calls for connection in self)

    def owes_answer(self, now: float) -> bool:
        """The server at the other end may hang; see `owing`."""
        return any(connection.owing.owes(now) for connection in self._open)

    def pick(self, own: bool = False) -> ClientConnection | None:
        """
        Return a connection with a place for a call; None when there is none now, then `on_change` tells when to ask
        again. `own`: the call is the proxy's own.
        """
        if self._open and (connection := self._open[0]).room > _AHEAD_MAX and not self.full and self._report is None:
            # As it mostly is: the server sets no limit, or one that is far away.
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
        """Close all connections now. Nothing is told any more."""
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
        connection.on_room = self._tell if self._wanted else None
        if len(self._open) > 1 and self._trim is None:
            self._trim = self._loop.call_later(self._settings.surplus_idle_s, self._close_idle)

    def _grow(self, own: bool) -> None:
        """Open another connection, if that is allowed and is not being done."""
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
            self._log.warning("upstream_no_more_connections", endpoint=self.endpoint.text, problem=str(error))
            delay_s = max(self._backoff.failed(self._loop.time()), self._settings.backoff_first_s)
            self._retry = self._loop.call_later(delay_s, self._try_again)
        else:
            self._opening = None
            self._add(connection)
            if len(self._open) >= 2 * self._said:
                self._said = len(self._open)
                self._log.info("upstream_connections", endpoint=self.endpoint.text, connections=self._said)
            self._tell()

    def _try_again(self) -> None:
        self._retry = None
        self._tell()

    def _closed(self, connection: ClientConnection) -> None:
        """A connection takes no calls any more."""
        self._open.remove(connection)
        self._seen.pop(connection, None)
        connection.on_room = None
        self._leaving = [each for each in self._leaving if each.open_calls]
        if connection.open_calls:
            self._leaving.append(connection)
        # A server that answers nothing but the first question of each connection, however politely it ends them, is not
        # one to be asked again and again without a pause.
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

    # Who waits for a place.

    def _want(self) -> None:
        """Have it told when there is room again."""
        if self._wanted or self._over:
            return
        self._wanted = True
        for connection in self._open:
            connection.on_room = self._tell
        if self._report is None and not self.full:
            self._report = self._loop.call_later(self._settings.place_wait_s, self._set_full, True)

    def _found(self) -> None:
        """A place was given away: it is not full."""
        if self._report is not None:
            self._report.cancel()
        self._report = None
        if self.full:
            self._set_full(False)

    def _tell(self) -> None:
        """Say that something has changed, a moment later: the cause of the change is still being handled."""
        if self._change is None and not self._over:
            self._change = self._loop.call_soon(self._tell_now)

    def _tell_now(self) -> None:
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
        event = "upstream_full" if full else "upstream_has_room"
        log(event, endpoint=self.endpoint.text, connections=len(self._open), calls=self.open_calls)
        self._tell()

    # What is not needed.

    def _close_idle(self) -> None:
        """Close connections that have had no call for a while, as long as enough places are left."""
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
