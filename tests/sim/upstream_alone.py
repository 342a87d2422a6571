"""The watch client's state with the model of etcd and with the bundled store: it must not lose or repeat an event.

This also proves the model: a simulator whose etcd loses events would blame the proxy for them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from coalesce.guarantees.checkers import Bookmark, Canceled, Change, Created, Opened, Received, WatchLog, check
from proto.pb import kv_pb2
from proto.scan import Header, WatchResponse
from tests.sim.clients import decode_change
from tests.sim.failure import SimulationFailure
from tests.sim.model_store import Member, Store
from tests.sim.parts import REAL, Parts
from tests.sim.permissions import Permissions
from tests.sim.store_member import StoreMember
from tests.sim.upstream_shell import RESOURCE_EXHAUSTED, AnyMember, Callbacks, UpstreamShell

KEYS = (b"a", b"b", b"c")
POISON = b"poison"
STEPS = 80
_MOVES_MAX = 20_000


@dataclass(slots=True, eq=False)
class Upstream:
    """One watch of the listener, and its log."""

    key: bytes
    range_end: bytes
    start_revision: int | None
    prev_kv: bool
    is_backfill: bool
    token: bytes | None = None
    log: WatchLog = field(init=False)
    # The revision of its `created`, and of its last event or bookmark.
    now: int = 0
    marked: int = 0

    def __post_init__(self) -> None:
        self.log = WatchLog(self.key, self.range_end, prev_kv=self.prev_kv, records=[Opened(self.start_revision)])


class Harness:
    """A store, its members and one watch client whose listener only writes logs."""

    def __init__(self, rng: random.Random, bundled: bool, parts: Parts = REAL) -> None:
        self.rng = rng
        self.store = Store()
        self.members: list[AnyMember] = []
        for member_id in range(0xE0, 0xE0 + rng.choice((1, 2))):
            batch_revisions_max = rng.choice((1, 2, 1000))
            if bundled:
                nobody = Permissions(enabled=False, keys=KEYS)
                self.members.append(StoreMember(parts.store, self.store, member_id, nobody, batch_revisions_max))
            else:
                self.members.append(Member(self.store, member_id, batch_revisions_max))
        self.open: list[Upstream] = []
        self.all: list[Upstream] = []
        # Whether there are watches whose create ends its stream.
        self.poisons = rng.random() < 0.5
        # Each member's revision at each progress request.
        self.asked: list[int] = []
        self.shell = UpstreamShell(
            self.members,
            rng.choice((1, 2, 128)),
            lambda *_: "",
            Callbacks(self.received, self.progressed, self.lost, lambda _: None),
            parts,
            dice=random.Random(0),
            streams_max=(rng.choice((0, 0, 1, 16)), rng.choice((1, 8))),
            whole=rng.random() < 0.5,
        )
        self.shell.poisoned.add((POISON, b""))

    def received(self, upstream: Upstream, response: WatchResponse) -> None:
        records = upstream.log.records
        if response.created:
            upstream.now = response.header.revision
            records.append(Created(response.header.revision))
        elif response.canceled:
            # A watch from now needs the revision of its `created` again; a client would not.
            if upstream.start_revision is not None or response.compact_revision > upstream.now + 1:
                records.append(Canceled(response.compact_revision, ""))
            self.open.remove(upstream)
        elif not response.events:
            upstream.marked = response.header.revision
            records.append(Bookmark(response.header.revision))
        else:
            upstream.marked = response.events[-1].revision
            # A watch from now may or may not get the event at the very revision of its `created`.
            changes = [self.change(event) for event in response.events]
            if upstream.start_revision is None:
                changes = [change for change in changes if change.mod_revision != upstream.now]
            records.append(Received(response.header.revision, changes))

    def change(self, event: Any) -> Change:
        body = event.encoded[1:]
        while body[0] & 128:
            body = body[1:]
        return decode_change(kv_pb2.Event.FromString(body[1:]))

    def progressed(self, watches: list[Any], header: Header, number: int) -> None:
        if number and header.revision < self.asked[number - 1]:
            raise AssertionError(f"{header.revision} does not answer a request made at {self.asked[number - 1]}")
        for upstream in watches:
            # Its proof is true, also below an earlier one; a client would not get that.
            if header.revision >= max(upstream.marked, upstream.start_revision or 0):
                upstream.marked = header.revision
                upstream.log.records.append(Bookmark(header.revision))

    def lost(self, upstream: Upstream, status: int, text: str) -> None:
        if upstream.key != POISON or (status, text) != (RESOURCE_EXHAUSTED, self.shell.poison_text):
            raise AssertionError(f"lost: {upstream} {status} {text}")
        self.open.remove(upstream)

    def moves(self) -> list[Any]:
        moves: list[Any] = []
        for member in self.members:
            moves += [member.apply_some] if member.behind else []
            moves += [member.sync] if member.unsynced else []
            moves += [member.retry_victims] if member.victims else []
            moves += [member.compact_step] if member.compacting else []
        self.shell.add_moves(moves)
        return moves

    def step(self) -> None:
        rng, kind = self.rng, self.rng.random()
        if kind < 0.35:
            self._write(kind)
        elif kind < 0.53:
            self._watch(kind)
        elif kind < 0.57:
            self.shell.disconnect()
        elif kind < 0.6:
            self.shell.end_stream(rng)
        elif kind < 0.62:
            member = rng.choice(self.members)
            self.shell.lose_member(member)
            member.restart()
        elif kind < 0.65:
            self.shell.rotate(rng)
        elif kind < 0.68:
            self.shell.end_leaving(rng)
        elif kind < 0.7:
            self.shell.limited = not self.shell.limited
        elif kind < 0.78:
            # Compacted before a slow future watch reaches it.
            for _ in range(rng.randint(2, 4)):
                self._write(0)
            self.store.compact(self.store.revision)
        for _ in range(rng.randint(0, 8)):
            if moves := self.moves():
                rng.choice(moves)(rng)

    def _write(self, kind: float) -> None:
        """Write, or compact."""
        rng = self.rng
        if kind < 0.3:
            self.store.write([(key, b"v") for key in rng.sample(KEYS, rng.randint(1, 3))])
        else:
            self.store.compact(self.store.revision - rng.randint(0, 3))

    def _watch(self, kind: float) -> None:
        """Open a watch, close one, or request progress."""
        rng = self.rng
        if kind < 0.45 and len(self.open) < 5:
            future = self.store.revision + rng.randint(1, 5)
            start = rng.choice((None, rng.randint(1, future), future))
            upstream = Upstream(
                rng.choice(KEYS), rng.choice((b"", b"\0")), start, rng.random() < 0.3, rng.random() < 0.3
            )
            self.open.append(upstream)
            self.all.append(upstream)
            self.shell.open(upstream)
        elif kind < 0.46 and self.poisons:
            upstream = Upstream(POISON, b"", rng.choice((None, 1)), False, rng.random() < 0.3)
            self.open.append(upstream)
            self.shell.open(upstream)
        elif kind < 0.48 and self.open:
            self.shell.close(self.open.pop(rng.randrange(len(self.open))))
        else:
            self.asked.append(min(member.revision for member in self.members))
            self.shell.request_progress(len(self.asked))

    def settle(self) -> None:
        made = 0
        while moves := self.moves():
            for move in moves:
                move(self.rng)
            made += len(moves)
            if made > _MOVES_MAX:
                raise SimulationFailure("the watch client never becomes idle")


def run_alone(seed: int, bundled: bool, parts: Parts = REAL) -> str:
    """Run a seed on the model or on the bundled store; return the finding, or ""."""
    harness = Harness(random.Random(seed), bundled, parts)
    try:
        for _ in range(STEPS):
            harness.step()
        harness.settle()
        for _ in range(8):
            harness.store.write([(key, b"last") for key in KEYS])
        harness.settle()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    truth = harness.store.truth()
    for upstream in harness.all:
        complete = harness.store.revision if upstream in harness.open else None
        if violations := check(upstream.log, truth, complete):
            return f"{upstream}: {violations}"
    if any(upstream.key == POISON for upstream in harness.open):
        return "a create that ends its stream was not refused"
    watched = sum(len(link.spans) for link in harness.shell.links())
    return "" if watched == len(harness.open) else f"{watched} watches at the server, {len(harness.open)} wanted"
