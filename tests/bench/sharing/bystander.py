"""The delays of a well-behaved client while another one loads the same proxy.

The bystander has one watch, on a separate connection; its delay is the time from a put, made directly at etcd, to the
event. The load runs in a separate process, so that its work delays nothing here.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import click
import uvloop

from tests.bench.sharing.front import Figures, Front
from tests.bench.targets import Target
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct
from tests.etcd.server import EtcdServer

PUT_EVERY_S = 0.01
QUIET_S = 1.0
SAMPLE_S = 0.01
KEY = b"bystander"


def port_of(address: str) -> int:
    """Return the port of HOST:PORT."""
    return int(address.rpartition(":")[2])


async def _delays(etcd: EtcdServer, port: int, key: bytes, done: Callable[[], bool]) -> list[float]:
    found: list[float] = []
    async with direct(etcd) as store, await RawClient.connect(port) as client:
        stream = await client.open_watch(KEY, timeout_s=30)
        seen = 1
        while not done():
            began = time.perf_counter()
            await store.put(key, b"")
            # By count, not by next(), whose polling would be most of the delay.
            while len(stream.raw.messages) <= seen:
                await asyncio.sleep(0)
                assert not stream.raw.over, "the bystander's watch ended"
                assert time.perf_counter() - began < 60, "an event is a minute late"
            seen += 1
            found.append(time.perf_counter() - began)
            await asyncio.sleep(max(0.0, PUT_EVERY_S - found[-1]))
    return found


def quantiles(name: str, delays: list[float]) -> Figures:
    """Return p50, p99 and the longest of some delays, in ms."""
    cuts = statistics.quantiles(delays, n=100, method="inclusive") if len(delays) > 1 else delays * 99
    return {f"{name} p50 ms": cuts[49] * 1e3, f"{name} p99 ms": cuts[98] * 1e3, f"{name} max ms": max(delays) * 1e3}


class MemoryPeak:
    """The sampled maximum growth of a server's resident size since the start. Use as a context manager."""

    def __init__(self, server: Target) -> None:
        self._server = server
        self._first = self._most = server.memory_mib()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self._most = max(self._most, self._server.memory_mib())

    def __enter__(self) -> MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def mib(self) -> float:
        """The growth, in MiB."""
        return self._most - self._first


@asynccontextmanager
async def load(module: str, *arguments: str) -> AsyncIterator[asyncio.Task[str]]:
    """Run `python -m MODULE ARGUMENTS` in a separate process; the task's result is its output."""
    command = (sys.executable, "-m", module, *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)

    async def said() -> str:
        output, _ = await process.communicate()
        assert process.returncode == 0, f"the load {' '.join(arguments)} failed"
        return output.decode().strip()

    task = asyncio.create_task(said())
    try:
        yield task
    finally:
        if process.returncode is None:
            process.kill()
        await asyncio.gather(task, return_exceptions=True)


async def with_bystander(
    front: Front, etcd: EtcdServer, address: str, module: str, *arguments: str, namespace: bytes = b""
) -> Figures:
    """Run `python -m MODULE ARGUMENTS PORT` and a bystander; return the figures, and the output of the load.

    `namespace`: the prefix that the proxy adds to the bystander's key.
    """
    key = KEY if front.proxy is None else namespace + KEY
    port = port_of(address)
    quiet = time.perf_counter() + QUIET_S
    before = await _delays(etcd, port, key, lambda: time.perf_counter() > quiet)
    with MemoryPeak(front.server(etcd)) as peak:
        async with load(module, *arguments, str(port)) as said:
            during = await _delays(etcd, port, key, said.done)
            outcome = await said
    figures = {**quantiles("before", before), **quantiles("during", during), "memory peak MiB": peak.mib}
    return {**figures, "outcome": outcome} if outcome else figures


def load_command(loads: Mapping[str, Callable[..., Awaitable[str]]]) -> click.Command:
    """Return the command of a module of loads, which `with_bystander` runs."""

    @click.command()
    @click.argument("load", type=click.Choice(list(loads)))
    @click.argument("arguments", nargs=-1)
    @click.argument("port", type=int)
    def main(load: str, arguments: tuple[str, ...], port: int) -> None:
        """Run a LOAD against the listener at PORT, and print its outcome."""

        async def outcome() -> str:
            return await loads[load](port, *arguments)

        click.echo(uvloop.run(outcome()))

    return main
