"""Pass-through under `--namespace`: the calls with keys are read, given the prefix, and their answers freed of it.

All others pass as ever, frame by frame. A call with keys is cut into messages in both directions; each is translated
when it is whole (upstream/namespaced_calls.py) and goes on uncompressed. A message that is not whole is kept here, so
its window is given back at once and there is a bound for all such bytes together. What a namespace does not cover is
refused: methods of these services that are not known here, and HTTP/1, whose JSON gateway would reach every key.

Everything else of a call (heads, deadlines, trailers, who is tried again) is `passthrough.Relay`'s.
"""

from __future__ import annotations

from typing import Literal

from google.protobuf.message import DecodeError

from proto.framing import FramingError, Status, Unframer, frame
from proto.http2 import ErrorCode, Stream
from proxy.calls import ACCEPTED_ENCODINGS, Carrier, Headers, Refusal, RequestHead, status_trailers
from proxy.passthrough import Passthrough, PassthroughSettings, Relay
from upstream.namespace import Namespace
from upstream.namespaced_calls import KEYLESS, SERVICES, TRANSLATIONS, Translation
from upstream.pool import Pool

HTTP1_REFUSAL = "the JSON gateway and other HTTP/1 pages of etcd are not served under --namespace"


class NamespacedPassthrough(Passthrough):
    """The handler factory for all streams that no route claims, under a namespace."""

    def __init__(self, pool: Pool, namespace: Namespace, settings: PassthroughSettings | None = None) -> None:
        super().__init__(pool, settings)
        self.namespace = namespace

    def __call__(self, connection: Carrier, stream: Stream, headers: Headers, end_stream: bool) -> Relay | None:
        """Take a new request stream. Raises Refusal for what a namespace does not cover, or as Passthrough does."""
        path = next((value for name, value in headers if name == b":path"), b"")
        translation = TRANSLATIONS.get(path)
        if translation is not None:
            encoding = RequestHead.parse(headers).decompress
            relay = NamespacedRelay(self, connection, stream, headers, end_stream, translation, encoding)
            return self._begin(relay)
        if path.startswith(SERVICES) and path not in KEYLESS:
            shown = path[:200].decode("ascii", "backslashreplace")
            raise Refusal(200, Status.UNIMPLEMENTED, f"unknown method {shown} under --namespace")
        return super().__call__(connection, stream, headers, end_stream)

    def kept(self, size: int) -> None:
        """Count `size` bytes more (or fewer) of messages that are not whole. Raises FramingError at the bound."""
        stats, bound = self.stats, self.settings.partial_bytes_max
        stats.partial_bytes += size
        if size > 0 and stats.partial_bytes > bound:
            stats.partial_refused += 1
            text = f"watchmux: too many bytes of unfinished messages under --namespace ({bound})"
            raise FramingError(Status.RESOURCE_EXHAUSTED, text)


class NamespacedRelay(Relay):
    """One call whose messages are translated."""

    __slots__ = ("_kept", "_namespaced", "_requests", "_responses", "_translation")

    def __init__(
        self,
        owner: NamespacedPassthrough,
        connection: Carrier,
        stream: Stream,
        headers: Headers,
        end_stream: bool,
        translation: Translation,
        encoding: Literal["gzip"] | None,
    ) -> None:
        # The length changes.
        headers = [(name, value) for name, value in headers if name != b"content-length"]
        super().__init__(owner, connection, stream, headers, end_stream)
        self._namespaced = owner
        self._translation = translation
        self._requests = Unframer(owner.settings.partial_bytes_max, encoding)
        # Made when the answer's head says how it is compressed.
        self._responses: Unframer | None = None
        # Bytes of messages that are not whole.
        self._kept = 0

    def data(self, data: bytes, flow_size: int, end_stream: bool) -> None:
        """Take a part of the request; pass on what it makes whole."""
        if self.done:
            self.connection.h2.consumed(self._stream, flow_size)
            return
        try:
            messages = self._cut(self._requests, data)
            translate, namespace = self._translation.to_etcd, self._namespaced.namespace
            whole = b"".join([frame(translate(namespace, message)) for message in messages])
            if end_stream and self._requests.pending:
                raise FramingError(Status.INTERNAL, "the request ended inside a message")
        except (FramingError, DecodeError) as error:
            self.connection.h2.consumed(self._stream, flow_size)
            self._fail(error, self._translation.request.DESCRIPTOR.name)
            return
        if whole or end_stream:
            super().data(whole, flow_size, end_stream)
        else:
            self.connection.h2.consumed(self._stream, flow_size)
            self.connection.touch()

    def on_headers(self, headers: Headers) -> None:
        """Note how the answer is compressed, and pass its head on."""
        encoding = next((value for name, value in headers if name == b"grpc-encoding"), b"identity")
        if encoding not in ACCEPTED_ENCODINGS:
            shown = encoding[:64].decode("ascii", "backslashreplace")
            text = f"watchmux: under --namespace answers are identity or gzip, not {shown!r}"
            self._fail(FramingError(Status.INTERNAL, text), "")
            return
        decompress: Literal["gzip"] | None = "gzip" if encoding == b"gzip" else None
        self._responses = Unframer(self._namespaced.settings.partial_bytes_max, decompress)
        super().on_headers([(name, value) for name, value in headers if name != b"content-length"])

    def on_data(self, data: bytes, flow_size: int) -> None:
        """Take a part of the answer; pass on what it makes whole."""
        call, responses = self._call, self._responses
        if self.done or responses is None or (call is not None and call.http_status != 200):
            super().on_data(data, flow_size)
            return
        assert call is not None
        self._forget_request()
        try:
            messages = self._cut(responses, data)
            translate, namespace = self._translation.to_client, self._namespaced.namespace
            whole = b"".join([frame(translate(namespace, message)) for message in messages])
        except (FramingError, DecodeError) as error:
            call.consumed(flow_size)
            self._fail(error, self._translation.response.DESCRIPTOR.name)
            return
        if whole:
            super().on_data(whole, flow_size)
        else:
            call.consumed(flow_size)

    def _cut(self, unframer: Unframer, data: bytes) -> list[bytes]:
        """Return the messages that are whole now. Raises FramingError."""
        messages = unframer.feed(data)
        kept = len(data) if unframer.pending else 0
        if kept and not messages:
            kept += self._kept
        change, self._kept = kept - self._kept, kept
        if change:
            self._namespaced.kept(change)
        return messages

    def _give_up(self) -> None:
        if self._kept:
            self._namespaced.kept(-self._kept)
            self._kept = 0
        super()._give_up()

    def _fail(self, error: FramingError | DecodeError, name: str) -> None:
        """End a call whose messages cannot be translated."""
        if isinstance(error, FramingError):
            status, text = error.code, error.text
        else:
            status, text = Status.INTERNAL, f"watchmux: a message is no {name}, which --namespace has to read"
        call, self._call = self._call, None
        if call is not None:
            call.reset(ErrorCode.CANCEL)
        self._settle()
        if self._answered:
            self._give_up()
            self.connection.h2.send_headers(self._stream, status_trailers(status, text), True)
            self.connection.touch()
        else:
            self.refuse(Refusal(200, status, text))
        self._owner.over()
