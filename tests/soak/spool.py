"""The records that clients write while they run, and their conversion to the logs of the guarantee checkers.

A client process appends records to a file: watch, kind, and the received bytes. It decodes only what it needs itself,
so that recording does not slow it down.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import msgspec

from coalesce.guarantees.checkers import Bookmark, Canceled, Created, Opened, Received, WatchLog
from proto.pb import rpc_pb2
from proxy.measuring.load.judge import change_of

HEAD = struct.Struct("<IBI")
"""Watch number, kind, size of the body."""


class Kind(IntEnum):
    """The kind of a record."""

    PLAN = 0
    """A planned watch (msgpack of WatchPlan)."""
    OPENED = 1
    """A create was sent; the body is its start revision, 0 for now."""
    RESPONSE = 2
    """A WatchResponse was received; the body is its bytes from the wire."""
    LEFT = 3
    """The client has given it up: it may be incomplete."""


class WatchPlan(msgspec.Struct):
    """One watch of a client."""

    key: bytes
    range_end: bytes = b""
    start_revision: int = 0
    no_put: bool = False
    no_delete: bool = False
    prev_kv: bool = False
    fragment: bool = False
    progress_notify: bool = False


class Spool:
    """Appends records to a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=1 << 18)
        self._watches = 0

    def plan(self, plan: WatchPlan) -> int:
        """Record a new watch; return its number."""
        self._watches += 1
        self.note(self._watches, Kind.PLAN, msgspec.msgpack.encode(plan))
        return self._watches

    def note(self, watch: int, kind: Kind, body: bytes = b"") -> None:
        """Append a record."""
        self._file.write(HEAD.pack(watch, kind, len(body)))
        self._file.write(body)

    def close(self) -> None:
        """Write the remaining records."""
        self._file.close()


@dataclass
class Life:
    """The log of one watch, and the revisions that it should have at the end."""

    log: WatchLog
    left: bool = False
    events: int = 0


def read(path: Path) -> Iterator[Life]:
    """Yield the lives recorded in a spool."""
    bodies: dict[int, list[tuple[Kind, bytes]]] = {}
    data = memoryview(path.read_bytes())
    at = 0
    while at < len(data):
        watch, kind, size = HEAD.unpack_from(data, at)
        at += HEAD.size
        bodies.setdefault(watch, []).append((Kind(kind), bytes(data[at : at + size])))
        at += size
    while bodies:
        # One by one, so that only the bytes of all of them are in memory, not their events.
        yield _life(bodies.pop(next(iter(bodies))))


def _life(records: list[tuple[Kind, bytes]]) -> Life:
    plan = msgspec.msgpack.decode(records[0][1], type=WatchPlan)
    life = Life(WatchLog(plan.key, plan.range_end, plan.no_put, plan.no_delete, plan.prev_kv))
    for kind, body in records[1:]:
        if kind is Kind.OPENED:
            life.log.records.append(Opened(int(body) or None))
        elif kind is Kind.LEFT:
            life.left = True
        else:
            _add(life, rpc_pb2.WatchResponse.FromString(body))
    return life


def _add(life: Life, response: rpc_pb2.WatchResponse) -> None:
    records = life.log.records
    if response.created:
        records.append(Created(response.header.revision))
    if response.events:
        changes = [change_of(event) for event in response.events]
        life.events += len(changes)
        records.append(Received(response.header.revision, changes, response.fragment))
    elif response.canceled:
        records.append(Canceled(response.compact_revision, response.cancel_reason))
    elif not response.created:
        records.append(Bookmark(response.header.revision))
