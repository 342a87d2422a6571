"""The watch client's state over the model of etcd, without the core: it must lose and repeat nothing by itself.

This also proves the model: a simulator whose etcd loses events would blame the proxy for them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from coalesce.guarantees import Bookmark, Canceled, Change, Created, Opened, Received, WatchLog, check
from proto.pb import kv_pb2
from proto.scan import Header, WatchResponse
from tests.sim.clients import decode_change
from tests.sim.model_store import Member, Store
from tests.sim.upstream_shell import UpstreamShell

KEYS = (b"a", b"b", b"c")


@dataclass(slots=True, eq=False)
class Upstream:
    """What the listener opens, and its log."""

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

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.store = Store()
        self.members = [Member(self.store, 0xE0 + n, rng.choice((1, 2, 1000))) for n in range(rng.choice((1, 2)))]
        self.open: list[Upstream] = []
        self.all: list[Upstream] = []
        # What every member had at each request for progress.
        self.asked: list[int] = []
        self.shell = UpstreamShell(
            self.members,
            rng.choice((1, 2, 128)),
            lambda *_: "",
            self.received,
            self.progressed,
            self.lost,
            lambda _: None,
            lambda _: None,
        )

    def received(self, upstream: Upstream, response: WatchResponse) -> None:
        records = upstream.log.records
        if response.created:
            upstream.now = response.header.revision
            records.append(Created(response.header.revision))
        elif response.canceled:
            # A watch from now needs the revision of its `created` once more; a client would not.
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
            raise AssertionError(f"{header.revision} is no answer to a request made at {self.asked[number - 1]}")
        for upstream in watches:
            # What it proves is true, also below what is known already; a client would not be told that.
            if header.revision >= max(upstream.marked, upstream.start_revision or 0):
                upstream.marked = header.revision
                upstream.log.records.append(Bookmark(header.revision))

    def lost(self, _: Any, status: int, text: str) -> None:
        raise AssertionError(f"lost: {status} {text}")

    def moves(self) -> list[Any]:
        moves: list[Any] = []
        for member in self.members:
            moves += [lambda member=member: member.apply(self.rng.randint(1, 3))] if member.behind else []
            moves += [lambda member=member: member.sync(self.rng)] if member.unsynced else []
            moves += [member.retry_victims] if member.victims else []
        if self.shell.member is None:
            moves.append(lambda: self.shell.connect(self.rng))
        if self.shell.unregistered:
            moves.append(self.shell.register)
        for link in self.shell.links():
            moves += [link.receive] if link.can_receive else []
            moves += [lambda link=link: link.send(self.rng)] if link.can_send else []
        moves += [lambda stream=stream: self.shell.read(stream) for stream in self.shell.readable()]
        return moves

    def step(self) -> None:
        rng, kind = self.rng, self.rng.random()
        if kind < 0.3:
            self.store.write([(key, b"v") for key in rng.sample(KEYS, rng.randint(1, 3))])
        elif kind < 0.35:
            self.store.compact(self.store.revision - rng.randint(0, 3))
        elif kind < 0.45 and len(self.open) < 5:
            start = rng.choice((None, rng.randint(1, self.store.revision + 3)))
            upstream = Upstream(
                rng.choice(KEYS), rng.choice((b"", b"\0")), start, rng.random() < 0.3, rng.random() < 0.3
            )
            self.open.append(upstream)
            self.all.append(upstream)
            self.shell.open(upstream)
        elif kind < 0.48 and self.open:
            self.shell.close(self.open.pop(rng.randrange(len(self.open))))
        elif kind < 0.53:
            self.asked.append(min(member.revision for member in self.members))
            self.shell.request_progress(len(self.asked))
        elif kind < 0.57:
            self.shell.disconnect()
        elif kind < 0.6:
            self.shell.end_stream(rng)
        for _ in range(rng.randint(0, 8)):
            if moves := self.moves():
                rng.choice(moves)()

    def settle(self) -> None:
        while moves := self.moves():
            for move in moves:
                move()


@pytest.mark.parametrize("block", range(4))
def test_nothing_is_lost_or_repeated(block: int) -> None:
    for seed in range(block * 100, block * 100 + 100):
        harness = Harness(random.Random(seed))
        for _ in range(80):
            harness.step()
        harness.settle()
        for _ in range(8):
            harness.store.write([(key, b"last") for key in KEYS])
        harness.settle()
        truth = harness.store.truth()
        for upstream in harness.all:
            complete = harness.store.revision if upstream in harness.open else None
            assert check(upstream.log, truth, complete) == [], (seed, upstream)
