"""A catch-up over many large revisions, on every etcd: one run of fragments with `fragment`, else small responses."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, ExitStack

from proto.pb import rpc_pb2
from tests.e2e.raw_client import RawClient, WatchStream
from tests.e2e.running import TIERS, direct, proxy_for
from tests.e2e.scenario import run
from tests.etcd.binaries import etcds
from tests.etcd.server import EtcdServer

VALUES = [bytes([65 + number]) * 1_000_000 for number in range(10)]
DEFAULT_CLIENT_BYTES = 4 * 1024 * 1024


async def responses(stream: WatchStream, events: int) -> list[list[rpc_pb2.WatchResponse]]:
    """Read responses until so many events were received; each with its fragments, in a row."""
    found: list[list[rpc_pb2.WatchResponse]] = [[]]
    while sum(len(piece.events) for run_ in found for piece in run_) < events or found[-1]:
        piece = await stream.next()
        found[-1].append(piece)
        if not piece.fragment:
            found.append([])
    return found[:-1]


async def catch_ups(port: int, endpoint: str) -> None:
    """One from a backfill, while other watches are live; one more from the history."""
    async with direct(endpoint) as store, await RawClient.connect(port) as client:
        revisions = [await store.put(b"k", value) for value in VALUES]
        await client.open_watch(b"k")
        streams = [client.watch() for _ in range(3)]
        for stream, fragment in zip(streams, (True, True, False), strict=True):
            stream.create(b"k", start_revision=revisions[0], fragment=fragment)
        for stream in streams:
            await stream.created()
        for stream in streams[:2]:
            runs = await responses(stream, len(VALUES))
            if TIERS == 2:
                # The leaf's own watch is without `fragment`, so it gets the large revisions in separate responses.
                assert [event.kv.value for (piece,) in runs for event in piece.events] == VALUES
                continue
            # One run; a client that a busy machine stops for a moment gets the rest in another one.
            assert len(runs) <= 2
            pieces = [piece for run_ in runs for piece in run_]
            assert [event.kv.value for piece in pieces for event in piece.events] == VALUES
            assert {piece.header.revision for piece in pieces} == {revisions[-1]}
            assert len(pieces) > 4
            assert all(len(piece.events) == 1 or piece.ByteSize() < 2 * 1024 * 1024 for piece in pieces)
        plain = await responses(streams[2], len(VALUES))
        assert all(len(run_) == 1 and run_[0].ByteSize() < DEFAULT_CLIENT_BYTES for run_ in plain)


def test_a_catch_up_is_one_run() -> None:
    async def scenario(endpoints: list[str]) -> None:
        async with AsyncExitStack() as stack:
            proxies = [await stack.enter_async_context(proxy_for(endpoint)) for endpoint in endpoints]
            fronts = zip(proxies, endpoints, strict=True)
            await asyncio.gather(*(catch_ups(proxy.port, endpoint) for proxy, endpoint in fronts))

    with ExitStack() as stack:
        run(scenario([stack.enter_context(EtcdServer(binary)).endpoint for binary in etcds()]))
