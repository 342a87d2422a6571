"""The effects of `WatchState`: each of its inputs returns a list of these, to be carried out in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proto.scan import Header, WatchResponse

if TYPE_CHECKING:
    from upstream.watching.stream import OpenedWatch, WatchStream


class OpenStream:
    """Start the Watch call of a stream."""

    __slots__ = ("stream",)

    def __init__(self, stream: WatchStream) -> None:
        self.stream = stream


class CloseStream:
    """End the Watch call of a stream that carries no watch any more."""

    __slots__ = ("stream",)

    def __init__(self, stream: WatchStream) -> None:
        self.stream = stream


class Write:
    """Send a message (WatchRequest, without the gRPC prefix) on a stream."""

    __slots__ = ("message", "stream")

    def __init__(self, stream: WatchStream, message: bytes) -> None:
        self.stream = stream
        self.message = message


class WatchReceived:
    """Whole revisions, `created` (once), a bookmark (no events) or a compaction cancel (which ends it) for a watch."""

    __slots__ = ("response", "watch")

    def __init__(self, watch: OpenedWatch, response: WatchResponse) -> None:
        self.watch = watch
        self.response = response


class Progressed:
    """
    These watches, if any, are complete through header.revision, a revision that the server had after the progress
    request with this number was made (0: unknown).
    """

    __slots__ = ("header", "number", "watches")

    def __init__(self, watches: list[OpenedWatch], header: Header, number: int) -> None:
        self.watches = watches
        self.header = header
        self.number = number


class WatchLost:
    """A watch has ended for good."""

    __slots__ = ("status", "text", "watch")

    def __init__(self, watch: OpenedWatch, status: int, text: str) -> None:
        self.watch = watch
        self.status = status
        self.text = text


class TokenRefused:
    """The server refused the token of the proxy's own user; watches wait for `WatchState.logged_in`."""

    __slots__ = ("token",)

    def __init__(self, token: bytes | None) -> None:
        self.token = token


class HeaderSeen:
    """The header of an answer that is not passed on."""

    __slots__ = ("header",)

    def __init__(self, header: Header) -> None:
        self.header = header


WatchEffect = OpenStream | CloseStream | Write | WatchReceived | Progressed | WatchLost | TokenRefused | HeaderSeen
