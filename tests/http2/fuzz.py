"""`python -m tests.http2.fuzz --runs N`: fuzzes the HTTP/2 code with more seeds than the few of `make test`.

Each run is one seed of each kind: a script of frames (two in three are mutated) to a server that answers, and one to a
client; a server's script to a client with calls; ten single frames and a script, frame by frame, compared with `h2`;
the first script again through the listener itself, with handlers, HTTP/1, timers and a transport that is paused and
resumed; and the server's script through a connection to etcd. The first failure stops it and prints its seed.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import click

from proto.http2 import Connection, Headers, Role
from proxy import logs
from proxy.admin import health
from proxy.listening.connection import ServerConnection
from proxy.listening.http1 import Http1
from proxy.listening.listener import Listener
from proxy.listening.settings import ListenerSettings
from tests.http2.test_fuzz import (
    LIMITS,
    answers,
    ask,
    ask_well,
    check,
    judge_alike,
    judge_script,
    mutate,
    script,
    serve,
)
from tests.http2.wire import REQUEST, Peer
from upstream.connection import ClientConnection, UpstreamCall
from upstream.endpoints import parse_endpoint
from upstream.heads import request_headers
from upstream.settings import ConnectionSettings

REPORT_S = 10.0
FRAMES_JUDGED = 10
FRAMES_IN_SCRIPT = 60


class Transport:
    """A transport that discards its output."""

    def __init__(self) -> None:
        self.closed = False
        self.reading = True
        self.protocol: asyncio.Protocol | None = None

    def write(self, data: bytes) -> None:
        """Discard the bytes."""

    def writelines(self, pieces: Iterable[bytes]) -> None:
        """Discard the bytes."""

    def set_protocol(self, protocol: asyncio.Protocol) -> None:
        """Record the new protocol."""
        self.protocol = protocol

    def close(self) -> None:
        """Record the call."""
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        """Return whether it was closed."""
        return self.closed

    def get_extra_info(self, name: str) -> None:
        """Return None."""

    def set_write_buffer_limits(self, high: int, low: int | None = None) -> None:
        """Ignore the limits: there is no buffer."""

    def pause_reading(self) -> None:
        """Record the call."""
        self.reading = False

    def resume_reading(self) -> None:
        """Record the call."""
        self.reading = True


async def listen(seed: int) -> None:
    """Send one script to the listener, as a client's connection would."""
    rng = random.Random(seed)
    limits = replace(LIMITS, turn_work_max=rng.choice([0, 1, 30]))
    listener = Listener(ListenerSettings(http2=limits, reason_s=0.0))
    listener._loop = asyncio.get_running_loop()
    listener.routes[dict(REQUEST)[b":path"]] = health.Health().open
    listener.http1 = http1 = Http1(lambda: parse_endpoint("127.0.0.1:1"), refusal="not here")
    connection = ServerConnection(listener)
    transport = Transport()
    connection.connection_made(cast(asyncio.Transport, transport))
    text = script(seed, 60)
    if rng.random() < 0.1:
        # No preface, a broken one, or HTTP/1.
        text = rng.choice([b"", b"GET / HTTP/1.1\r\n", b"M-SEARCH *", rng.randbytes(9)]) + text[rng.randrange(30) :]
    while text:
        size = rng.choice([1, 9, 40, 400])
        if transport.protocol is not None:
            # HTTP/1 from here on.
            if not transport.closed:
                transport.protocol.data_received(text)
            transport.protocol.connection_lost(None)
            assert not http1.connections
            break
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
    if transport.protocol is None:
        connection.connection_lost(None)
    assert not listener.connections


class Taken:
    """A CallHandler that returns the flow control of its data at once or never, and sometimes resets the call."""

    def __init__(self, rng: random.Random) -> None:
        self.call: UpstreamCall | None = None
        self.rng = rng
        self.ends = 0

    def on_headers(self, headers: Headers) -> None:
        """Ignore the headers."""

    def on_data(self, data: bytes, flow_size: int) -> None:
        """Consume the data, reset the call, or write."""
        assert self.call is not None
        assert not self.ends
        assert len(data) == flow_size
        match self.rng.randrange(12):
            case 0:
                self.call.reset()
            case 1 if not self.call.stream.ending:
                self.call.write([bytes(9_000)], 9_000, end=self.rng.random() < 0.2)
            case 2:
                pass
            case _:
                self.call.consumed(flow_size)

    def on_drained(self) -> None:
        """Ignore it."""

    def on_end(self, status: int, message: str, trailers: Headers) -> None:
        """Count the end: there is at most one."""
        del status, message, trailers
        self.ends += 1
        assert self.ends == 1


async def drive_client(seed: int) -> None:
    """Send a server's script to a connection to etcd with calls on it; each call must end exactly once."""
    rng = random.Random(seed)
    loop = asyncio.get_running_loop()
    connection = ClientConnection(parse_endpoint("127.0.0.1:1"), False, ConnectionSettings(), loop)
    connection.connection_made(cast(asyncio.Transport, Transport()))
    pieces = answers(rng, Peer(Connection(Role.SERVER)), [1, 3, 5, 7], 60)
    whole = b"".join(pieces)
    if seed % 2:
        text = mutate(rng, whole)
        pieces = [text[at : at + 50] for at in range(0, len(text), 50)]
    calls: list[Taken] = []
    for piece in pieces:
        connection.data_received(piece)
        while connection.healthy and len(calls) < 4:
            handler = Taken(rng)
            calls.append(handler)
            handler.call = connection.request(request_headers(connection, b"/a/b"), handler, end_stream=len(calls) == 3)
        if rng.random() < 0.3:
            await asyncio.sleep(0)
        if not connection.http2.closed:
            check(connection.http2)
    given_up = [one for one in calls if one.call is not None and one.call.ended and not one.ends]
    connection.connection_lost(None)
    assert all(one.ends or one in given_up for one in calls)


async def runs(first: int, count: int) -> None:
    """Do the runs, and report the progress regularly."""
    began = reported = time.monotonic()
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    for seed in range(first, first + count):
        try:
            serve(seed)
            ask(seed)
            ask_well(seed)
            judge_alike(seed, FRAMES_JUDGED)
            judge_script(seed, FRAMES_IN_SCRIPT)
            await listen(seed)
            await drive_client(seed)
            assert not failures, failures
        except Exception:
            sys.stderr.write(f"seed {seed} failed\n")
            raise
        if time.monotonic() - reported > REPORT_S:
            reported = time.monotonic()
            click.echo(f"{seed - first + 1} runs")
    click.echo(f"{count} runs (seeds {first} to {first + count - 1}) in {time.monotonic() - began:.0f} s: no failure")


@click.command()
@click.option("--runs", "count", default=1000, show_default=True, help="Number of runs.")
@click.option("--seed", default=0, show_default=True, help="The first seed.")
def main(count: int, seed: int) -> None:
    """Fuzz the HTTP/2 connection and the listener."""
    logs.configure("fatal")
    asyncio.run(runs(seed, count))


if __name__ == "__main__":
    main()
