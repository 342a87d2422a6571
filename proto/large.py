"""Splits a large WatchResponse into messages of whole events while it arrives.

etcd sends all events that a watch has to catch up with, or all events of one transaction, as one message of any size.
Splitting it at its field boundaries while it arrives avoids holding it as a whole and reading it in one turn of the
event loop. Each resulting message has the fields before the events, and some of the events.

etcd writes fields in the order of their numbers, as all encoders of protobuf's own libraries do: the events come last.
"""

from __future__ import annotations

from typing import Final

from proto.fields import ScanError, fields, long_size

STEP_BYTES: Final = 64 * 1024
"""Bytes of events in one message: some milliseconds of decoding if they are small. A larger event is one message."""

_EVENTS: Final = 0x5A
_KNOWN_MAX: Final = _EVENTS


class EventTooLarge(Exception):
    """An event is larger than the maximum."""


# Bytes of the fields before the events: ids, numbers and a cancel reason.
_HEAD_BYTES_MAX: Final = 16 * 1024


class LargeResponse:
    """A WatchResponse of `size` bytes: `add` puts them in, `cut` takes out complete events."""

    __slots__ = ("_data", "_event_bytes_max", "_short", "_skips", "head", "missing")

    def __init__(self, size: int, event_bytes_max: int) -> None:
        # Bytes that have not arrived.
        self.missing = size
        # The fields before the first event; None while they are incomplete.
        self.head: bytes | None = None
        # Bytes that have arrived and are not yet taken by `cut`.
        self._data = bytearray()
        # `_data` ends inside its first event.
        self._short = False
        # The rest of the message is skipped.
        self._skips = False
        self._event_bytes_max = event_bytes_max

    @property
    def unread(self) -> int:
        """Bytes that have arrived and are not yet taken by `cut`."""
        return len(self._data)

    @property
    def readable(self) -> bool:
        """True if `cut` may return a message."""
        return self.head is not None and bool(self._data) and not self._short

    @property
    def done(self) -> bool:
        """True if the whole message has arrived and been taken or skipped."""
        return not self.missing and not self._data

    def add(self, data: bytes) -> None:
        """Take the next bytes, at most as many as are missing. Raises ScanError."""
        self.missing -= len(data)
        if self._skips:
            return
        self._data += data
        self._short = False
        if self.head is None:
            self._find_head()

    def cut(self) -> bytes | None:
        """Return a message with the next whole events; None if more bytes are needed first.

        Raises ScanError, EventTooLarge: that event is not taken, and only `skip` may be called after it.
        """
        head = self.head
        if head is None or not self._data:
            return None
        data = bytes(memoryview(self._data)[:STEP_BYTES])
        end = _events_end(data)
        if end == 0:
            size = self._first_event_bytes(data)
            if size is not None and size > self._event_bytes_max:
                raise EventTooLarge
            if size is None or size > len(self._data):
                if not self.missing:
                    raise ScanError("an event extends past the end of its message")
                self._short = True
                return None
            end = size
            data = bytes(memoryview(self._data)[:end])
        del self._data[:end]
        return head + data[:end]

    def skip(self) -> None:
        """Skip the rest of the message."""
        self._skips = True
        self._data.clear()

    def _find_head(self) -> None:
        """Find where the events begin, and set `head`."""
        data = bytes(memoryview(self._data)[:_HEAD_BYTES_MAX])
        pos = 0
        try:
            for tag, start, _, end, _ in fields(data, 0, len(data)):
                if tag == _EVENTS:
                    pos = start
                    break
                pos = end
        except (IndexError, ScanError):
            # The data ends in the middle of a field, usually an event.
            pass
        if pos < len(data) and data[pos] == _EVENTS:
            self.head = data[:pos]
            del self._data[:pos]
        elif not self.missing or len(self._data) >= _HEAD_BYTES_MAX:
            raise ScanError("a large watch response that does not begin with a short head and events")

    def _first_event_bytes(self, data: bytes) -> int | None:
        """Return the length of the event at the start of `data`; None while it is unknown."""
        try:
            if data[0] != _EVENTS:
                return self._tail_bytes()
            size, body = data[1], 2
            if size > 127:
                size, body = long_size(data, body, size)
        except IndexError:
            return None
        return body + size

    def _tail_bytes(self) -> int | None:
        """Return the length of the fields after the events, all of which must be unknown fields. Raises ScanError."""
        if self.missing:
            return None
        data = bytes(self._data)
        if any(tag <= _KNOWN_MAX for tag, *_ in fields(data, 0, len(data))):
            raise ScanError("a large watch response whose events do not come last")
        return len(data)


def _events_end(data: bytes) -> int:
    """Return the end of the last whole event in the run of events at the start of `data`."""
    pos = 0
    end = len(data)
    try:
        while data[pos] == _EVENTS:
            size, body = data[pos + 1], pos + 2
            if size > 127:
                size, body = long_size(data, body, size)
            if body + size > end:
                break
            pos = body + size
    except IndexError:
        pass
    return pos
