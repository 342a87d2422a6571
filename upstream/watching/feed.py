"""From the bytes of a watch stream to responses: small ones at once, large ones in pieces.

A large response (100,000 keys deleted at once, a thousand transactions to catch up with) would block the event loop for
half a second and need memory for all of it. So it is cut while it arrives, see `proto.large`, and one piece is taken
per turn of the loop (`step`). Meanwhile other responses of the stream overtake it, except those of the same watch, and
answers to progress requests, which concern all watches. `created` and refusals do not wait: etcd itself sends these
ahead of events. The shell may also hold small responses back (`pass_on`), because there are so many of them, or their
watch has so many clients, that the events of other watches would come late; they are overtaken in the same way.

No I/O: the shell (`call`) and the simulator feed it and call `step`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol

from proto.etcd_errors import reason_of
from proto.framing import PREFIX_BYTES, Status, check_prefix, unpack_prefix
from proto.large import EventTooLarge, LargeResponse
from proto.scan import WatchResponse

LARGE_BYTES: Final = 64 * 1024
"""Responses larger than this are read in pieces."""

JOINED_BYTES_MAX: Final = 4 * 1024
"""The events of a joined response, in bytes: one frame carries it, and windows of 64 KiB take it for many streams."""

JOINED_DELIVERIES_BYTES_MAX: Final = 4 * 1024 * 1024
"""The same, times the clients that it goes to, whose output waits in memory until it is written."""

WITHOUT_EVENTS_MAX: Final = 32
"""Responses without events (answers to creates, progress) that were held back and are taken in one step: 10 us each."""


def joined(responses: list[WatchResponse], clients: Callable[[int], int]) -> list[WatchResponse]:
    """Join the events of one watch that follow each other to one response, as etcd does for a watch that is behind.

    `clients` returns for the id of a watch how many clients it serves; 0: its events are not joined. The responses are
    changed. No run of fragments may be open before them; if they contain a fragment, they are returned as they are.
    """
    if any(response.fragment for response in responses):
        return responses
    result: list[WatchResponse] = []
    left = 0
    for response in responses:
        if result and _follows(result[-1], response) and (left := left - _bytes_of(response)) >= 0:
            _join(result[-1], response)
        else:
            left = _room(response, clients)
            result.append(response)
    return result


def _must_wait(response: WatchResponse, *, same: bool, creates: bool) -> bool:
    """Return whether a response must not overtake those that wait.

    `same`: some are of its watch. `creates`: some answer creates; the first answer is that of the first create.
    """
    if response.created and creates:
        return True
    return same if response.watch_id >= 0 else not response.created


def _room(response: WatchResponse, clients: Callable[[int], int]) -> int:
    """Return the bytes of events that may be joined to a response."""
    count = clients(response.watch_id) if response.plain else 0
    return min(JOINED_BYTES_MAX, JOINED_DELIVERIES_BYTES_MAX // count) - _bytes_of(response) if count else -1


def _follows(last: WatchResponse, response: WatchResponse) -> bool:
    return (
        last.plain
        and response.plain
        and response.watch_id == last.watch_id
        and response.events[0].revision > last.events[-1].revision
    )


def _join(last: WatchResponse, response: WatchResponse) -> None:
    last.events += response.events
    last.header = response.header


def _bytes_of(response: WatchResponse) -> int:
    """Return the bytes of the encoded events."""
    return sum([len(event.encoded) for event in response.events])


class LargeMessage(Protocol):
    """A response that is read in pieces."""

    @property
    def watch_id(self) -> int | None:
        """The id of its watch; None while that has not arrived."""

    @property
    def unread(self) -> int:
        """Bytes that have arrived and were not read."""

    @property
    def readable(self) -> bool:
        """The next piece has arrived."""

    @property
    def done(self) -> bool:
        """The last piece was taken."""

    def step(self) -> WatchResponse | None:
        """Take the next piece, marked as a fragment unless it is the last; None: it has not arrived in full."""


class LargePieces:
    """The pieces of one large message."""

    __slots__ = ("_cuts", "_event_bytes_max", "_scan", "watch_id")

    def __init__(self, size: int, scan: Callable[[bytes], WatchResponse], event_bytes_max: int) -> None:
        self._cuts = LargeResponse(size, event_bytes_max)
        self._scan = scan
        self._event_bytes_max = event_bytes_max
        self.watch_id: int | None = None

    @property
    def missing(self) -> int:
        """Bytes that have not arrived."""
        return self._cuts.missing

    @property
    def unread(self) -> int:
        """See `LargeMessage`."""
        return self._cuts.unread

    @property
    def readable(self) -> bool:
        """See `LargeMessage`."""
        return self._cuts.readable

    @property
    def done(self) -> bool:
        """See `LargeMessage`."""
        return self._cuts.done

    def add(self, data: bytes) -> None:
        """Take the next bytes. Raises ScanError."""
        self._cuts.add(data)
        if self.watch_id is None and self._cuts.head is not None:
            self.watch_id = self._scan(self._cuts.head).watch_id

    def step(self) -> WatchResponse | None:
        """See `LargeMessage`. Raises ScanError."""
        try:
            message = self._cuts.cut()
        except EventTooLarge:
            piece = self._scan(self._cuts.head or b"")
            self._cuts.skip()
            # As if etcd had cancelled this watch.
            piece.canceled = True
            text = f"watchmux: an event larger than the maximum ({self._event_bytes_max} bytes)"
            piece.cancel_reason = reason_of(Status.RESOURCE_EXHAUSTED, text)
            return piece
        if message is None:
            return None
        piece = self._scan(message)
        if not self._cuts.done:
            piece.fragment = True
            piece.plain = False
        return piece


class ResponseOrder:
    """The responses of one stream, in an order in which etcd could have sent them."""

    def __init__(self, scan: Callable[[bytes], WatchResponse], event_bytes_max: int) -> None:
        """`scan` reads a message; an event larger than `event_bytes_max` ends its watch."""
        self._scan = scan
        self._event_bytes_max = event_bytes_max
        # The start of an incomplete small message; None between messages, the usual case.
        self._buffer: bytearray | None = None
        # Bytes the buffer must hold before it is examined again.
        self._need = 0
        # A large message that is still arriving.
        self._coming: LargePieces | None = None
        # Large responses that are not fully read and small ones that are held back, oldest first, and the responses
        # that must wait for them.
        self.waiting: deque[LargeMessage | WatchResponse] = deque()
        # How many of them, the last ones, came with the newest bytes.
        self._new = 0
        # The large ones of them; of the others, how many there are of each watch, and the bytes of their events.
        self._large: list[LargeMessage] = []
        self._waiting_ids: dict[int, int] = {}
        self._waiting_bytes = 0
        # Answers to creates among them: these have the order of the creates, which have no other mark.
        self._creates_waiting = 0

    @property
    def behind(self) -> bool:
        """`step` has something to do."""
        if not self.waiting:
            return False
        first = self.waiting[0]
        return isinstance(first, WatchResponse) or first.done or first.readable

    @property
    def has_next(self) -> bool:
        """`step` would return a whole response, not a piece of a large one."""
        return bool(self.waiting) and isinstance(self.waiting[0], WatchResponse)

    @property
    def unread(self) -> int:
        """Bytes of messages that have arrived and wait."""
        return self._waiting_bytes + sum(each.unread for each in self._large)

    def feed(self, data: bytes) -> list[WatchResponse]:
        """
        Take the next bytes of the stream and return the responses to handle now.

        Raises FramingError for a compressed message, and ScanError; the stream cannot be used after that.
        """
        buffer = self._buffer
        self._new = 0
        if buffer is not None:
            buffer += data
            if len(buffer) < self._need:
                return []
            data, self._buffer = bytes(buffer), None
        responses: list[WatchResponse] = []
        scan = self._scan
        pos, end = 0, len(data)
        while pos < end:
            if self._coming is not None:
                taken = min(self._coming.missing, end - pos)
                self._coming.add(data[pos : pos + taken])
                pos += taken
                if not self._coming.missing:
                    self._coming = None
                continue
            if end - pos < PREFIX_BYTES:
                self._need = PREFIX_BYTES
                break
            flag, length = unpack_prefix(data, pos)
            if flag:
                check_prefix(flag, length, False, length)
            if length > LARGE_BYTES:
                self._coming = LargePieces(length, self._scan, self._event_bytes_max)
                self.begin(self._coming)
                pos += PREFIX_BYTES
                continue
            if end - pos - PREFIX_BYTES < length:
                self._need = PREFIX_BYTES + length
                break
            start = pos + PREFIX_BYTES
            pos = start + length
            response = scan(data[start:pos])
            if not self.waiting or self.passes(response):
                responses.append(response)
        if pos < end:
            self._buffer = bytearray(memoryview(data)[pos:])
        return responses

    def begin(self, large: LargeMessage) -> None:
        """Add a large response that begins to arrive."""
        self.waiting.append(large)
        self._large.append(large)
        self._new += 1

    def passes(self, response: WatchResponse) -> bool:
        """Return whether to handle a response now although others are `waiting`; if not, it is queued."""
        watch_id = response.watch_id
        same = watch_id in self._waiting_ids or any(each.watch_id == watch_id for each in self._large)
        waits = _must_wait(response, same=same, creates=self._creates_waiting > 0)
        if waits:
            self.waiting.append(response)
            self._new += 1
            self._count(response)
        return not waits

    def pass_on(
        self, responses: Iterable[WatchResponse], waits: Callable[[WatchResponse], bool]
    ) -> Iterator[WatchResponse]:
        """Yield the responses that `feed` has just returned, without those held back, which `step` returns.

        Held back are those for which `waits` is true in their turn, and what must not overtake these. They are queued
        before all that came after them in the same bytes.
        """
        held: list[WatchResponse] = []
        ids: set[int] = set()
        holds_creates = False
        for response in responses:
            overtakes = bool(held) and _must_wait(response, same=response.watch_id in ids, creates=holds_creates)
            if overtakes or waits(response):
                held.append(response)
                ids.add(response.watch_id)
                holds_creates = holds_creates or response.created
            else:
                yield response
        waiting = self.waiting
        new = [waiting.pop() for _ in range(self._new)] if held else []
        waiting.extend(held)
        waiting.extend(reversed(new))
        for response in held:
            self._count(response)

    def _count(self, response: WatchResponse) -> None:
        """Count a response that waits."""
        self._creates_waiting += response.created
        self._waiting_ids[response.watch_id] = self._waiting_ids.get(response.watch_id, 0) + 1
        self._waiting_bytes += _bytes_of(response)

    def _release(self) -> None:
        """Take the first of those that wait, a whole response, from the queue."""
        response = self.waiting.popleft()
        assert isinstance(response, WatchResponse), "it is not a large one"
        self._creates_waiting -= response.created
        self._waiting_ids[response.watch_id] -= 1
        if not self._waiting_ids[response.watch_id]:
            del self._waiting_ids[response.watch_id]
        self._waiting_bytes -= _bytes_of(response)

    def step(self, clients: Callable[[int], int] = lambda _: 0) -> list[WatchResponse]:
        """Take the next piece of a large response, or the next whole one; empty: none has arrived. Raises ScanError.

        The events that follow are joined to it, see `joined`; of responses without events, several are taken.
        """
        waiting = self.waiting
        while waiting:
            first = waiting[0]
            if isinstance(first, WatchResponse):
                self._release()
                left = _room(first, clients)
                while waiting and isinstance(after := waiting[0], WatchResponse) and _follows(first, after):
                    left -= _bytes_of(after)
                    if left < 0:
                        break
                    self._release()
                    _join(first, after)
                return [first] if first.events else [first, *self._without_events(WITHOUT_EVENTS_MAX - 1)]
            piece = None if first.done else first.step()
            if first.done:
                waiting.popleft()
                self._large.remove(first)
            elif piece is None:
                return []
            if piece is not None:
                return [piece]
        return []

    def _without_events(self, most: int) -> Iterator[WatchResponse]:
        """Take the first of those that wait while they have no events, up to so many."""
        for _ in range(min(most, len(self.waiting))):
            first = self.waiting[0]
            if not isinstance(first, WatchResponse) or first.events:
                return
            self._release()
            yield first
