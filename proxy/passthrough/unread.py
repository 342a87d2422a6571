"""Bytes of responses that clients do not read: counted by client connection, bounded for each and for all together.

They occupy memory, and the window of the connection to etcd, which all clients share.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from proxy.listening.calls import ClientHandle
from proxy.passthrough.settings import PassthroughSettings, PassthroughStats

Call = TypeVar("Call")


class KeptBytes(Generic[Call]):
    """Bytes that are kept for the calls of one client connection."""

    __slots__ = ("relays", "size")

    def __init__(self) -> None:
        self.relays: set[Call] = set()
        self.size = 0


class UnreadCall(Protocol):
    """A call whose client may leave its response unread."""

    @property
    def connection(self) -> ClientHandle: ...

    def abort_unread(self) -> None:
        """Reset the call on both sides: too many bytes are unread."""


class UnreadBytes:
    """See the module."""

    def __init__(self, settings: PassthroughSettings, stats: PassthroughStats) -> None:
        self.settings = settings
        self._stats = stats
        self._by_connection: dict[ClientHandle, KeptBytes[UnreadCall]] = {}

    def charge(self, call: UnreadCall, size: int) -> None:
        """Count `size` more bytes that a client has not read; reset calls at a limit."""
        stats = self._stats
        unread = self._by_connection.setdefault(call.connection, KeptBytes())
        unread.relays.add(call)
        unread.size += size
        stats.unread_bytes += size
        if unread.size > self.settings.unread_bytes_per_connection_max:
            stats.refused_at["unread_bytes_per_connection_max"] += 1
            call.abort_unread()
        elif stats.unread_bytes > self.settings.unread_bytes_max:
            worst = max(self._by_connection.values(), key=lambda one: one.size)
            stats.refused_at["unread_bytes_max"] += len(worst.relays)
            for one in tuple(worst.relays):
                one.abort_unread()

    def release(self, call: UnreadCall, size: int) -> None:
        """Stop counting the unread bytes of a call: its client has read them, or the call is over."""
        unread = self._by_connection[call.connection]
        unread.relays.discard(call)
        unread.size -= size
        self._stats.unread_bytes -= size
        if not unread.relays:
            del self._by_connection[call.connection]
