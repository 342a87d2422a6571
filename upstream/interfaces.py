"""What a connection to etcd calls: the handler of each of its calls, and the output to the clients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from proto.http2 import Headers


class CallHandler(Protocol):
    """Callbacks of a call on an upstream connection; made from the event loop, never from inside `request`."""

    def on_headers(self, headers: Headers) -> None:
        """The response's headers arrived. Not called for a trailers-only response."""

    def on_data(self, data: bytes, flow_size: int) -> None:
        """Bytes of the body arrived. The handler must pass `flow_size` to `UpstreamCall.consumed`, now or later."""

    def on_drained(self) -> None:
        """After `write` returned False: all output was handed to the transport."""

    def on_end(self, status: int, message: str, trailers: Headers) -> None:
        """The call has ended; no callback follows. Not called after `UpstreamCall.reset`.

        `trailers` are those of the server, which the status was read from. They are [] when the stream was reset
        (`UpstreamCall.reset_code`) or the connection broke: then status and message are derived from that.
        """


class Cork(Protocol):
    """Collects what a read causes to be written to clients, so that each gets one write."""

    @property
    def part(self) -> int:
        """How many clients are written to in one turn."""

    @property
    def behind(self) -> bool:
        """Output for more clients than that is being written: pass on nothing else for so many."""

    def cork(self) -> None:
        """Begin; may be nested."""

    def uncork(self) -> None:
        """End; the outermost end writes."""

    def when_written(self, do: Callable[[], None]) -> None:
        """Call `do` in a later turn of the loop, once that is written."""
