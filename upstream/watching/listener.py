"""Who the watch client tells what etcd says: the proxy's engine, or a watcher of one program (`client.py`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from proto.scan import Header, WatchResponse
from upstream.watching.stream import OpenedWatch


class WatchListener(Protocol):
    """Who is told; `watch` is always the object that was opened."""

    def received(self, watch: OpenedWatch, response: WatchResponse) -> None:
        """
        Whole revisions of events, none seen before; or `created`, once; or a bookmark: no events, complete through
        header.revision; or `canceled` with compact_revision: then the watch is over.
        """

    def progressed(self, watches: Iterable[OpenedWatch], header: Header, number: int) -> None:
        """
        All of these, if any, are complete through header.revision, which the server had after `request_progress` was
        called with this number (0: nobody knows).
        """

    def lost(self, watch: OpenedWatch, status: int, text: str) -> None:
        """The watch is over for good: refused, cancelled by the server, or unreadable."""

    def no_leader(self) -> None:
        """No endpoint has a leader. Watches go on as well as they can."""

    def header_seen(self, header: Header) -> None:
        """The header of an answer that is not passed on otherwise."""

    def other_history(self, header: Header) -> None:
        """
        The store was restored from a snapshot, or is another one, and is at this revision: what was told before is not
        true any more. Mostly said before anything is registered there.
        """

    def broken(self) -> None:
        """The connection is lost. Watches resume by themselves."""

    def resumed(self) -> None:
        """There is a connection (again), and all watches are being registered on it."""
