"""The watch client's state against a model of etcd, in seeded orders: no event lost or repeated, proofs true."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random

import pytest

from proto.scan import Header, WatchResponse
from tests.upstream.model_etcd import ModelStore, ModelStream
from tests.upstream.stories import Opened
from upstream.watching.effects import CloseStream, OpenStream, Progressed, WatchEffect, WatchLost, WatchReceived, Write
from upstream.watching.state import WatchState
from upstream.watching.stream import OpenedWatch, WatchStream

SEEDS = 300
STEPS = 400


class Seen:
    """What one watch has received, checked against what it may receive."""

    def __init__(self, watch: Opened) -> None:
        self.watch = watch
        # The first revision it must still receive; None = now, until created.
        self.due = watch.start_revision
        self.created = False
        self.over = False

    def take(self, response: WatchResponse, store: ModelStore) -> None:
        """Check one response."""
        assert not self.over, "told after its end"
        if response.created:
            assert not self.created, "created twice"
            self.created = True
            if self.due is None:
                self.due = response.header.revision + 1
            return
        assert self.created, "told before created"
        assert self.due is not None
        if response.canceled:
            assert self.due < response.compact_revision, "cancelled though nothing was compacted that it needs"
            self.over = True
            return
        if not response.events:
            self.prove(response.header.revision)
            return
        revisions = [event.revision for event in response.events]
        if self.watch.start_revision is None and revisions[:1] == [self.due - 1]:
            # An event at the revision of `created`.
            revisions = revisions[2:]
            if not revisions:
                return
        assert revisions == [r for r in range(self.due, revisions[-1] + 1) for _ in range(2)], "lost, twice or cut"
        assert revisions[-1] <= store.revision
        self.due = revisions[-1] + 1

    def prove(self, revision: int) -> None:
        """Check that it has all events through a revision that was reported complete."""
        assert self.due is not None
        assert self.due > revision, f"{revision} is not complete: {self.due} has not come"


class Run:
    """One seed: a store, at most one connection, some watches."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.store = ModelStore()
        self.state = WatchState()
        self.seen: dict[int, Seen] = {}
        self.servers: dict[int, tuple[WatchStream, ModelStream]] = {}
        self.proofs = 0
        # The store's revision at each progress request, and answers known to be newer.
        self.asked: list[int] = []
        self.fresh = 0

    def apply(self, effects: Iterable[WatchEffect]) -> None:
        """Carry out the state's effects."""
        for effect in effects:
            if isinstance(effect, OpenStream):
                self.servers[id(effect.stream)] = (effect.stream, ModelStream(self.store, self.random))
            elif isinstance(effect, CloseStream):
                _, server = self.servers.pop(id(effect.stream))
                self.store.streams.remove(server)
            elif isinstance(effect, Write):
                if id(effect.stream) in self.servers:
                    self.servers[id(effect.stream)][1].inbox.append(effect.message)
            elif isinstance(effect, WatchReceived):
                self.seen[id(effect.watch)].take(effect.response, self.store)
            elif isinstance(effect, Progressed):
                self.progressed(effect.watches, effect.header)
                if effect.number:
                    self.fresh += 1
                    assert effect.header.revision >= self.asked[effect.number - 1], "older than what was asked"
            else:
                assert not isinstance(effect, WatchLost), "nothing can be lost here"

    def progressed(self, watches: Iterable[OpenedWatch], header: Header) -> None:
        """Check a proof."""
        for watch in watches:
            self.proofs += 1
            self.seen[id(watch)].prove(header.revision)

    def open(self) -> None:
        """Open a watch: now, in the past, in the future; trunk or backfill."""
        start = self.random.choice([None, None, self.random.randint(1, self.store.revision + 4)])
        watch = Opened(
            b"a",
            b"c",
            start_revision=start,
            is_backfill=start is not None and self.random.random() < 0.3,
            token=self.random.choice([None, b"t"]),
        )
        self.seen[id(watch)] = Seen(watch)
        self.apply(self.state.open(watch))

    def close(self) -> None:
        """Close a watch."""
        if self.seen:
            seen = self.random.choice(list(self.seen.values()))
            seen.over = True
            self.apply(self.state.close(seen.watch))

    def disconnect(self) -> None:
        """Lose the connection."""
        self.state.disconnect()
        self.servers.clear()
        self.store.streams.clear()

    def connect(self) -> None:
        """Connect, if there is no connection."""
        if not self.state.connected:
            self.apply(self.state.connect(True, self.random.choice([0, self.store.revision])))

    def serve(self) -> None:
        """Have one stream's server take a step, and pass on its output."""
        if not self.servers:
            return
        stream, server = self.random.choice(list(self.servers.values()))
        step: Callable[[], WatchResponse | None] = self.random.choice([server.handle, server.catch_up, server.send])
        response = step()
        if response is not None:
            self.apply(self.state.received(stream, response))

    def notify(self) -> None:
        """Have all servers send progress_notify."""
        for _, server in self.servers.values():
            server.notify()

    def request_progress(self) -> None:
        """Request progress."""
        self.asked.append(self.store.revision)
        self.apply(self.state.request_progress(len(self.asked)))

    def step(self) -> None:
        """Take one random step."""
        steps: list[tuple[Callable[[], None], float]] = [
            (self.serve, 60),
            (self.store.put, 6),
            (self.open, 3),
            (self.close, 1.5),
            (self.connect, 3),
            (self.disconnect, 0.7),
            (self.request_progress, 4),
            (lambda: self.store.compact(self.random.randint(1, self.store.revision)), 0.5),
            (self.notify, 0.5),
        ]
        self.random.choices([step for step, _ in steps], [weight for _, weight in steps])[0]()

    def settle(self) -> None:
        """Let all responses arrive, and check that they did."""
        self.connect()
        for _ in range(100_000):
            if not any(server.busy for _, server in self.servers.values()):
                break
            self.serve()
        for seen in self.seen.values():
            if not seen.over:
                assert seen.created
                assert seen.due is not None
                assert seen.due > self.store.revision, "did not get all"


@pytest.mark.parametrize("block", range(10))
def test_nothing_lost_nothing_twice_proofs_true(block: int) -> None:
    proofs = fresh = 0
    for seed in range(block * SEEDS // 10, (block + 1) * SEEDS // 10):
        run = Run(seed)
        try:
            for _ in range(STEPS):
                run.step()
            run.settle()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        proofs += run.proofs
        fresh += run.fresh
    assert proofs > 20, "the model hardly ever answers progress requests"
    assert fresh > 20, "hardly any answer is known to be new"
