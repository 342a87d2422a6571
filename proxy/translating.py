"""Pass-through of calls whose messages are changed: those with keys in a namespace, MemberList with an advertised URL.

All others pass as ever, frame by frame. A call that rules name (upstream/translation.py) is cut into messages in the
directions that change; each is translated when it is whole and goes on uncompressed. A message that is not whole is
kept here, so its window is given back at once and there is a bound for all such bytes together. What a namespace does
not cover is refused: methods of its services that are not known here, and HTTP/1, whose JSON gateway would reach every
key.

Everything else of a call (heads, deadlines, trailers, who is tried again) is `passthrough.Relay`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from google.protobuf.message import DecodeError

from proto.framing import FramingError, Status, Unframer, frame
from proto.http2 import ErrorCode, Stream
from proxy.calls import ACCEPTED_ENCODINGS, Carrier, Headers, Refusal, RequestHead, status_trailers
from proxy.passthrough import Passthrough, PassthroughSettings, Relay
from upstream.pool import Pool
from upstream.translation import Rules, Translation

HTTP1_REFUSAL = "the JSON gateway and other HTTP/1 pages of etcd are not served under --namespace"


class TranslatingPassthrough(Passthrough):
    """The handler factory for all streams that no route claims, under rules; no two of them name the same call."""

    def __init__(self, pool: Pool, rules: Sequence[Rules], settings: PassthroughSettings | None = None) -> None:
        super().__init__(pool, settings)
        self._rules = rules
        self._found = {path: (each, one) for each in rules for path, one in each.translations.items()}

    def __call__(self, connection: Carrier, stream: Stream, headers: Headers, end_stream: bool) -> Relay | None:
        """Take a new request stream. Raises Refusal for what a namespace does not cover, or as Passthrough does."""
        path = next((value for name, value in headers if name == b":path"), b"")
        found = self._found.get(path)
        if found is not None:
            return self._begin(TranslatedRelay(self, connection, stream, headers, end_stream, *found))
        for rules in self._rules:
            if path.startswith(rules.services) and path not in rules.untouched:
                shown = path[:200].decode("ascii", "backslashreplace")
                raise Refusal(200, Status.UNIMPLEMENTED, f"unknown method {shown} under {rules.flag}")
        return super().__call__(connection, stream, headers, end_stream)

    def kept(self, size: int, flag: str) -> None:
        """Count `size` bytes more (or fewer) of messages that are not whole. Raises FramingError at the bound."""
        stats, bound = self.stats, self.settings.partial_bytes_max
        stats.partial_bytes += size
        if size > 0 and stats.partial_bytes > bound:
            stats.refused_at["partial_bytes_max"] += 1
            text = f"watchmux: too many bytes of unfinished messages under {flag} ({bound})"
            raise FramingError(Status.RESOURCE_EXHAUSTED, text)


class TranslatedRelay(Relay):
    """One call whose messages are translated. Raises Refusal for a request that cannot be read."""

    __slots__ = ("_flag", "_kept", "_requests", "_responses", "_translating", "_translation")

    def __init__(
        self,
        owner: TranslatingPassthrough,
        connection: Carrier,
        stream: Stream,
        headers: Headers,
        end_stream: bool,
        rules: Rules,
        translation: Translation,
    ) -> None:
        # Cuts the request into messages; None: it passes as it is.
        self._requests: Unframer | None = None
        if translation.outward is not None:
            self._requests = Unframer(owner.settings.partial_bytes_max, RequestHead.parse(headers).decompress)
            headers = _of_any_length(headers)
        super().__init__(owner, connection, stream, headers, end_stream)
        self._translating = owner
        self._translation = translation
        self._flag = rules.flag
        # The same for the answer, made when its head says how it is compressed.
        self._responses: Unframer | None = None
        # Bytes of messages that are not whole.
        self._kept = 0

    def data(self, data: bytes, flow_size: int, end_stream: bool) -> None:
        """Take a part of the request; pass on what it makes whole."""
        requests = self._requests
        if self.done or requests is None:
            super().data(data, flow_size, end_stream)
            return
        try:
            translate = self._translation.to_etcd
            whole = b"".join([frame(translate(message)) for message in self._cut(requests, data)])
            if end_stream and requests.pending:
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
        if self._translation.inward is None:
            super().on_headers(headers)
            return
        encoding = next((value for name, value in headers if name == b"grpc-encoding"), b"identity")
        if encoding not in ACCEPTED_ENCODINGS:
            shown = encoding[:64].decode("ascii", "backslashreplace")
            text = f"watchmux: under {self._flag} answers are identity or gzip, not {shown!r}"
            self._fail(FramingError(Status.INTERNAL, text), "")
            return
        decompress: Literal["gzip"] | None = "gzip" if encoding == b"gzip" else None
        self._responses = Unframer(self._translating.settings.partial_bytes_max, decompress)
        super().on_headers(_of_any_length(headers))

    def on_data(self, data: bytes, flow_size: int) -> None:
        """Take a part of the answer; pass on what it makes whole."""
        call, responses = self._call, self._responses
        if self.done or responses is None or (call is not None and call.http_status != 200):
            super().on_data(data, flow_size)
            return
        assert call is not None
        self._forget_request()
        try:
            translate = self._translation.to_client
            whole = b"".join([frame(translate(message)) for message in self._cut(responses, data)])
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
            self._translating.kept(change, self._flag)
        return messages

    def _give_up(self) -> None:
        if self._kept:
            self._translating.kept(-self._kept, self._flag)
            self._kept = 0
        super()._give_up()

    def _fail(self, error: FramingError | DecodeError, name: str) -> None:
        """End a call whose messages cannot be translated."""
        if isinstance(error, FramingError):
            status, text = error.code, error.text
        else:
            status, text = Status.INTERNAL, f"watchmux: a message is no {name}, which {self._flag} has to read"
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


def _of_any_length(headers: Headers) -> Headers:
    """Return a head without the length of the body, which changes."""
    return [(name, value) for name, value in headers if name != b"content-length"]
