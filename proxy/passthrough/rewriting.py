"""Changing a message piece by piece, so that a large one does not delay other clients.

An encoded message is the concatenation of its fields, and each element of a repeated field is encoded separately. So a
message whose size is in its repeated fields (the key-values of a RangeResponse, the operations of a transaction) is cut
between elements into pieces of a bounded size; each piece is decoded, changed and encoded as a message of its own, and
the results are joined. A large element (an operation that holds a whole RangeResponse) is cut recursively, and gets a
new length. Everything else is one piece: a single key-value, a request of scalar fields.

Cutting is correct only for types whose change consists of changing each element: `DIVISIBLE` lists them. A field that
is not repeated may occur twice, and decoders merge the two. So an operation is cut only if it has a single field;
otherwise a client could get the two ends of a range changed independently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from proto.fields import ScanError, fields, varint
from proto.pb import rpc_pb2

Change = Callable[[Any], None]
"""Changes a message in place."""

Changes = Mapping[str, Change]
"""By the full name of a type: the change of the message itself, and of each type within it that may be large."""

PIECE_BYTES: Final = 16 * 1024
"""Messages up to this size are changed at once, larger ones in pieces of about this size. A piece takes a few
milliseconds if it consists of empty operations, and a tenth of a millisecond if it has key-values."""

DEPTH_MAX: Final = 32
"""Maximum depth of nested messages that are cut. Transactions may be nested, usually one or two levels deep."""

DIVISIBLE: Final = frozenset(
    kind.DESCRIPTOR.full_name
    for kind in (
        *(rpc_pb2.RangeResponse, rpc_pb2.DeleteRangeResponse, rpc_pb2.TxnResponse, rpc_pb2.TxnRequest),
        *(rpc_pb2.LeaseTimeToLiveResponse, rpc_pb2.MemberListResponse),
    )
)
"""Types whose change consists of changing the elements of their repeated fields."""

OPERATIONS: Final = frozenset(kind.DESCRIPTOR.full_name for kind in (rpc_pb2.RequestOp, rpc_pb2.ResponseOp))
"""Types that hold one of several messages; they are cut if they have no other field."""

_BYTES: Final = 2
"""The wire type of bytes, strings and messages."""


def changed(kind: type[Message], change: Change, message: bytes) -> bytes:
    """Return an encoded message, changed in one step. Raises DecodeError."""
    parsed = kind.FromString(message)
    change(parsed)
    return parsed.SerializeToString()


class Rewriting:
    """A message that is being changed: call `step` until it returns True."""

    __slots__ = ("_steps", "pieces", "size")

    def __init__(self, kind: type[Message], changes: Changes, message: bytes) -> None:
        self.pieces: list[bytes] = []
        """The changed message, complete when `step` has returned True."""
        self.size = 0
        """Bytes of `pieces` so far."""
        self._steps = self._message(
            cast(Descriptor, kind.DESCRIPTOR), changes, message, 0, len(message), self.pieces, 0
        )

    def step(self) -> bool:
        """Change one more piece; return True when the message is complete. Raises DecodeError."""
        try:
            return next(self._steps, self) is self
        except (ScanError, IndexError) as error:
            raise DecodeError(str(error)) from None

    def _message(
        self, kind: Descriptor, changes: Changes, data: bytes, start: int, end: int, out: list[bytes], depth: int
    ) -> Iterator[None]:
        """Change data[start:end], a message of `kind`, into `out`."""
        if end - start <= PIECE_BYTES or kind.full_name not in DIVISIBLE:
            yield from self._piece(kind, changes, data[start:end], out)
            return
        begun = start
        for tag, at, body, after, _ in fields(data, start, end):
            inner = _entered(kind, tag, changes) if after - body > PIECE_BYTES else None
            if inner is not None:
                if begun < at:
                    yield from self._piece(kind, changes, data[begun:at], out)
                yield from self._within(inner, changes, data, (at, body, after), out, depth + 1)
                begun = after
            elif after - begun >= PIECE_BYTES:
                yield from self._piece(kind, changes, data[begun:after], out)
                begun = after
        if begun < end:
            yield from self._piece(kind, changes, data[begun:end], out)

    def _piece(self, kind: Descriptor, changes: Changes, message: bytes, out: list[bytes]) -> Iterator[None]:
        done = changed(GetMessageClass(kind), changes[kind.full_name], message)
        out.append(done)
        self.size += len(done)
        yield

    def _within(
        self, kind: Descriptor, changes: Changes, data: bytes, place: tuple[int, int, int], out: list[bytes], depth: int
    ) -> Iterator[None]:
        """Change a field that holds a large message; `place`: offsets of its tag, its content and the next field."""
        if depth > DEPTH_MAX:
            raise DecodeError("too many messages within each other")
        at, body, after = place
        inner: list[bytes] = []
        if kind.full_name in OPERATIONS:
            yield from self._operation(kind, changes, data, body, after, inner, depth)
        else:
            yield from self._message(kind, changes, data, body, after, inner, depth)
        # The tag is copied; the length is encoded again.
        head = data[at : _tag_end(data, at)] + varint(sum(map(len, inner)))
        self.size += len(head)
        out.append(head)
        out.extend(inner)

    def _operation(
        self, kind: Descriptor, changes: Changes, data: bytes, start: int, end: int, out: list[bytes], depth: int
    ) -> Iterator[None]:
        """Change a large operation, a type in `OPERATIONS`."""
        tag, at, body, after, _ = next(fields(data, start, end))
        if after != end:
            raise DecodeError(f"a {kind.name} of more than one field")
        inner = _entered(kind, tag, changes)
        if inner is None:
            yield from self._piece(kind, changes, data[start:end], out)
        else:
            yield from self._within(inner, changes, data, (at, body, after), out, depth + 1)


def _entered(kind: Descriptor, tag: int, changes: Changes) -> Descriptor | None:
    """Return the type of the message in a field, or None if it must not be changed separately."""
    field: FieldDescriptor | None = kind.fields_by_number.get(tag >> 3)
    if field is None or tag & 7 != _BYTES or field.message_type is None:
        return None
    if kind.full_name not in OPERATIONS and not field.is_repeated:
        return None
    inner = field.message_type
    divisible = inner.full_name in DIVISIBLE or inner.full_name in OPERATIONS
    return inner if divisible and inner.full_name in changes else None


def _tag_end(data: bytes, pos: int) -> int:
    while data[pos] > 127:
        pos += 1
    return pos + 1
