"""When the bytes that a client reads arrived at its machine, by the kernel (SO_TIMESTAMPNS, socket(7)).

A load generator reads its connections one after the other: with 500 of them, the last one is read milliseconds after
its event has arrived. That time is not the server's, so a delay ends when the bytes are in the client's socket.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
import time
from collections.abc import Callable

SO_TIMESTAMPNS = 35
"""Linux; the module `socket` does not name it."""
READ_BYTES = 1 << 18
"""The most of one read, as in uvloop."""
READS_PER_TURN = 256
_ANCILLARY_BYTES = socket.CMSG_SPACE(16)
_seconds_and_ns = struct.Struct("qq").unpack_from

Received = Callable[[bytes, int, int], None]
"""Gets the bytes of a read, the time when the last of them arrived, and the time now (ns, monotonic)."""


class Arrivals:
    """Reads connections instead of their transports, which still write.

    All connections share one epoll, which is a single reader of the event loop: a reader for each takes 3 us more.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._read_all)
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._open: dict[int, tuple[socket.socket, asyncio.Transport, Received]] = {}

    def read(self, transport: asyncio.Transport, received: Received) -> int:
        """Read a connection from now on; return its number."""
        transport.pause_reading()
        # A descriptor of its own, since the transport may close the other one at any time.
        own = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        own.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        number = own.fileno()
        self._open[number] = own, transport, received
        self._epoll.register(number, select.EPOLLIN)
        return number

    def pause(self, number: int) -> None:
        """Stop reading a connection for a while."""
        if number in self._open:
            self._epoll.modify(number, 0)

    def resume(self, number: int) -> None:
        """Read it again."""
        if number in self._open:
            self._epoll.modify(number, select.EPOLLIN)

    def close(self, number: int) -> None:
        """Stop reading it for good."""
        if found := self._open.pop(number, None):
            self._epoll.unregister(number)
            found[0].close()

    def _read_all(self) -> None:
        for number, _ in self._epoll.poll(0, READS_PER_TURN):
            if found := self._open.get(number):
                self._read(number, *found)

    def _read(self, number: int, own: socket.socket, transport: asyncio.Transport, received: Received) -> None:
        try:
            size, ancillary, _, _ = own.recvmsg_into((self._buffer,), _ANCILLARY_BYTES)
        except BlockingIOError:
            return
        except OSError:
            size = 0
        if not size:
            self.close(number)
            transport.abort()
            return
        now = arrived = time.monotonic_ns()
        if ancillary:
            seconds, rest_ns = _seconds_and_ns(ancillary[0][2])
            # The kernel stamps by the wall clock: only the age is used.
            arrived -= max(0, time.time_ns() - seconds * 1_000_000_000 - rest_ns)
        received(bytes(self._buffer[:size]), arrived, now)
