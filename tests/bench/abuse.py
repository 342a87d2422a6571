"""`python -m tests.bench.abuse`: the outcome of attacks for the attacker, and for other clients meanwhile.

Ten clients with ten watches each watch a key that is written fifty times a second; the delay of an event is the time
from its put to its arrival. Attacker and proxy are separate processes. Rows are Markdown, for docs/evidence/abuse.md.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import sys
import time
from typing import Any

import click
import uvloop

from tests.e2e.attacks import ATTACKS
from tests.e2e.raw_client import RawClient
from tests.e2e.running import Etcd, direct
from tests.etcd.server import EtcdServer
from tests.proxy_process import ProxyProcess
from tests.waiting import until_async

CLIENTS = 10
WATCHES = 10
PUT_EVERY_S = 0.02
QUIET_S = 3.0
HEADINGS = ("attack", "what became of it", "took", "delay before, p50 / max", "delay meanwhile, p50 / max", "memory")


class Watching:
    """Well-behaved clients, and the delays of their events."""

    def __init__(self, store: Etcd, clients: list[RawClient]) -> None:
        self._store = store
        self._clients = clients
        self._streams = [client.watch() for client in clients for _ in range(WATCHES)]
        self._put = 0

    async def begin(self) -> None:
        """Register all watches."""
        for stream in self._streams:
            stream.create(b"watched")
            await stream.created()

    async def delays(self, done: asyncio.Future[Any]) -> list[float]:
        """Put and wait until all clients have the event, until `done`; return each put's longest delay, in seconds."""
        found: list[float] = []
        while not done.done():
            began = time.perf_counter()
            self._put += 1
            await self._store.put(b"watched", b"%d" % self._put)
            while any(len(stream.raw.messages) <= self._put for stream in self._streams):
                # One turn of the loop reads the data that waits in the sockets.
                await asyncio.sleep(0)
                if time.perf_counter() - began > 60:
                    raise AssertionError("an event was lost, or is a minute late")
            found.append(time.perf_counter() - began)
            await asyncio.sleep(max(0.0, PUT_EVERY_S - found[-1]))
        return found


async def attack_from_outside(name: str, port: int) -> str:
    """Run an attack in a separate process and return its output."""
    command = [sys.executable, "-m", "tests.bench.abuse", "--attack", name, "--port", str(port)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()
    if process.returncode:
        raise AssertionError(f"the attack {name!r} failed")
    return said.decode().strip()


def shown(delays: list[float]) -> str:
    """Format delays as milliseconds."""
    return f"{statistics.median(delays) * 1000:.1f} / {max(delays) * 1000:.0f} ms"


async def row(name: str, etcd: EtcdServer) -> str:
    """Run one attack and return its row."""
    with ProxyProcess(etcd.endpoint) as proxy:
        async with direct(etcd) as store:
            clients = [await RawClient.connect(proxy.port) for _ in range(CLIENTS)]
            watching = Watching(store, clients)
            await watching.begin()
            before = await watching.delays(asyncio.ensure_future(asyncio.sleep(QUIET_S)))
            memory = proxy.memory_bytes()
            began = time.monotonic()
            attack = asyncio.ensure_future(attack_from_outside(name, proxy.port))
            during = await watching.delays(attack)
            took_s = time.monotonic() - began
            fate = await attack
            more = (proxy.memory_bytes() - memory) / 2**20
            if re.fullmatch(ATTACKS[name].wants, fate) is None:
                raise AssertionError(f"{name}: {fate!r}, not {ATTACKS[name].wants!r}")
            await until_async(lambda: not any(client.lost for client in clients), "the others to be connected")
            for client in clients:
                await client.close()
    return f"| {name} | {fate} | {took_s:.1f} s | {shown(before)} | {shown(during)} | {more:+.0f} MiB |"


@click.command()
@click.option("--attack", "names", multiple=True, type=click.Choice(list(ATTACKS)), help="Only these.")
@click.option("--port", type=int, help="Only attack the listener at this port.")
def main(names: tuple[str, ...], port: int | None) -> None:
    """Measure the delays of well-behaved clients during attacks."""
    if port is not None:
        click.echo(uvloop.run(_attack(names[0], port)))
        return
    click.echo(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    for name in names or ATTACKS:
        with EtcdServer() as etcd:
            click.echo(uvloop.run(row(name, etcd)))


async def _attack(name: str, port: int) -> str:
    return await ATTACKS[name].run(port)


if __name__ == "__main__":
    main()
