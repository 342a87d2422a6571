"""A gRPC client on the h2 library, raw enough to do what a well-behaved client never does.

It can leave windows closed, stop reading its socket, and send partial or invalid messages. It uses another HTTP/2
implementation than the proxy, so it also checks that the proxy's frames are valid.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, cast

import h2.config
import h2.connection
import h2.events
import h2.settings

from proto.framing import MessageReader, decode_message, frame
from proto.pb import rpc_pb2
from tests.waiting import LIMIT_S, until_async

HOST = "127.0.0.1"
WATCH = "/etcdserverpb.Watch/Watch"
MESSAGE_BYTES_MAX = 256 * 1024 * 1024
WINDOW_BYTES_MAX = 2**31 - 1


class RawStream:
    """One call: the data received so far, and ways to send."""

    def __init__(self, client: RawClient, stream_id: int) -> None:
        self.client = client
        self.id = stream_id
        self.headers: dict[str, str] = {}
        self.trailers: dict[str, str] = {}
        self.messages: list[bytes] = []
        self.reset: int | None = None
        """The code of an RST_STREAM."""
        self.ended = False
        self.taking = True
        """Give the windows back as data comes; False leaves this stream's window to run dry."""
        self.held = 0
        """Bytes received while not taking."""
        self._unframer = MessageReader(MESSAGE_BYTES_MAX)
        self._seen = 0

    @property
    def over(self) -> bool:
        """Whether the call has ended, in any way."""
        return self.ended or self.reset is not None or self.client.lost

    @property
    def status(self) -> int | None:
        """The gRPC status, once received."""
        value = self.trailers.get("grpc-status", self.headers.get("grpc-status"))
        return None if value is None else int(value)

    @property
    def text(self) -> str:
        """The gRPC message."""
        return decode_message(self.trailers.get("grpc-message", self.headers.get("grpc-message", "")).encode())

    def send(self, message: bytes, end: bool = False) -> None:
        """Send one message, with its gRPC prefix."""
        self.send_raw(frame(message), end)

    def send_raw(self, data: bytes, end: bool = False) -> None:
        """Send bytes as they are; they must fit the window."""
        h2 = self.client.h2
        size = h2.max_outbound_frame_size
        for start in range(0, len(data), size):
            h2.send_data(self.id, data[start : start + size])
        if end:
            h2.end_stream(self.id)
        self.client.flush()

    async def send_all(self, message: bytes) -> None:
        """Send one message of any size, as the windows allow; the rest is dropped when the call ends."""
        data, h2 = frame(message), self.client.h2
        while data:
            await until_async(lambda: self.over or h2.local_flow_control_window(self.id) > 0, "a window")
            if self.over:
                return
            size = min(h2.local_flow_control_window(self.id), h2.max_outbound_frame_size)
            h2.send_data(self.id, data[:size])
            data = data[size:]
            self.client.flush()

    def cancel(self, code: int = 8) -> None:
        """Reset the stream, with CANCEL as a client library does."""
        self.client.h2.reset_stream(self.id, code)
        self.client.flush()

    def take(self) -> None:
        """Acknowledge received data after `taking` was False."""
        self.taking = True
        if self.held:
            self.client.h2.acknowledge_received_data(self.held, self.id)
            self.held = 0
        self.client.flush()

    def note(self, fields: Sequence[tuple[str, str]]) -> None:
        """Record a header list, head or trailers, in order."""

    def take_data(self, data: bytes) -> None:
        """Record received data."""
        self.messages.extend(self._unframer.feed(data))

    async def next(self, timeout_s: float = LIMIT_S) -> bytes:
        """Return the next message, after those already returned."""
        await until_async(lambda: len(self.messages) > self._seen or self.over, "a message", timeout_s)
        assert len(self.messages) > self._seen, f"the call ended: {self.status} {self.text!r}, reset {self.reset}"
        self._seen += 1
        return self.messages[self._seen - 1]

    async def end(self, timeout_s: float = LIMIT_S) -> tuple[int | None, str]:
        """Wait for the end of the call and return its status."""
        await until_async(lambda: self.over, "the end of the call", timeout_s)
        return self.status, self.text


class WatchStream:
    """A Watch call, with methods for watch requests."""

    def __init__(self, raw: RawStream) -> None:
        self.raw = raw

    def create(self, key: bytes, range_end: bytes = b"", start_revision: int = 0, **extra: Any) -> None:
        """Create a watch; `extra` are further fields of WatchCreateRequest."""
        create = rpc_pb2.WatchCreateRequest(key=key, range_end=range_end, start_revision=start_revision, **extra)
        self.raw.send(rpc_pb2.WatchRequest(create_request=create).SerializeToString())

    async def create_large(self, key: bytes, start_revision: int = 0) -> None:
        """Create a watch of a key of any size."""
        create = rpc_pb2.WatchCreateRequest(key=key, start_revision=start_revision)
        await self.raw.send_all(rpc_pb2.WatchRequest(create_request=create).SerializeToString())

    def cancel(self, watch_id: int) -> None:
        """Cancel one watch."""
        cancel = rpc_pb2.WatchCancelRequest(watch_id=watch_id)
        self.raw.send(rpc_pb2.WatchRequest(cancel_request=cancel).SerializeToString())

    def progress(self) -> None:
        """Request progress."""
        request = rpc_pb2.WatchRequest(progress_request=rpc_pb2.WatchProgressRequest())
        self.raw.send(request.SerializeToString())

    async def next(self, timeout_s: float = LIMIT_S) -> rpc_pb2.WatchResponse:
        """Return the next response."""
        return rpc_pb2.WatchResponse.FromString(await self.raw.next(timeout_s))

    async def created(self, timeout_s: float = LIMIT_S) -> rpc_pb2.WatchResponse:
        """Return the next response, which must be a successful `created`."""
        response = await self.next(timeout_s)
        assert response.created, response
        assert not response.canceled, response
        return response

    @property
    def responses(self) -> list[rpc_pb2.WatchResponse]:
        """All responses so far."""
        return [rpc_pb2.WatchResponse.FromString(message) for message in self.raw.messages]

    @property
    def values(self) -> list[bytes]:
        """The values of all events so far, in order."""
        return [event.kv.value for response in self.responses for event in response.events]


class RawClient(asyncio.Protocol):
    """One HTTP/2 connection in client role. Use `async with await RawClient.connect(port)`."""

    def __init__(self) -> None:
        config = h2.config.H2Configuration(client_side=True, header_encoding="utf-8")
        self.h2 = h2.connection.H2Connection(config)
        self.streams: dict[int, RawStream] = {}
        self.goaways: list[h2.events.ConnectionTerminated] = []
        self.lost = False
        self.transport: asyncio.Transport | None = None
        self.pings: list[bytes] = []
        self._port = 0
        self._buffer = b""

    @classmethod
    async def connect(
        cls,
        port: int,
        window: int = WINDOW_BYTES_MAX,
        tls: ssl.SSLContext | None = None,
        connection_window: int = WINDOW_BYTES_MAX,
    ) -> Self:
        """Connect; `window` is the receive window of each stream, in bytes, `connection_window` that of all of them."""
        client = cls()
        loop = asyncio.get_running_loop()
        initial = {h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        client.h2.local_settings = h2.settings.Settings(client=True, initial_values=initial)
        client.h2.initiate_connection()
        if connection_window > 65_535:
            client.h2.increment_flow_control_window(connection_window - 65_535)
        client._port = port
        await loop.create_connection(lambda: client, HOST, port, ssl=tls)
        client.flush()
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        if self.transport is not None:
            self.transport.abort()
        await until_async(lambda: self.lost, "the client's connection to close")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Record the end."""
        del exc
        self.lost = True
        self.transport = None

    def flush(self) -> None:
        """Write what h2 has queued."""
        data = self.h2.data_to_send()
        if data and self.transport is not None:
            self.transport.write(data)

    def call(self, path: str, metadata: Sequence[tuple[str, str]] = (), end: bool = False) -> RawStream:
        """Open a call with a good gRPC request head."""
        return self.request(
            [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", path),
                (":authority", f"{HOST}:{self._port}"),
                ("content-type", "application/grpc"),
                ("te", "trailers"),
                *metadata,
            ],
            end,
        )

    def watch(self, metadata: Sequence[tuple[str, str]] = ()) -> WatchStream:
        """Open a Watch call."""
        return WatchStream(self.call(WATCH, metadata))

    async def open_watch(
        self,
        key: bytes,
        range_end: bytes = b"",
        start_revision: int = 0,
        metadata: Sequence[tuple[str, str]] = (),
        timeout_s: float = LIMIT_S,
        **extra: Any,
    ) -> WatchStream:
        """Open a watch on a new stream and wait for its `created`; `extra` as in `WatchStream.create`."""
        stream = self.watch(metadata)
        stream.create(key, range_end, start_revision, **extra)
        await stream.created(timeout_s)
        return stream

    def request(self, headers: Sequence[tuple[str, str]], end: bool = False) -> RawStream:
        """Open a stream with any head."""
        stream_id = self.h2.get_next_available_stream_id()
        stream = self.streams[stream_id] = RawStream(self, stream_id)
        self.h2.send_headers(stream_id, headers, end_stream=end)
        self.flush()
        return stream

    async def unary(self, path: str, message: bytes, metadata: Sequence[tuple[str, str]] = ()) -> RawStream:
        """Make a unary call and wait for its end."""
        stream = self.call(path, metadata)
        stream.send(message, end=True)
        await stream.end()
        return stream

    def data_received(self, data: bytes) -> None:
        """Pass the bytes to h2, frame by frame, and its events to the streams."""
        self._buffer += data
        while len(self._buffer) >= 9:
            size = 9 + int.from_bytes(self._buffer[:3], "big")
            if len(self._buffer) < size:
                break
            frame_bytes = self._buffer[:size]
            self._buffer = self._buffer[size:]
            for event in self.h2.receive_data(frame_bytes):
                handler = self._handlers.get(type(event))
                if handler is not None:
                    handler(self, event)
        self.flush()

    def _data(self, event: h2.events.DataReceived) -> None:
        stream = self.streams[event.stream_id]
        assert event.data is not None
        stream.take_data(event.data)
        size = event.flow_controlled_length or 0
        if not stream.taking:
            stream.held += size
        elif size:
            self.h2.acknowledge_received_data(size, event.stream_id)

    def _head(self, event: h2.events.ResponseReceived) -> None:
        fields = _text(event.headers)
        self.streams[event.stream_id].note(fields)
        self.streams[event.stream_id].headers.update(fields)

    def _trailers(self, event: h2.events.TrailersReceived) -> None:
        fields = _text(event.headers)
        self.streams[event.stream_id].note(fields)
        self.streams[event.stream_id].trailers.update(fields)

    def _ended(self, event: h2.events.StreamEnded) -> None:
        self.streams[event.stream_id].ended = True

    def _reset(self, event: h2.events.StreamReset) -> None:
        self.streams[event.stream_id].reset = int(event.error_code or 0)

    def _terminated(self, event: h2.events.ConnectionTerminated) -> None:
        self.goaways.append(event)
        # h2 treats a GOAWAY as the end; by RFC 9113 6.8 streams go on.
        self.h2.state_machine.state = h2.connection.ConnectionState.CLIENT_OPEN

    def _ping_acked(self, event: h2.events.PingAckReceived) -> None:
        self.pings.append(event.ping_data)

    _handlers: ClassVar[dict[type, Callable[..., None]]] = {
        h2.events.DataReceived: _data,
        h2.events.ResponseReceived: _head,
        h2.events.TrailersReceived: _trailers,
        h2.events.StreamEnded: _ended,
        h2.events.StreamReset: _reset,
        h2.events.ConnectionTerminated: _terminated,
        h2.events.PingAckReceived: _ping_acked,
    }


def _text(headers: Sequence[tuple[bytes | str, bytes | str]] | None) -> list[tuple[str, str]]:
    return [(str(name), str(value)) for name, value in headers or ()]
