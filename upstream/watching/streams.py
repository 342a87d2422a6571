"""Which stream carries which watch, so that a watch that blocks or ends its stream does not affect the others.

etcd sends the responses of a stream one after the other, and ends a stream for one bad request (a create that is larger
than its --max-request-bytes allows). An answer to a progress request is for all watches of its stream, and handling it
is one step. So a token has one stream for each 10,000 of its live watches, and others have separate ones:

- each backfill has a stream of its own, since it can be paused;
- watches that have to catch up share a few streams: their first responses may be large;
- large creates share a few streams: etcd, or a proxy in front of it, may refuse one;
- creates that were not answered when their stream ended are tried on separate streams (see `suspects`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from upstream.watching.stream import Registration, StreamKind, WatchStream

STREAMS_MAX: Final = {StreamKind.CATCH_UP: 16, StreamKind.LARGE: 8, StreamKind.SUSPECT: 8}
"""Maximum streams of these kinds, for all tokens together; beyond it watches share them, or suspects wait."""

WATCHES_PER_STREAM_MAX: Final = 10_000
"""Maximum live watches of a shared stream: an answer to a progress request takes 0.9 us of CPU for each."""

LARGE_CREATE_BYTES: Final = 64 * 1024
"""A create with this many bytes of key and range_end is large: etcd takes 512 KiB with any --max-request-bytes."""


def kind_of(registration: Registration, *, is_live: bool) -> StreamKind:
    """Return the kind of stream that a registration belongs to; `is_live`: it has nothing to catch up with."""
    watch = registration.watch
    if watch.is_backfill:
        return StreamKind.BACKFILL
    if registration.group is not None:
        return StreamKind.SUSPECT
    if len(watch.key) + len(watch.range_end) >= LARGE_CREATE_BYTES:
        return StreamKind.LARGE
    return StreamKind.SHARED if is_live else StreamKind.CATCH_UP


class Streams:
    """The open streams."""

    def __init__(self, streams_max: Mapping[StreamKind, int] = STREAMS_MAX) -> None:
        self._max = streams_max
        # Of each token, the newest last.
        self._shared: dict[bytes | None, list[WatchStream]] = {}
        self._backfills: dict[int, WatchStream] = {}
        # The streams of the bounded kinds.
        self._few: dict[StreamKind, list[WatchStream]] = {kind: [] for kind in STREAMS_MAX}

    def __iter__(self) -> Iterator[WatchStream]:
        for streams in self._shared.values():
            yield from streams
        yield from self._backfills.values()
        for streams in self._few.values():
            yield from streams

    def find(self, kind: StreamKind, token: bytes | None, group: int | None) -> WatchStream | None:
        """Return the stream for a watch. None: it needs a new one, see `is_full`."""
        if kind is StreamKind.SHARED:
            return self._with_room(token)
        if kind is StreamKind.BACKFILL:
            return None
        own = [stream for stream in self._few[kind] if stream.token == token]
        if kind is StreamKind.SUSPECT:
            return next((stream for stream in own if stream.group == group), None)
        if not self.is_full(kind):
            return None
        return min(own, key=lambda stream: stream.live, default=None) or self._with_room(token)

    def _with_room(self, token: bytes | None) -> WatchStream | None:
        """Return a shared stream of the token that takes a further watch: the newest one, as a rule."""
        streams = reversed(self._shared.get(token, ()))
        return next((stream for stream in streams if stream.live < WATCHES_PER_STREAM_MAX), None)

    def is_full(self, kind: StreamKind) -> bool:
        """Whether the number of streams of a kind has reached its maximum."""
        return kind in self._few and len(self._few[kind]) >= self._max[kind]

    def add(self, stream: WatchStream) -> None:
        """Add a new stream."""
        if stream.kind is StreamKind.SHARED:
            self._shared.setdefault(stream.token, []).append(stream)
        elif stream.kind is StreamKind.BACKFILL:
            self._backfills[id(stream)] = stream
        else:
            self._few[stream.kind].append(stream)

    def remove(self, stream: WatchStream) -> None:
        """Remove a stream; one that was removed already is ignored."""
        if stream.kind is StreamKind.SHARED:
            streams = self._shared.get(stream.token, [])
            if stream in streams:
                streams.remove(stream)
            if not streams:
                self._shared.pop(stream.token, None)
        elif stream.kind is StreamKind.BACKFILL:
            self._backfills.pop(id(stream), None)
        elif stream in self._few[stream.kind]:
            self._few[stream.kind].remove(stream)
