"""A fuzzer of watch requests: small requests, compression, filters, cancels, duplicates and resets, in any mix.

`python -m tests.e2e.mixing --runs 1000` runs seeds in a separate process against a proxy in front of a real etcd, while
a bystander watches. It checks the proxy's work, not the machine's speed: the longest turn of the loop (requests, and
milliseconds of CPU), every event of the bystander, and that nothing is kept at the end. tests/e2e/test_mixing.py runs
some seeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import click
import uvloop

from proto.framing import frame
from proxy.server import Proxy
from tests.e2e.floods import GZIP, Sender, cancel, create, filters, progress
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct, proxy_for
from tests.etcd.server import EtcdServer
from tests.http2.wire import raw, rst
from tests.waiting import until_async

KEY = b"bystander"
RUN_S_MAX = 60.0
TURN_CPU_MS_MAX = 50.0
"""CPU of one turn of the loop, at most, in `main`: what others may be delayed by."""

Body = Callable[[random.Random], bytes]

BODIES: list[Body] = [
    lambda chance: progress() * chance.randint(1, 3_000),
    lambda chance: b"".join(cancel(chance.randint(1_000, 9_999)) for _ in range(chance.randint(1, 2_000))),
    lambda chance: b"".join(cancel(chance.randint(0, 50)) for _ in range(chance.randint(1, 100))),
    lambda chance: create(watch_id=7) * chance.randint(1, 500),
    lambda chance: create() * chance.randint(1, 500),
    lambda chance: b"".join(create(b"m/%d" % chance.randint(0, 999)) for _ in range(chance.randint(1, 300))),
    lambda chance: create(start_revision=-1) * chance.randint(1, 1_000),
    lambda chance: create(KEY, start_revision=1) * chance.randint(1, 50),
    lambda chance: create(KEY, start_revision=10**9) * chance.randint(1, 300),
    lambda chance: frame(b"") * chance.randint(1, 4_000),
    lambda chance: create(b"k" * chance.randint(1, 1_400_000)),
]
COMPRESSED: list[Body] = [
    lambda chance: filters(chance.randint(1, 2_000_000), chance.choice((0, 1, 2, 100))) * chance.randint(1, 3),
    lambda chance: _zipped(progress()) * chance.randint(1, 500),
    lambda chance: _zipped(create(b"k" * 1_000_000)) * chance.randint(1, 4),
]
BROKEN: list[Body] = [
    lambda _chance: frame(b"\xff"),
    lambda _chance: b"\x02\0\0\0\0",
    lambda chance: create()[: chance.randint(1, 10)],
]


def _zipped(framed: bytes) -> bytes:
    return frame(gzip.compress(framed[5:]), compressed=True)


@dataclass
class Verdict:
    """The result of running some seeds against a proxy."""

    inputs_most: int = 0
    """Requests that the core was given between two turns of the loop."""

    cpu_ms_most: float = 0.0
    """CPU between two turns, in ms."""

    events: int = 0
    """Events of the bystander."""

    delays_s: list[float] = field(default_factory=list)
    """From the answer to the put until the event is there."""


async def mix(port: int, seed: int) -> None:
    """Run a few clients that request a lot."""
    chance = random.Random(seed)
    senders = [await Sender.open(port) for _ in range(chance.randint(1, 3))]
    try:
        async with asyncio.timeout(RUN_S_MAX):
            await asyncio.gather(
                *(
                    _one(sender, 2 * number + 1, random.Random(chance.random()))
                    for sender in senders
                    for number in range(chance.randint(1, 4))
                )
            )
        # The clients kept to the rules.
        assert not any(sender.goaway for sender in senders), [sender.goaway for sender in senders]
    finally:
        for sender in senders:
            sender.close()


async def _one(sender: Sender, stream_id: int, chance: random.Random) -> None:
    zipped = chance.random() < 0.5
    await sender.say(sender.request(stream_id, *((GZIP,) if zipped else ())))
    for _ in range(chance.randint(1, 5)):
        bodies = [
            chance.choice(COMPRESSED if zipped and chance.random() < 0.5 else BODIES)
            for _ in range(chance.randint(1, 4))
        ]
        if chance.random() < 0.05:
            bodies.append(chance.choice(BROKEN))
        body = b"".join(each(chance) for each in bodies)
        if chance.random() < 0.1:
            sender.pause()
            asyncio.get_running_loop().call_later(0.1, sender.resume)
        if not await sender.send(stream_id, body):
            return
    end = chance.choice(("reset", "half-close", "leave", "leave"))
    if end == "reset":
        await sender.say(rst(stream_id))
    elif end == "half-close":
        await sender.say(raw(0, 1, stream_id, b""))


@contextlib.contextmanager
def judged(proxy: Proxy, verdict: Verdict) -> Iterator[None]:
    """Record the work of each turn of the loop."""
    loop, engine = asyncio.get_running_loop(), proxy.engine
    steps = {name: getattr(engine, name) for name in ("create", "cancel", "progress")}
    inputs, over = 0, False
    cpu_s = time.thread_time()

    def counted(step: Callable[..., None]) -> Callable[..., None]:
        def one(*arguments: object) -> None:
            nonlocal inputs
            inputs += 1
            step(*arguments)

        return one

    def turn() -> None:
        nonlocal inputs, cpu_s
        now = time.thread_time()
        verdict.inputs_most = max(verdict.inputs_most, inputs)
        verdict.cpu_ms_most = max(verdict.cpu_ms_most, (now - cpu_s) * 1000)
        inputs, cpu_s = 0, now
        if not over:
            loop.call_soon(turn)

    for name, step in steps.items():
        setattr(engine, name, counted(step))
    loop.call_soon(turn)
    try:
        yield
    finally:
        over = True
        for name in steps:
            delattr(engine, name)


async def judge(etcd: EtcdServer, first: int, runs: int) -> Verdict:
    """Run seeds against a proxy in this process; raise AssertionError if anything is lost or kept."""
    verdict = Verdict()
    async with proxy_for(etcd) as proxy, direct(etcd) as store, await RawClient.connect(proxy.port) as client:
        stream = await client.open_watch(KEY)
        command = [
            sys.executable,
            "-m",
            "tests.e2e.mixing",
            "--port",
            str(proxy.port),
            f"--first={first}",
            f"--runs={runs}",
        ]
        process = await asyncio.create_subprocess_exec(*command)
        with judged(proxy, verdict):
            ended = asyncio.ensure_future(process.wait())
            while not ended.done():
                verdict.events += 1
                await store.put(KEY, b"%d" % verdict.events)
                # From the answer on: the duration of the put itself is etcd's.
                began = time.perf_counter()
                await until_async(lambda: len(stream.raw.messages) > verdict.events, "the bystander's event", 60)
                verdict.delays_s.append(time.perf_counter() - began)
            assert await ended == 0, "the clients failed"
            core = proxy.engine.core
            await until_async(lambda: core.stats.sessions == core.stats.watches == 1, "all to be forgotten", 60)
        assert stream.values == [b"%d" % (number + 1) for number in range(verdict.events)]
        assert proxy.watches.waiting_bytes == core.stats.line_bytes == 0
        await until_async(lambda: len(proxy.listener.connections) == 1, "their connections to be gone", 60)
    return verdict


async def _clients(port: int, first: int, runs: int) -> None:
    for seed in range(first, first + runs):
        try:
            await mix(port, seed)
        except Exception as error:
            click.echo(f"seed {seed}: {error!r}", err=True)
            raise


@click.command()
@click.option("--runs", default=100, show_default=True, help="Seeds to run.")
@click.option("--first", default=0, show_default=True, help="The first of them.")
@click.option("--port", type=int, help="Only be the clients, of the listener at this port.")
def main(runs: int, first: int, port: int | None) -> None:
    """Mix requests at random and report what other clients saw."""
    if port is not None:
        uvloop.run(_clients(port, first, runs))
        return
    gc.collect()
    gc.freeze()
    # As in `serve`: see proxy/process/serving.py.
    gc.set_threshold(50_000_000)
    with EtcdServer() as etcd:
        verdict = uvloop.run(judge(etcd, first, runs))
    delays = sorted(verdict.delays_s)
    click.echo(
        f"{runs} runs: at most {verdict.inputs_most} requests and {verdict.cpu_ms_most:.1f} ms of CPU in a turn; "
        f"the bystander had all of its {verdict.events} events, p50 {delays[len(delays) // 2] * 1000:.1f} ms, "
        f"p99 {delays[int(len(delays) * 0.99)] * 1000:.1f} ms, at most {delays[-1] * 1000:.0f} ms"
    )
    sys.exit(verdict.cpu_ms_most > TURN_CPU_MS_MAX)


if __name__ == "__main__":
    main()
