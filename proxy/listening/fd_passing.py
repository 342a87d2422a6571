"""Connections that one process accepts and another one serves: they are passed over a socket pair (SCM_RIGHTS)."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Final

from proxy.listening.sockets import Listening

TOGETHER_MAX: Final = 64
"""Connections in one message; the kernel's limit is 253 (SCM_MAX_FD)."""


class ConnectionChannel(Listening):
    """What a process has instead of listening sockets, if another one accepts its connections."""

    def __init__(self, channel: socket.socket, port: int) -> None:
        """`channel`: from `channel_pair`; `port`: that of the listening sockets, 0 for a unix socket."""
        super().__init__([channel])
        self._port = port

    @property
    def port(self) -> int:
        """See `Listening`."""
        return self._port


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends over which connections are passed: for the process that accepts, and for the other one."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
    return ends


def send_connections(channel: socket.socket, connections: Sequence[socket.socket]) -> bool:
    """Pass at most TOGETHER_MAX connections on, and close them here. False: the other process takes none at present."""
    try:
        socket.send_fds(channel, [bytes(len(connections))], [each.fileno() for each in connections])
    except OSError:
        # It has ended, or has not taken what was passed before: the socket or the kernel's limit of such files is full.
        return False
    for each in connections:
        each.close()
    return True


class ConnectionReceiver:
    """Takes the connections that another process accepts; create it in the running event loop."""

    def __init__(
        self,
        channel: ConnectionChannel,
        connection: Callable[[], asyncio.Protocol],
        shake: Callable[[socket.socket, object], None] | None,
    ) -> None:
        """`connection` makes the protocol of one. `shake`: gets each socket and its peer's address instead, for TLS."""
        self.taken = 0
        """Connections taken since the start, those included that the kernel dropped for want of a descriptor."""
        self._channel = channel.sockets[0]
        self._connection = connection
        self._shake = shake
        self._loop = asyncio.get_running_loop()
        self._beginning: set[asyncio.Task[object]] = set()
        self._loop.add_reader(self._channel, self._readable)

    def close(self) -> None:
        """Take no more. May be called again."""
        if self._channel.fileno() >= 0:
            self._loop.remove_reader(self._channel)
            self._channel.close()

    def _readable(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._channel, TOGETHER_MAX, TOGETHER_MAX)
        except BlockingIOError:
            return
        if not data:
            # The other process has ended.
            self.close()
            return
        self.taken += len(data)
        for descriptor in descriptors:
            accepted = socket.socket(fileno=descriptor)
            accepted.setblocking(False)
            if self._shake is not None:
                self._shake(accepted, _peer(accepted))
                continue
            task = self._loop.create_task(self._begin(accepted))
            self._beginning.add(task)
            task.add_done_callback(self._beginning.discard)

    async def _begin(self, accepted: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._connection, accepted)
        except OSError:
            # The client has closed it already.
            accepted.close()


def _peer(connection: socket.socket) -> object:
    try:
        return connection.getpeername()
    except OSError:
        return ""
