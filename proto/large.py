"""
A WatchResponse that is too large to be read in one go, cut into messages of whole events.

etcd sends what a watch has to catch up with, or what one transaction did to its range, as one message of any size. It
is cut where its fields say while it still comes in, so that it is neither held as a whole nor read in one turn of the
event loop. Each message it is cut into has the fields that came before the events, and some of these.

etcd, as every encoder of protobuf's own libraries, writes fields in the order of their numbers: the events come last.
"""

from __future__ import annotations

from typing import Final

from proto.fields import ScanError, fields, long_size

STEP_BYTES: Final = 64 * 1024
"""Bytes of events in one cut: some milliseconds of reading when they are small. A larger event is one cut."""

_EVENTS: Final = 0x5A
_KNOWN_MAX: Final = _EVENTS


class EventTooLarge(Exception):
    """An event is larger than the maximum."""


# Ids and numbers, and why a watch was cancelled.
_HEAD_BYTES_MAX: Final = 16 * 1024


class LargeResponse:
    """One such message of `size` bytes: they are put in with `add`, and `cut` takes out what is complete."""

    __slots__ = ("_data", "_event_bytes_max", "_short", "_skips", "head", "missing")

    def __init__(self, size: int, event_bytes_max: int) -> None:
        # Bytes that have not come.
        self.missing = size
        # The fields before the first event; None while they are not complete.
        self.head: bytes | None = None
        # What has come and is not cut.
        self._data = bytearray()
        # It ends inside of its first event.
        self._short = False
        # The rest is passed over.
        self._skips = False
        self._event_bytes_max = event_bytes_max

    @property
    def unread(self) -> int:
        """Bytes that have come and are not cut."""
        return len(self._data)

    @property
    def readable(self) -> bool:
        """`cut` may return something."""
        return self.head is not None and bool(self._data) and not self._short

    @property
    def done(self) -> bool:
        """Nothing is left to be cut."""
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
        """
        Return a message of the next whole events; None when more has to come first.

        Raises ScanError, EventTooLarge: that event is not taken, and `skip` is all that can follow.
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
                    raise ScanError("an event reaches over the end of its message")
                self._short = True
                return None
            end = size
            data = bytes(memoryview(self._data)[:end])
        del self._data[:end]
        return head + data[:end]

    def skip(self) -> None:
        """Pass the rest over."""
        self._skips = True
        self._data.clear()

    def _find_head(self) -> None:
        """Find out where the events begin."""
        data = bytes(memoryview(self._data)[:_HEAD_BYTES_MAX])
        pos = 0
        try:
            for tag, start, _, end, _ in fields(data, 0, len(data)):
                if tag == _EVENTS:
                    pos = start
                    break
                pos = end
        except (IndexError, ScanError):
            # It ends in the middle of a field, an event as a rule.
            pass
        if pos < len(data) and data[pos] == _EVENTS:
            self.head = data[:pos]
            del self._data[:pos]
        elif not self.missing or len(self._data) >= _HEAD_BYTES_MAX:
            raise ScanError("a large watch response that does not begin with a short head and events")

    def _first_event_bytes(self, data: bytes) -> int | None:
        """Return the length of the event that `data` begins with; None while that is not known."""
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
        """Return the length of the fields behind the events, none of which may say more about the response."""
        if self.missing:
            return None
        data = bytes(self._data)
        if any(tag <= _KNOWN_MAX for tag, *_ in fields(data, 0, len(data))):
            raise ScanError("a large watch response whose events do not come last")
        return len(data)


def _events_end(data: bytes) -> int:
    """Return where the last whole event ends of those that `data` begins with."""
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
