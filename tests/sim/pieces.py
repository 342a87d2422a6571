"""Responses that come in pieces, and requests that ask for fragments."""

from __future__ import annotations

from dataclasses import dataclass

from proto.pb import rpc_pb2
from proto.scan import WatchResponse


@dataclass(slots=True, eq=False)
class Pieces:
    """A response that comes in pieces: `upstream.watching.feed.LargeMessage` without bytes."""

    response: WatchResponse
    # The number of events in each piece.
    sizes: list[int]
    unread: int = 0
    readable: bool = True

    @property
    def watch_id(self) -> int:
        """The id of its watch."""
        return self.response.watch_id

    @property
    def done(self) -> bool:
        """Whether its last piece was taken."""
        return not self.sizes

    def step(self) -> WatchResponse:
        """Take the next piece."""
        size = self.sizes.pop(0)
        events, self.response.events = self.response.events[:size], self.response.events[size:]
        return WatchResponse(self.response.header, self.watch_id, fragment=not self.done, events=events)


def in_fragments(message: bytes) -> bytes:
    """Return a request with `fragment` set, if it is a create."""
    request = rpc_pb2.WatchRequest.FromString(message)
    if request.HasField("create_request"):
        request.create_request.fragment = True
    return bytes(request.SerializeToString())
