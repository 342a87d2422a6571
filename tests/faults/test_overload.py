"""Overload: too many connections, streams, watches, ranges and bytes.

Each limit refuses the client that exceeds it, with a text that names the limit; existing clients are not affected. And
at the limits, memory stays within the sum that docs/operations.md gives.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import pytest

from coalesce.limits import CoreLimits
from proto.framing import Status
from proxy.listening.settings import ListenerSettings
from proxy.watch.settings import WatchSettings
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct, proxy_for
from tests.etcd.server import EtcdServer
from tests.faults.scene import PREFIX, PREFIX_END, Writer, all_kept
from tests.proxy_process import ProxyProcess
from tests.waiting import until_async

QUIET = b"quiet"
CONNECTIONS, SESSIONS, WATCHES_EACH, WATCHES, TRUNKS = 4, 6, 4, 12, 5
MIB = 1 << 20


async def _refused(client: RawClient, key: bytes) -> str:
    """Create one watch too many; return the text of the refusal."""
    stream = client.watch()
    stream.create(key)
    response = await stream.next()
    assert response.created
    assert response.canceled
    stream.raw.cancel()
    return response.cancel_reason


async def test_each_limit_refuses_clearly_and_harms_no_one_else(etcd: EtcdServer) -> None:
    limits = CoreLimits(watches_per_session_max=WATCHES_EACH, watches_max=WATCHES, trunks_max=TRUNKS)
    settings: dict[str, Any] = {
        "limits": limits,
        "listener": ListenerSettings(connections_max=CONNECTIONS, reason_s=0.1),
        "watch": WatchSettings(sessions_per_connection_max=SESSIONS),
    }
    async with proxy_for(etcd, **settings) as proxy, AsyncExitStack() as stack:
        good, *others = [
            await stack.enter_async_context(await RawClient.connect(proxy.port)) for _ in range(CONNECTIONS)
        ]
        streams = [(await good.open_watch(PREFIX, PREFIX_END, start), start) for start in (0, 1)]
        writer = Writer(etcd.endpoint)
        await writer.more(10)
        # Connections.
        for _ in range(10):
            one_more = await RawClient.connect(proxy.port)
            await until_async(lambda c=one_more: c.lost, "it to be closed")  # type: ignore[misc]  # bound
            assert one_more.goaways[0].additional_data == b"too_many_connections"
        # Streams of one connection.
        sessions = [others[0].watch() for _ in range(SESSIONS)]
        status, text = await others[0].watch().raw.end()
        assert (status, "too many watch streams on one connection" in text) == (Status.RESOURCE_EXHAUSTED, True)
        # Watches of one stream.
        for _ in range(WATCHES_EACH):
            sessions[0].create(QUIET)
            await sessions[0].created()
        sessions[0].create(QUIET)
        assert "watches" in (await sessions[0].next()).cancel_reason
        # Ranges: PREFIX and QUIET are two.
        for number in range(TRUNKS - 2):
            sessions[1].create(b"%d" % number)
            await sessions[1].created()
        assert "ranges" in await _refused(others[1], b"one more")
        # Watches of all.
        left = WATCHES - len(streams) - WATCHES_EACH - (TRUNKS - 2)
        fill = [await others[2].open_watch(QUIET) for _ in range(left)]
        assert "watches" in await _refused(others[1], QUIET)
        await writer.more(10)
        last = await writer.stop()
        await all_kept(streams, etcd.endpoint, last)
        # Once there is room again, everything is served.
        for stream in fill:
            stream.raw.cancel()
        await until_async(lambda: proxy.engine.core.stats.watches < WATCHES, "room")
        await others[1].open_watch(QUIET)


HISTORY_BYTES = 24 * MIB
RANGES, PUTS, CLIENTS, STREAMS_EACH = 40, 2_000, 40, 50
CONNECTION_BYTES, STREAM_BYTES = 6 * 1024, 2 * 1024
"""What docs/operations.md says that a client connection and a watch stream take."""


@pytest.mark.long
async def test_memory_stays_within_its_bounds(etcd: EtcdServer) -> None:
    """Histories of the smallest events, which have the largest overhead, filled twice over; many streams."""
    with ProxyProcess(etcd.endpoint, [f"--history-bytes-total-max={HISTORY_BYTES}"]) as proxy:
        before = proxy.memory_bytes()
        async with direct(etcd) as store, AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(await RawClient.connect(proxy.port)) for _ in range(CLIENTS)]
            streams = [client.watch() for client in clients for _ in range(STREAMS_EACH)]
            for number, stream in enumerate(streams):
                # The first ones start below the keys, so that each range has every event.
                stream.create(*((b"a%02d" % number, b"c") if number < RANGES else (QUIET, b"")))
            for stream in streams:
                await stream.created(30)
            for number in range(PUTS):
                await store.put(b"b%d" % number, b"v")
            received = partial(proxy.metric, "watchmux_events_received_total")
            await until_async(lambda: received() == RANGES * PUTS, "all events", 60)
            history = proxy.metric("watchmux_history_bytes")
            assert 0.99 * HISTORY_BYTES < history <= HISTORY_BYTES
            bound = HISTORY_BYTES * 1.5 + CLIENTS * CONNECTION_BYTES + CLIENTS * STREAMS_EACH * STREAM_BYTES
            assert proxy.memory_bytes() - before < bound
