"""The listener that the watch client notifies: the proxy's engine, or `EtcdWatcher` (`upstream/client.py`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from proto.scan import Header, WatchResponse
from upstream.watching.stream import OpenedWatch

Opened = TypeVar("Opened", bound=OpenedWatch, contravariant=True)


class WatchListener(Protocol[Opened]):
    """The callbacks; `watch` is always the object that was opened."""

    def received(self, watch: Opened, response: WatchResponse) -> None:
        """Whole revisions of events, none of them delivered before; or `created`, once; or a bookmark: no events,
        complete through header.revision; or `canceled` with compact_revision, which ends the watch.
        """

    def progressed(self, watches: Iterable[Opened], header: Header, number: int) -> None:
        """These watches, if any, are complete through header.revision, a revision that the server had after
        `request_progress` was called with this number (0: unknown).
        """

    def lost(self, watch: Opened, status: int, text: str) -> None:
        """The watch has ended for good: refused, cancelled by the server, or unreadable."""

    def no_leader(self) -> None:
        """No endpoint has a leader. Watches continue without one as far as possible."""

    def header_seen(self, header: Header) -> None:
        """The header of an answer that no other callback passes on."""

    def other_history(self, header: Header) -> None:
        """The store was restored from a snapshot or replaced, and is at this revision: what was reported before is no
        longer valid. Usually called before any watch registers there.
        """

    def broken(self) -> None:
        """The connection is lost. Watches resume automatically."""

    def resumed(self) -> None:
        """A connection is open (again), and all watches register on it."""
