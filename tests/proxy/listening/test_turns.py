"""Client input is handled in turns of the event loop: a bounded amount of work in each, shared by all connections.

The tests count the work between two turns; they do not measure time.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
from collections import deque
from collections.abc import Iterator
from itertools import pairwise

import pytest

from coalesce.limits import CoreLimits
from proto.framing import Status
from proto.pb import rpc_pb2
from proxy.listening.settings import ListenerSettings
from proxy.listening.turns import PART, SHARE, TurnBudget, in_parts
from proxy.server import Proxy
from proxy.watch.service import (
    ANSWERS_UNREAD_MAX,
    CANCEL_WORK,
    CREATE_WORK,
    PROGRESS_WORK,
    WAITING_TEXT,
)
from proxy.watch.settings import WatchSettings
from proxy.watch.unusual import filters_of
from tests.e2e.floods import FLOODS, GZIP, Sender, cancel, create, filters, flood, progress
from tests.e2e.held import held
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct, proxy_for
from tests.etcd.server import EtcdServer
from tests.waiting import until_async

TURN_WORK = ListenerSettings().http2.turn_work_max


class DeferredConnection:
    """Has `work` to do in pieces of size `piece`, and logs its name at each turn."""

    def __init__(self, turns: TurnBudget, log: list[str], name: str, work: int, piece: int = 1) -> None:
        self.turns, self.log, self.name, self.work, self.piece = turns, log, name, work, piece

    def take_turn(self) -> None:
        """Work as far as the budget allows."""
        self.log.append(self.name)
        while self.work > 0 and self.turns.left > 0:
            self.work -= self.piece
            self.turns.spend(self.piece)
        if self.work > 0:
            self.turns.wait(self)


async def test_turn_is_shared_and_keeps_a_reserve() -> None:
    turns, log = TurnBudget(1_000), list[str]()
    large = [DeferredConnection(turns, log, name, 2 * SHARE) for name in "abcdef"]
    for worker in large:
        turns.wait(worker)
    done = []
    while any(worker.work > 0 for worker in large):
        before = sum(worker.work for worker in large)
        turns._next_turn()
        done.append(before - sum(worker.work for worker in large))
        assert turns.left >= 1_000 // 4
    assert max(done) <= 750 + SHARE
    # Every worker gets its first share before any gets a second one.
    assert log[:6] == list("abcdef")
    assert sorted(log[6:12]) == list("abcdef")


async def test_step_over_budget_is_charged() -> None:
    """The worker that exceeds the budget has had its share, and the turn ends."""
    turns, log = TurnBudget(1_000), list[str]()
    for name in "ab":
        turns.wait(DeferredConnection(turns, log, name, 20_000, piece=10_000))
    turns._next_turn()
    assert log == ["a"]
    turns._next_turn()
    assert log == ["a", "b"]


async def test_budget_is_restored_in_the_next_turn() -> None:
    turns = TurnBudget(1_000)
    turns.spend(5_000)
    assert turns.left == -4_000
    await until_async(lambda: turns.left == 1_000, "the next turn")


async def test_little_work_causes_no_callback() -> None:
    turns = TurnBudget(1_000)
    turns.spend(250)
    assert not turns._turning
    turns.spend(1)
    await until_async(lambda: turns.left == 1_000, "the next turn")


async def test_many_connections_are_handled_in_parts() -> None:
    """For a drain and for the timeout checks, with twenty thousand connections."""
    handled: list[int] = []
    over = asyncio.Event()
    in_parts(range(2 * PART + 1), handled.append, over.set)
    counts = [len(handled)]
    while not over.is_set():
        turn = asyncio.Event()
        asyncio.get_running_loop().call_soon(turn.set)
        await turn.wait()
        counts.append(len(handled))
    assert handled == list(range(2 * PART + 1))
    # Two turns pass between two counts.
    assert max(after - before for before, after in pairwise([0, *counts])) <= 2 * PART


@contextlib.contextmanager
def inputs_by_turn(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the client requests that reach the core, turn by turn of the loop."""
    loop = asyncio.get_running_loop()
    counts = [0]
    engine = proxy.engine

    def counted(name: str) -> None:
        step = getattr(engine, name)

        def one(*arguments: object) -> None:
            counts[-1] += 1
            step(*arguments)

        monkeypatch.setattr(engine, name, one)

    for name in ("create", "cancel", "progress"):
        counted(name)
    over = False

    def turn() -> None:
        counts.append(0)
        if not over:
            loop.call_soon(turn)

    loop.call_soon(turn)
    yield counts
    over = True


WORK = {
    "progress requests": (3_000, PROGRESS_WORK),
    "cancels of unknown ids": (3_000, CANCEL_WORK),
    "creates of an id that is taken": (1_000, CREATE_WORK),
    "creates of one range": (1_000, CREATE_WORK),
    "creates of different ranges": (500, CREATE_WORK),
}


@pytest.mark.parametrize("name", WORK)
async def test_many_messages_of_one_frame_are_handled_in_turns(
    etcd: EtcdServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, work = WORK[name]
    async with proxy_for(etcd) as proxy, direct(etcd) as store, await RawClient.connect(proxy.port) as client:
        stream = await client.open_watch(b"bystander")
        with inputs_by_turn(proxy, monkeypatch) as counts:
            load = asyncio.ensure_future(flood(proxy.port, name, count, streams=3))
            puts = 0
            while not load.done():
                puts += 1
                await store.put(b"bystander", b"%d" % puts)
                await until_async(lambda: len(stream.values) == puts, "the event")  # noqa: B023  # awaited at once
            assert await load == "taken"
        assert sum(counts) >= 3 * count
        # One share may start when the turn is nearly over.
        assert max(counts) <= (TURN_WORK + SHARE) // work + 1
        assert proxy.watches.waiting_bytes == 0


async def test_requests_full_of_filters_are_handled_one_by_one(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has 2 MB when decompressed: as much work as a whole turn."""
    async with proxy_for(etcd) as proxy, direct(etcd) as store:
        with inputs_by_turn(proxy, monkeypatch) as counts:
            assert await flood(proxy.port, "requests full of filters", 6, streams=2) == "taken"
            # One handled by a turn and one as it arrives, besides the small ones at both ends.
            assert max(counts) <= 4
        async with await RawClient.connect(proxy.port) as client:
            stream = client.watch([(name.decode(), value.decode()) for name, value in [GZIP]])
            stream.raw.send_raw(filters(1_000_000, value=0))
            await stream.created()
            await store.put(b"abuse", b"1")
            await store.delete(b"abuse")
            await until_async(lambda: stream.responses[-1].events, "the delete")
            assert [event.type for response in stream.responses for event in response.events] == [1]


async def test_another_stream_of_the_connection_gets_its_turn(etcd: EtcdServer) -> None:
    """It does not wait for all requests of the first."""
    async with proxy_for(etcd) as proxy, direct(etcd):
        sender = await Sender.open(proxy.port)
        await sender.say(sender.request(1) + sender.request(3))
        waiting = asyncio.ensure_future(sender.send(1, cancel(9) * 100_000))
        await until_async(lambda: proxy.watches.unread_bytes > 50_000, "requests that wait")
        before = proxy.watches.unread_bytes
        await sender.send(3, create(start_revision=-1))
        await until_async(lambda: 3 in sender.last, "the answer")
        assert not waiting.done() or before
        assert await waiting
        sender.close()


async def test_requests_wait_while_responses_are_unread(etcd: EtcdServer) -> None:
    """Duplicates get responses of ten times their size: unread ones are bounded; requests go on once they are read."""
    async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port, window=0) as client:
        stream = client.watch()
        stream.raw.send_raw(create(watch_id=7))
        await until_async(lambda: proxy.engine.core.stats.stalls == 1, "an answer that is not read")
        (call,) = proxy.watches.calls
        stream.raw.send_raw(create(watch_id=7) * 999)
        await until_async(lambda: not call._queued and proxy.watches.unread_bytes, "it to wait")
        await until_async(lambda: call._answers_unread == ANSWERS_UNREAD_MAX, "so many answers")
        assert proxy.engine.core.stats.creates <= ANSWERS_UNREAD_MAX + 2
        client.h2.update_settings({4: 2**31 - 1})
        client.flush()
        await until_async(lambda: len(stream.raw.messages) == 1_000, "all answers")
        assert proxy.watches.waiting_bytes == 0


async def test_waiting_requests_block_their_client() -> None:
    """While etcd does not answer, each stream keeps one full queue and one window, and not a byte more."""
    line_bytes_max = 20_000
    with EtcdServer() as etcd:
        async with proxy_for(etcd, limits=CoreLimits(line_bytes_max=line_bytes_max)) as proxy:
            sender = await Sender.open(proxy.port)
            with held(etcd):
                await sender.say(b"".join(sender.request(stream_id) for stream_id in (1, 3, 5)))
                sending = [asyncio.ensure_future(sender.send(each, create(b"k" * 1_000) * 1_000)) for each in (1, 3, 5)]
                await until_async(lambda: all(sender.room(each) <= 0 for each in (1, 3, 5)), "windows to be used up")
                assert all(not task.done() for task in sending)
                window = proxy.listener.settings.http2.initial_window
                assert proxy.engine.core.stats.line_bytes <= 3 * (line_bytes_max + 2_000)
                assert proxy.watches.waiting_bytes <= 3 * (window + line_bytes_max + 20_000)
            assert all(await asyncio.gather(*sending))
            await until_async(lambda: proxy.engine.core.stats.watches == 3_000, "all watches")
            assert proxy.watches.waiting_bytes == 0
            sender.close()


async def test_waiting_requests_are_bounded() -> None:
    """At the limit, the stream with most waiting bytes ends; the others are served when etcd answers."""
    limit = 100_000
    with EtcdServer() as etcd:
        async with (
            proxy_for(etcd, watch=WatchSettings(requests_waiting_bytes_max=limit)) as proxy,
            await RawClient.connect(proxy.port) as small,
        ):
            sender = await Sender.open(proxy.port)
            with held(etcd):
                first = small.watch()
                first.create(b"small")
                await sender.say(sender.request(1))
                await sender.send(1, create(b"k" * 1_000) * 100)
                await until_async(lambda: proxy.watches.refused_at["requests_waiting_bytes_max"] == 1, "the refusal")
                await until_async(lambda: sender.resets, "the end of the stream")
                assert (WAITING_TEXT % limit).encode() in sender.heads
                assert proxy.watches.waiting_bytes < 2_000
                # If another stream has more waiting bytes, that one ends and not the one that reached the limit.
                await sender.say(sender.request(3))
                await sender.send(3, create(b"k" * 1_000) * 60)
                others = [small.watch() for _ in range(30)]
                for other in others:
                    other.create(b"k" * 300)
                await until_async(lambda: len(sender.resets) == 2, "the end of the large one")
                assert proxy.watches.refused_at["requests_waiting_bytes_max"] == 2
            for stream in (first, *others):
                await stream.created()
            assert proxy.watches.waiting_bytes == 0
            sender.close()


async def test_partial_requests_are_counted_and_released(etcd: EtcdServer) -> None:
    limit = 50_000
    settings = WatchSettings(requests_waiting_bytes_max=limit)
    async with proxy_for(etcd, watch=settings) as proxy, await RawClient.connect(proxy.port) as client:
        streams = [client.watch() for _ in range(3)]
        for number, stream in enumerate(streams, 1):
            stream.raw.send_raw(create(b"k" * 20_000)[:15_000])
            await until_async(lambda number=number: proxy.watches.waiting_bytes == number * 15_000, "it")  # type: ignore[misc]
        streams[1].raw.send_raw(b"k" * 5_001)
        assert (await streams[1].raw.end())[0] == Status.RESOURCE_EXHAUSTED
        assert proxy.watches.waiting_bytes == 30_000
        streams[0].raw.cancel()
        await until_async(lambda: proxy.watches.waiting_bytes == 15_000, "it to be given back")
        streams[2].raw.send_raw(create(b"k" * 20_000)[15_000:])
        await streams[2].created()
        assert proxy.watches.waiting_bytes == 0


async def test_a_half_close_comes_after_the_requests_before_it(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port) as client:
        whole, half = client.watch(), client.watch()
        whole.raw.send_raw(create(start_revision=-1) * 800, end=True)
        half.raw.send_raw(progress() * 1_000 + create()[:7], end=True)
        assert await half.raw.end() == (Status.INTERNAL, "the request stream ended inside a message")
        await until_async(lambda: len(whole.raw.messages) == 800, "all answers")
        assert not whole.raw.over


@pytest.mark.parametrize("few", [True, False])
def test_only_known_filters_count(few: bool) -> None:
    """Filters may be repeated and have any number; only two numbers have a meaning."""
    for numbers in ([], [0], [1], [0, 1], [2], [128], [129, 1], [255], [-1], [2**31 - 1], [256], [16_513], [128, 0]):
        wanted = (0 in numbers, 1 in numbers)
        repeated = numbers if few else numbers * 20
        request = rpc_pb2.WatchCreateRequest(filters=repeated)  # type: ignore[arg-type]  # also unknown ones
        assert filters_of(request) == wanted, numbers


def test_flood_messages_are_watch_requests() -> None:
    """The messages are watch requests, and those with filters are as large as a request may be."""
    for messages, metadata in FLOODS.values():
        (message,) = deque(messages(1), maxlen=1)
        if metadata:
            message = b"\0" * 5 + gzip.decompress(message[5:])
        request = rpc_pb2.WatchRequest.FromString(message[5:])
        assert request.WhichOneof("request_union")
        assert len(message) <= 2 * 1024 * 1024
