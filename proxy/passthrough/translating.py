"""Pass-through of calls with translated messages: those with keys under a namespace, MemberList with an advertised URL.

All other calls are forwarded frame by frame. A call with a rule (proxy/passthrough/translation.py) is cut into messages
in the directions that the rule changes; each message is translated when it is complete, and forwarded uncompressed.
Requests that a namespace does not cover are refused: unknown methods of its services, and HTTP/1, whose JSON gateway
would reach every key.

Small messages are translated as they arrive, as far as the time budget of this turn of the event loop allows. The rest
continues in later turns, a bounded step of each call in rotation (proxy/passthrough/message_work.py), and no window is
credited meanwhile. Kept messages are bounded, by their size in memory and not on the wire; so are the unread bytes of
translated responses, and the bytes of translated requests that etcd has not accepted.

Everything else (heads, deadlines, trailers, resending) is done by `Relay`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import islice
from typing import Final

from google.protobuf.message import DecodeError

from proto.framing import FramingError, Status
from proto.http2 import ErrorCode, Stream
from proxy import logs
from proxy.listening.calls import (
    ACCEPTED_ENCODINGS,
    CallRefusal,
    ClientHandle,
    Headers,
    RequestHead,
    status_trailers,
)
from proxy.passthrough.message_work import MessageWork
from proxy.passthrough.relay import Passthrough, Relay
from proxy.passthrough.settings import PassthroughSettings
from proxy.passthrough.translation import Translation, TranslationRules
from proxy.passthrough.unread import KeptBytes
from upstream.connection import ClientConnection
from upstream.pool import Pool

HTTP1_REFUSAL = "the JSON gateway and other HTTP/1 pages of etcd are not served under --namespace"

log = logs.logger("translating")

TURN_S: Final = 0.004
"""Time for translating messages in one turn of the event loop; the last step may exceed it."""

LARGE_BYTES: Final = 64 * 1024
"""A call that keeps more than this is treated as large: only `ROTATION` of them are translated at a time."""

ROTATION: Final = 8
"""Large messages translated concurrently: each is in memory twice meanwhile, and a huge one slows the others down by at
most a factor of eight."""


class TranslatingPassthrough(Passthrough):
    """The handler factory for all requests without a route, with rules; no two rules name the same call."""

    def __init__(
        self, pool: Pool, rules: Sequence[TranslationRules], settings: PassthroughSettings | None = None
    ) -> None:
        super().__init__(pool, settings)
        self._rules = rules
        self._found = {path: (each, one) for each in rules for path, one in each.translations.items()}
        # Calls with messages that are not translated yet, in rotation; and the large ones, of which the first
        # `ROTATION` are in rotation and the others wait.
        self._working: dict[TranslatedRelay, None] = {}
        self._large: dict[TranslatedRelay, None] = {}
        # Index of the large call whose turn is next.
        self._place = 0
        # Time left in this turn of the loop for translating messages as they arrive.
        self._left_s = TURN_S
        # By client connection: its calls with unfinished messages, and the bytes of those.
        self._partial: dict[ClientHandle, KeptBytes[TranslatedRelay]] = {}

    def __call__(self, connection: ClientHandle, stream: Stream, headers: Headers, end_stream: bool) -> Relay | None:
        """Handle a new request stream. Raises CallRefusal if a namespace does not cover it, or as Passthrough does."""
        path = next((value for name, value in headers if name == b":path"), b"")
        found = self._found.get(path)
        if found is not None:
            return self._begin(TranslatedRelay(self, connection, stream, headers, end_stream, *found))
        for rules in self._rules:
            if path.startswith(rules.services) and path not in rules.untouched:
                shown = path[:200].decode("ascii", "backslashreplace")
                raise CallRefusal(200, Status.UNIMPLEMENTED, f"unknown method {shown} under {rules.flag}")
        return super().__call__(connection, stream, headers, end_stream)

    def relay(self, connection: ClientHandle, stream: Stream, headers: Headers) -> Relay:
        """Return the relay of a new call, as Passthrough does. Raises CallRefusal also for a malformed head."""
        found = self._found.get(next((value for name, value in headers if name == b":path"), b""))
        if found is None:
            return super().relay(connection, stream, headers)
        return self._checked(TranslatedRelay(self, connection, stream, headers, False, *found))

    def work(self, relay: TranslatedRelay) -> None:
        """Translate a call's messages: now, as far as this turn of the loop has time, the rest in later turns."""
        if not (self._working or self._large):
            more = True
            while more and self._left_s > 0:
                began = time.perf_counter()
                more = relay.go_on()
                self._left_s -= time.perf_counter() - began
            if not more:
                return
            asyncio.get_running_loop().call_soon(self._turn)
        relay.working = True
        self._working[relay] = None

    def leave(self, relay: TranslatedRelay) -> None:
        """Remove a call that is over."""
        relay.working = False
        self._working.pop(relay, None)
        self._large.pop(relay, None)

    def _turn(self) -> None:
        """Continue the calls in rotation: alternately a step of a new or small one and of a large one."""
        end = time.perf_counter() + TURN_S
        while self._working or self._large:
            if self._working:
                relay = next(iter(self._working))
                del self._working[relay]
                if self._goes_on(relay):
                    (self._large if relay.kept > LARGE_BYTES else self._working)[relay] = None
                else:
                    relay.working = False
            if self._large:
                place = self._place % min(len(self._large), ROTATION)
                relay = next(islice(self._large, place, None))
                self._place = place + 1
                if not self._goes_on(relay):
                    self.leave(relay)
            if time.perf_counter() >= end:
                break
        self._left_s = TURN_S
        if self._working or self._large:
            asyncio.get_running_loop().call_soon(self._turn)

    def _goes_on(self, relay: TranslatedRelay) -> bool:
        try:
            return relay.go_on()
        except Exception:
            # A bug with one message must not stop the other calls.
            log.exception("translating a message failed; ending its call")
            relay.fail(FramingError(Status.INTERNAL, "watchmux: translating a message failed"))
            return False

    def kept(self, relay: TranslatedRelay, size: int, flag: str) -> None:
        """Count `size` more (or fewer) bytes of unfinished messages.

        At the bound, the calls of the connection with most unfinished bytes end; raises FramingError if it is this one.
        """
        stats, settings = self.stats, self.settings
        partial = self._partial.setdefault(relay.connection, KeptBytes())
        stats.partial_bytes += size
        partial.size += size
        if relay.kept:
            partial.relays.add(relay)
        else:
            partial.relays.discard(relay)
            if not partial.relays:
                del self._partial[relay.connection]
        if size > 0 and stats.partial_bytes > settings.partial_bytes_max:
            worst = max(self._partial.values(), key=lambda one: one.size)
            if worst is partial:
                raise self._too_much(flag)
            for one in tuple(worst.relays):
                one.fail(self._too_much(flag))

    def _too_much(self, flag: str) -> FramingError:
        self.stats.refused_at["partial_bytes_max"] += 1
        bound = self.settings.partial_bytes_max
        text = f"watchmux: too many bytes of unfinished messages under {flag} ({bound})"
        return FramingError(Status.RESOURCE_EXHAUSTED, text)


class TranslatedRelay(Relay):
    """One call whose messages are translated. Raises CallRefusal for a request head that cannot be parsed."""

    __slots__ = (
        "_ending",
        "_ends",
        "_flag",
        "_held_client",
        "_held_upstream",
        "_requests",
        "_responses",
        "_rules",
        "_sent_bytes",
        "_translating",
        "_translation",
        "kept",
        "working",
    )

    def __init__(
        self,
        owner: TranslatingPassthrough,
        connection: ClientHandle,
        stream: Stream,
        headers: Headers,
        end_stream: bool,
        rules: TranslationRules,
        translation: Translation,
    ) -> None:
        # Translates the request's messages; None: they are forwarded unchanged.
        self._requests: MessageWork | None = None
        if translation.outward is not None:
            gzip = RequestHead.parse(headers).decompress is not None
            bytes_max = owner.settings.translated_request_bytes_max
            self._requests = MessageWork(translation.request, translation.outward, bytes_max, gzip)
            headers = _of_any_length(headers)
        super().__init__(owner, connection, stream, headers, end_stream)
        self._translating = owner
        self._translation = translation
        self._rules = rules
        self._flag = rules.flag
        # The same for the response, created when its head with the compression arrives.
        self._responses: MessageWork | None = None
        # Flow-control bytes of input that is not translated yet.
        self._held_client = 0
        self._held_upstream = 0
        # Bytes of translated requests that etcd has not accepted.
        self._sent_bytes = 0
        # The client has ended its side, but its request is not translated completely.
        self._ends = False
        # How etcd ended the call, while its response is not translated completely.
        self._ending: tuple[int, str, Headers] | None = None
        self.kept = 0
        """Bytes of unfinished messages, as the owner counts them."""
        self.working = False
        """The owner has it in its rotation."""

    # The client's side.

    def data(self, data: bytes, flow_size: int, end_stream: bool) -> None:
        """Handle a part of the request; forward the messages it completes."""
        requests = self._requests
        if self.done or requests is None:
            super().data(data, flow_size, end_stream)
            return
        requests.feed(data)
        self._held_client += flow_size
        self._ends = self._ends or end_stream
        if not self.working:
            self._translating.work(self)

    def start(self, upstream: ClientConnection) -> bool:
        """Start the call with the messages translated so far."""
        if not super().start(upstream):
            return False
        call = self._call
        self._count_sent(self._request_bytes if call is not None and call.blocked else 0)
        return True

    def _remake(self, client: ClientHandle, headers: Headers) -> Relay:
        args = (Stream(0, 0, 0), headers, True, self._rules, self._translation)
        twin = TranslatedRelay(self._translating, client, *args)
        # Its request is translated already.
        twin._requests = None
        return twin

    # etcd's side.

    def on_headers(self, headers: Headers) -> None:
        """Note the response's compression, and forward its head."""
        inward = self._translation.inward
        if inward is None:
            super().on_headers(headers)
            return
        encoding = next((value for name, value in headers if name == b"grpc-encoding"), b"identity")
        if encoding not in ACCEPTED_ENCODINGS:
            shown = encoding[:64].decode("ascii", "backslashreplace")
            text = f"watchmux: under {self._flag} answers are identity or gzip, not {shown!r}"
            self.fail(FramingError(Status.INTERNAL, text))
            return
        bytes_max = self._translating.settings.unread_bytes_per_connection_max
        self._responses = MessageWork(self._translation.response, inward, bytes_max, encoding == b"gzip")
        super().on_headers(_of_any_length(headers))

    def on_data(self, data: bytes, flow_size: int) -> None:
        """Handle a part of the response; forward the messages it completes."""
        call, responses = self._call, self._responses
        if self.done or responses is None or (call is not None and call.http_status != 200):
            super().on_data(data, flow_size)
            return
        self._forget_request()
        responses.feed(data)
        self._held_upstream += flow_size
        if not self.working:
            self._translating.work(self)

    def on_drained(self) -> None:
        """Note that etcd has accepted the request so far."""
        self._count_sent(0)
        super().on_drained()

    def on_end(self, status: int, message: str, trailers: Headers) -> None:
        """End the client's stream as etcd's ended, after the messages that are still being translated."""
        responses = self._responses
        if not self.done and responses is not None and responses.busy:
            self._ending = (status, message, trailers)
        else:
            super().on_end(status, message, trailers)

    # Translating.

    def go_on(self) -> bool:
        """Do one step in each direction; return whether there is more work."""
        requests, responses = self._requests, self._responses
        more = not self.done and requests is not None and self._step_request(requests)
        return (not self.done and responses is not None and self._step_response(responses)) or more

    def _step_request(self, requests: MessageWork) -> bool:
        try:
            pieces = requests.step() if requests.busy else None
            busy = requests.busy
            ends = self._ends and not busy
            if ends and requests.pending:
                raise FramingError(Status.INTERNAL, "the request ended inside a message")
        except (FramingError, DecodeError) as error:
            if isinstance(error, FramingError) and error.code is Status.RESOURCE_EXHAUSTED:
                self._owner.stats.refused_at["translated_request_bytes_max"] += 1
            self.fail(error, self._translation.request.DESCRIPTOR.name)
            return False
        flow_size = 0
        if not busy:
            flow_size, self._held_client = self._held_client, 0
        self._count()
        if self.done:
            self.connection.h2.consumed(None, flow_size)
            return False
        if pieces is not None or ends:
            self._ends = self._ends and not ends
            whole = b"".join(pieces or ())
            super().data(whole, flow_size, ends)
            if not self.done and self._call is not None and self._call.blocked:
                self._count_sent(self._sent_bytes + len(whole))
        elif flow_size:
            self.connection.h2.consumed(self.stream, flow_size)
            self.connection.schedule_flush()
        return busy

    def _step_response(self, responses: MessageWork) -> bool:
        try:
            pieces = responses.step() if responses.busy else None
        except (FramingError, DecodeError) as error:
            self.fail(error, self._translation.response.DESCRIPTOR.name)
            return False
        call, busy = self._call, responses.busy
        assert call is not None
        flow_size = 0
        if not busy:
            flow_size, self._held_upstream = self._held_upstream, 0
        self._count()
        if self.done:
            return False
        if pieces is not None:
            self._pass_on(call, pieces, sum(map(len, pieces)), flow_size)
        elif flow_size:
            call.consumed(flow_size)
        if not busy and self._ending is not None and not self.done:
            super().on_end(*self._ending)
        return busy

    def _count_sent(self, size: int) -> None:
        """Note the bytes of translated requests that etcd has not accepted."""
        if size != self._sent_bytes:
            self._sent_bytes = size
            self._count()

    def _count(self) -> None:
        """Report the bytes kept now to the owner; end the call at the owner's bound."""
        kept = self._sent_bytes
        if self._requests is not None:
            kept += self._requests.held
        if self._responses is not None:
            kept += self._responses.held
        change, self.kept = kept - self.kept, kept
        if change and not self.done:
            try:
                self._translating.kept(self, change, self._flag)
            except FramingError as error:
                self.fail(error)

    def _give_up(self) -> None:
        if self.working:
            self._translating.leave(self)
        kept, self.kept = self.kept, 0
        self._requests = self._responses = None
        if kept:
            self._translating.kept(self, -kept, self._flag)
        # The client's other calls need the connection's window.
        held, self._held_client = self._held_client, 0
        self.connection.h2.consumed(None, held)
        super()._give_up()

    def fail(self, error: FramingError | DecodeError, name: str = "") -> None:
        """End a call whose messages cannot be translated; `name`: their expected type."""
        if self.done:
            return
        if isinstance(error, FramingError):
            status, text = error.code, error.text
        else:
            status, text = Status.INTERNAL, f"watchmux: cannot decode a message as {name}, which {self._flag} requires"
        call, self._call = self._call, None
        if call is not None:
            call.reset(ErrorCode.CANCEL)
        self._settle()
        if self._answered:
            self._give_up()
            self.connection.h2.send_headers(self.stream, status_trailers(status, text), True)
            self.connection.schedule_flush()
        else:
            self.refuse(CallRefusal(200, status, text))
        self._owner.slot_freed()


def _of_any_length(headers: Headers) -> Headers:
    """Return a head without content-length: translation changes the length of the body."""
    return [(name, value) for name, value in headers if name != b"content-length"]
