"""Reading events in batches: what follows closely is left to the kernel for a moment, and then read at once.

Each process that an event wakes has a cost that does not depend on the number of clients. In front of several
processes (the hub of `--workers`) each of them pays this cost, so a burst is passed on in a few reads. The first event
after a quiet time is never delayed.
"""

from __future__ import annotations

import asyncio
from typing import Final

from proto.http2 import DataReceived, Event, Stream

JOINED_DATA_BYTES_MAX: Final = 16 * 1024
"""Data is joined up to what one frame carries: what passes on answers in bounded turns counts on parts of that size."""


def joined_data(events: list[Event]) -> list[Event]:
    """Join the data of a stream that several small frames in succession brought: its handler takes it at once."""
    if not _has_runs(events):
        return events
    result: list[Event] = []
    run: list[DataReceived] = []
    left = 0
    for event in events:
        if not isinstance(event, DataReceived):
            _end_run(run, result)
            result.append(event)
            continue
        if run and (event.stream is not run[0].stream or len(event.data) > left):
            _end_run(run, result)
        if not run:
            left = JOINED_DATA_BYTES_MAX
        run.append(event)
        left -= len(event.data)
    _end_run(run, result)
    return result


def _end_run(run: list[DataReceived], result: list[Event]) -> None:
    """Append the data of a run as one event."""
    if len(run) > 1:
        last = run[-1]
        data = b"".join([part.data for part in run])
        result.append(DataReceived(last.stream, data, sum([part.flow_size for part in run]), last.end_stream))
    else:
        result += run
    run.clear()


def _has_runs(events: list[Event]) -> bool:
    """Return whether a stream's data follows its own; 80 ns a call, whose answer is usually between two HEADERS."""
    before: Stream | None = None
    for event in events:
        if type(event) is not DataReceived:
            before = None
        elif event.stream is before:
            return True
        else:
            before = event.stream
    return False


class EventBatches:
    """The batches of one connection."""

    def __init__(self, interval_s: float, loop: asyncio.AbstractEventLoop) -> None:
        """`interval_s`: how long to wait after a read that brought events soon after the previous ones; 0: never."""
        self.interval_s = interval_s
        # The connection's, while it is open.
        self.transport: asyncio.Transport | None = None
        self._loop = loop
        # When a read last brought events, in the time of the loop, which counts in milliseconds.
        self._came_at = -1.0
        self._waits = False

    def events_came(self) -> None:
        """Handle a read that brought events: stop reading for a moment if others came shortly before."""
        now = self._loop.time()
        soon = now - self._came_at <= 2 * self.interval_s
        self._came_at = now
        transport = self.transport
        if soon and not self._waits and transport is not None and not transport.is_closing():
            self._waits = True
            transport.pause_reading()
            self._loop.call_later(self.interval_s, self._read_on)

    def _read_on(self) -> None:
        self._waits = False
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()
