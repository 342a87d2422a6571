"""`python -m tests.http2.fuzz --runs N`: hostile bytes for as long as one likes, beside the few seeds of `make test`.

Each run is one seed of each kind: a script of frames, two in three of them mutated, to a server that answers and to a
client; ten single frames judged by `h2` as well; and the script once more through the listener itself, with handlers,
timers and a transport that stops and goes. The first failure ends it with its seed.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from dataclasses import replace
from typing import cast

import click

from proxy import health, logs
from proxy.listening.connection import ServerConnection
from proxy.listening.listener import Listener
from proxy.listening.settings import ListenerSettings
from tests.http2.test_fuzz import LIMITS, ask, check, judge_alike, script, serve
from tests.http2.wire import REQUEST

REPORT_S = 10.0
FRAMES_JUDGED = 10


class Transport:
    """A transport that goes nowhere."""

    def __init__(self) -> None:
        self.closed = False
        self.reading = True

    def write(self, data: bytes) -> None:
        """Take bytes and forget them."""

    def close(self) -> None:
        """Note it."""
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        """Tell whether it was closed."""
        return self.closed

    def get_extra_info(self, name: str) -> None:
        """Know nothing."""

    def set_write_buffer_limits(self, high: int) -> None:
        """Have no buffer."""

    def pause_reading(self) -> None:
        """Note it."""
        self.reading = False

    def resume_reading(self) -> None:
        """Note it."""
        self.reading = True


async def listen(seed: int) -> None:
    """Send one script to the listener, as a client's connection would."""
    rng = random.Random(seed)
    limits = replace(LIMITS, turn_work_max=rng.choice([0, 1, 30]))
    listener = Listener(ListenerSettings(http2=limits, reason_s=0.0))
    listener._loop = asyncio.get_running_loop()
    listener.routes[dict(REQUEST)[b":path"]] = health.Health().open
    connection = ServerConnection(listener)
    connection.connection_made(cast(asyncio.Transport, Transport()))
    text = script(seed, 60)
    if rng.random() < 0.05:
        # No preface, or a broken one.
        text = text[rng.randrange(30) :]
    while text:
        size = rng.choice([1, 9, 40, 400])
        connection.data_received(text[:size])
        match rng.randrange(12):
            case 0:
                connection.pause_writing()
            case 1:
                connection.resume_writing()
            case 2:
                connection.sweep(listener.now() + rng.choice([0.0, 5.0]))
        if rng.random() < 0.3:
            await asyncio.sleep(0)
        if not connection.h2.closed:
            check(connection.h2)
        text = text[size:]
    connection.connection_lost(None)
    assert not listener.connections


async def runs(first: int, count: int) -> None:
    """Do the runs, and say now and then how many are done."""
    began = told = time.monotonic()
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    for seed in range(first, first + count):
        try:
            serve(seed)
            ask(seed)
            judge_alike(seed, FRAMES_JUDGED)
            await listen(seed)
            assert not failures, failures
        except Exception:
            sys.stderr.write(f"seed {seed} failed\n")
            raise
        if time.monotonic() - told > REPORT_S:
            told = time.monotonic()
            click.echo(f"{seed - first + 1} runs")
    click.echo(f"{count} runs (seeds {first} to {first + count - 1}) in {time.monotonic() - began:.0f} s: no failure")


@click.command()
@click.option("--runs", "count", default=1000, show_default=True, help="How many.")
@click.option("--seed", default=0, show_default=True, help="The first seed.")
def main(count: int, seed: int) -> None:
    """Fuzz the HTTP/2 connection and the listener."""
    logs.configure("fatal")
    asyncio.run(runs(seed, count))


if __name__ == "__main__":
    main()
