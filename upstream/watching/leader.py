"""A Watch call without a watch, which etcd ends when it has lost its leader.

etcd ends the streams that sent `hasleader` when its leader is lost, and refuses new ones meanwhile
(server/etcdserver/api/v3rpc/interceptor.go, monitorLeader). The streams of the proxy's watches send it, but without
watches there are no streams, and a client may send it on a stream on which it has not created a watch (yet). One such
call, opened for the first of these clients, serves all of them. At etcd it counts as a stream, not as a watcher.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from proto import etcd_errors
from proto.framing import Status
from proto.http2 import Headers
from upstream.connection import ClientConnection, NotSent, UpstreamCall
from upstream.heads import request_headers
from upstream.unary import HAS_LEADER
from upstream.watching.call import WATCH_PATH

AGAIN_S: Final = 1.0
"""A call that ended for another reason, or got no place, is made again after this time."""


class LeaderCall:
    """See the module; a `CallHandler`. It is open while it is wanted and the server in use has a leader."""

    def __init__(self, pick: Callable[[], ClientConnection | None], lost: Callable[[], None]) -> None:
        """`pick` returns a connection to the server in use, or None; `lost`: the server has lost its leader."""
        self._pick = pick
        self._lost = lost
        self._wanted = False
        # The server in use has a leader.
        self._usable = False
        self._call: UpstreamCall | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        """The call is open."""
        return self._call is not None

    def want(self) -> None:
        """Keep the call open from now on."""
        if not self._wanted:
            self._wanted = True
            self._open()

    def use(self, has_leader: bool) -> None:
        """Use a new server; without a leader it would refuse the call."""
        self._usable = has_leader
        self._open()

    def leave(self) -> None:
        """End the call: the server is no longer in use."""
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
        if status == Status.UNAVAILABLE and message == etcd_errors.NO_LEADER:
            self._usable = False
            self._lost()
        else:
            self._later()
