"""A WatchResponse for many watches: the bytes that they share, framed for each of them.

Messages to different watches differ only in the few bytes of the watch id, because a protobuf message is the
concatenation of its fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from typing import Final

from proto.framing import PREFIX_BYTES, pack_prefix
from proto.scan import Header, encode_response, encode_watch_id

# Encoded events up to this size are copied after each watch id, so that a message is one piece. Larger ones are a
# separate piece that all watches share: otherwise a hundred ids would have a hundred copies waiting to be written.
COPIED_BYTES_MAX: Final = 4 * 1024
# Maximum message bytes that are cached, so that watches with equal ids share them.
_REMEMBERED_BYTES_MAX: Final = 1024 * 1024


class SharedResponse:
    """A response to many watches: one message, or a run of fragments."""

    __slots__ = ("_bytes_left", "_joined", "_remembered", "event_count", "first_revision", "header", "size")

    def __init__(self, header: Header, joined: tuple[bytes, ...], first_revision: int, event_count: int) -> None:
        """`joined`: the encoded events, one bytes object per message."""
        # Its revision is that of the last event.
        self.header = header
        self._joined = joined
        # The revision of the first event.
        self.first_revision = first_revision
        self.event_count = event_count
        # Bytes of one delivery, including prefixes, without the watch id.
        if len(joined) == 1:
            self.size = len(joined[0]) + len(header.encoded) + PREFIX_BYTES
        else:
            self.size = sum(map(len, joined)) + len(joined) * (len(header.encoded) + PREFIX_BYTES + 2) - 2
        # By watch id; None until `pieces` or `columns` makes the first.
        self._remembered: dict[int, tuple[bytes, ...]] | None = None
        self._bytes_left = _REMEMBERED_BYTES_MAX

    def pieces(self, watch_id: int) -> tuple[bytes, ...]:
        """Return the framed messages of a watch as pieces, to be sent consecutively, with nothing in between.

        Equal ids get the same objects as long as these are cached; those of the first id always are.
        """
        self._remembered = remembered = self._remembered or {}
        if watch_id in remembered:
            return remembered[watch_id]
        if len(self._joined) == 1:
            return self._whole(((watch_id, encode_watch_id(watch_id), 1),))[0]
        pieces = self._fragments(watch_id)
        if self._bytes_left > 0:
            self._bytes_left -= self.size
            remembered[watch_id] = pieces
        return pieces

    def columns(self, ids: Sequence[tuple[int, bytes, int]]) -> list[list[bytes]]:
        """Return the result of `pieces` for many watches: the first pieces of all of them, then the second ones, ...

        `ids`: each id, its encoded field (all of the same length), and how many watches have it.
        """
        if len(ids) == 1:
            # The common case: one watch per stream, with the id 0.
            watch_id, _, count = ids[0]
            return [[piece] * count for piece in self.pieces(watch_id)]
        rows = self._whole(ids) if len(self._joined) == 1 else [self.pieces(watch_id) for watch_id, _, _ in ids]
        counts = [count for _, _, count in ids]
        return [list(chain.from_iterable(map(repeat, column, counts))) for column in zip(*rows, strict=True)]

    def _whole(self, ids: Sequence[tuple[int, bytes, int]]) -> list[tuple[bytes, ...]]:
        """Return the pieces for each id; the message must not be in fragments."""
        events = self._joined[0]
        encoded = self.header.encoded
        start = pack_prefix(0, len(encoded) + len(ids[0][1]) + len(events)) + encoded
        shared = len(events) > COPIED_BYTES_MAX
        self._remembered = remembered = self._remembered or {}
        rows = []
        for watch_id, field, _ in ids:
            pieces = remembered.get(watch_id)
            if pieces is None:
                pieces = (start + field, events) if shared else (start + field + events,)
                if self._bytes_left > 0:
                    self._bytes_left -= len(pieces[0])
                    remembered[watch_id] = pieces
            rows.append(pieces)
        return rows

    def message(self, watch_id: int) -> bytes | None:
        """Return the framed message of a watch, without caching it; None if there is more than one message."""
        joined = self._joined
        if len(joined) > 1:
            return None
        message = self.header.encoded + (encode_watch_id(watch_id) + joined[0] if watch_id else joined[0])
        return pack_prefix(0, len(message)) + message

    def _fragments(self, watch_id: int) -> tuple[bytes, ...]:
        last = len(self._joined) - 1
        pieces: list[bytes] = []
        for place, events in enumerate(self._joined):
            start = encode_response(self.header, watch_id, fragment=place < last)
            start = pack_prefix(0, len(start) + len(events)) + start
            # As in `_whole`: large events are one object for all ids.
            pieces += (start, events) if len(events) > COPIED_BYTES_MAX else (start + events,)
        return tuple(pieces)
