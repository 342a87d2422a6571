"""The effects of `WatchState`: each of its inputs returns a list of these, to be carried out in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from proto.scan import Header, WatchResponse

if TYPE_CHECKING:
    from upstream.watching.stream import OpenedWatch, WatchStream


@dataclass(slots=True, eq=False)
class OpenStream:
    """Start the Watch call of a stream."""

    stream: WatchStream


@dataclass(slots=True, eq=False)
class CloseStream:
    """End the Watch call of a stream that carries no watch any more."""

    stream: WatchStream


@dataclass(slots=True, eq=False)
class WriteMessage:
    """Send a message (WatchRequest, without the gRPC prefix) on a stream."""

    stream: WatchStream
    message: bytes


@dataclass(slots=True, eq=False)
class WatchReceived:
    """Whole revisions, `created` (once), a bookmark (no events) or a compaction cancel (which ends it) for a watch."""

    watch: OpenedWatch
    response: WatchResponse


@dataclass(slots=True, eq=False)
class Progressed:
    """These watches, if any, are complete through header.revision, a revision that the server had after the progress
    request with this number was made (0: unknown).
    """

    watches: list[OpenedWatch]
    header: Header
    number: int


@dataclass(slots=True, eq=False)
class WatchLost:
    """A watch has ended for good."""

    watch: OpenedWatch
    status: int
    text: str


@dataclass(slots=True, eq=False)
class TokenRefused:
    """The server refused the token of the proxy's own user; watches wait for `WatchState.logged_in`."""

    token: bytes | None


@dataclass(slots=True, eq=False)
class HeaderSeen:
    """The header of an answer that is not passed on."""

    header: Header


WatchEffect = (
    OpenStream | CloseStream | WriteMessage | WatchReceived | Progressed | WatchLost | TokenRefused | HeaderSeen
)
