"""
A Watch call without a watch, by which etcd says that it has lost its leader.

Etcd ends the streams that sent `hasleader` when its leader is lost, and refuses new ones meanwhile
(server/etcdserver/api/v3rpc/interceptor.go, monitorLeader). The streams of our watches send it, but without watches
there are none, and a client may send it on a stream on which it has not created a watch (yet). One such call, from the
first of these clients on, says it for all. To etcd it is a stream, and not a watcher.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from proto.framing import Status
from proto.http2 import Headers
from upstream.connection import ClientConnection, NotSent, UpstreamCall
from upstream.errors import NO_LEADER_TEXT
from upstream.heads import request_headers
from upstream.unary import HAS_LEADER
from upstream.watching.call import WATCH_PATH

AGAIN_S: Final = 1.0
"""A call that ended for another reason, or found no place, is made again after this."""


class LeaderCall:
    """See the module; a `CallHandler`. It is open whenever that is wanted and a server is in use that has a leader."""

    def __init__(self, pick: Callable[[], ClientConnection | None], lost: Callable[[], None]) -> None:
        """`pick` returns a connection to the server in use, None while there is none; `lost`: its leader is."""
        self._pick = pick
        self._lost = lost
        self._wanted = False
        # A server is in use that has a leader.
        self._usable = False
        self._call: UpstreamCall | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        """There is a call now."""
        return self._call is not None

    def want(self) -> None:
        """Have it from now on."""
        if not self._wanted:
            self._wanted = True
            self._open()

    def use(self, has_leader: bool) -> None:
        """There is a server; without a leader it would refuse the call."""
        self._usable = has_leader
        self._open()

    def leave(self) -> None:
        """The server is not used any more."""
        self._usable = False
        call, self._call = self._call, None
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        if call is not None and not call.ended:
            call.reset()

    def _open(self) -> None:
        self._timer = None
        if not self._wanted or not self._usable or self._call is not None:
            return
        connection = self._pick()
        if connection is not None:
            try:
                self._call = connection.request(request_headers(connection, WATCH_PATH, [HAS_LEADER]), self)
                return
            except NotSent:
                pass
        self._later()

    def _later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(AGAIN_S, self._open)

    def on_headers(self, headers: Headers) -> None:
        pass

    def on_data(self, data: bytes, flow_size: int) -> None:  # noqa: ARG002 - CallHandler's signature
        if self._call is not None:
            self._call.consumed(flow_size)

    def on_drained(self) -> None:
        pass

    def on_end(self, status: int, message: str, trailers: Headers) -> None:  # noqa: ARG002 - CallHandler's signature
        self._call = None
        if not self._usable:
            return
        if status == Status.UNAVAILABLE and message == NO_LEADER_TEXT:
            self._usable = False
            self._lost()
        else:
            self._later()
