"""Clients that break the rules: no other client is affected, and none of their state is kept."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from itertools import pairwise
from typing import cast

import hpack
import pytest

from coalesce.limits import CoreLimits
from proto.framing import Status, frame
from proto.http2.frames import PREFACE
from proto.http2.receiving import REQUEST_WORK
from proxy.listening.connection import ServerConnection
from proxy.listening.settings import ListenerSettings
from tests.e2e.raw_client import HOST, WATCH, RawClient
from tests.e2e.running import direct, proxy_for
from tests.etcd.server import EtcdServer
from tests.http2.fuzz import Transport
from tests.http2.wire import REQUEST, raw, settings
from tests.upstream.certificates import make_certificates
from tests.waiting import until_async
from upstream.tls import client_context, server_context

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


async def talk(port: int, data: bytes) -> bytes:
    """Send bytes, end the connection, and return everything received."""
    reader, writer = await asyncio.open_connection(HOST, port)
    heard = b""
    with contextlib.suppress(ConnectionError):
        writer.write(data)
        async with asyncio.timeout(15):
            while part := await reader.read(65536):
                heard += part
    writer.close()
    return heard


def garbage(seed: int) -> bytes:
    """Frames of one connection, some valid and some not."""
    chance = random.Random(seed)
    frames = [SETTINGS]
    for _ in range(chance.randrange(1, 30)):
        body = chance.randbytes(chance.choice((0, 4, 5, 8, 13, 100)))
        kind = chance.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 200))
        stream = chance.choice((0, 0, 1, 1, 2, 3, 2**31 - 1))
        head = len(body).to_bytes(3, "big") + bytes((kind, chance.randrange(256))) + stream.to_bytes(4, "big")
        frames.append(head + body)
    frames.append(chance.randbytes(chance.randrange(40)) + b"\xff" * 9)
    return b"".join(frames)


async def test_garbage_of_all_kinds(etcd: EtcdServer) -> None:
    # Each connection stays open for `reason_s` after its error.
    async with (
        proxy_for(etcd, listener=ListenerSettings(reason_s=0.1)) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port) as client,
    ):
        stream = await client.open_watch(b"a")
        openings = [PREFACE + garbage(seed) for seed in range(150)]
        openings += [random.Random(seed).randbytes(200) for seed in range(30)]
        for start in range(0, len(openings), 30):
            await asyncio.gather(*(talk(proxy.port, opening) for opening in openings[start : start + 30]))
        await until_async(lambda: len(proxy.listener.connections) == 1, "them to be gone")
        await store.put(b"a", b"1")
        await until_async(lambda: stream.values == [b"1"], "the event")
        assert proxy.engine.core.stats.sessions == 1


async def test_partial_messages_are_freed_with_their_connection(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy:
        client = await RawClient.connect(proxy.port)
        for _ in range(200):
            client.call(WATCH).send_raw(frame(b"x" * 100)[:50])
        await until_async(lambda: proxy.engine.core.stats.sessions == 200, "the sessions")
        await client.close()
        await until_async(lambda: proxy.engine.core.stats.sessions == 0, "them to be forgotten")
        assert not proxy.watches.calls


async def test_too_many_watches_on_a_session(etcd: EtcdServer) -> None:
    limits = CoreLimits(watches_per_session_max=3)
    async with proxy_for(etcd, limits=limits) as proxy, await RawClient.connect(proxy.port) as client:
        stream = client.watch()
        for _ in range(4):
            stream.create(b"a")
        for _ in range(3):
            await stream.created()
        refused = await stream.next()
        assert (refused.created, refused.canceled) == (True, True)
        assert "3" in refused.cancel_reason
        stream.cancel(0)
        assert (await stream.next()).canceled
        stream.create(b"a")
        await stream.created()


async def test_a_client_behind_for_too_long_gets_the_reason(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.listening.calls.UNREAD_END_GRACE_S", 0.5)
    limits = CoreLimits(lagging_age_s_max=0.3)
    async with (
        proxy_for(etcd, limits=limits) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port, window=65_535) as client,
        await RawClient.connect(proxy.port) as other,
    ):
        dead, slow, quick = client.watch(), client.watch(), other.watch()
        for stream in (dead, slow, quick):
            stream.create(b"a")
            await stream.created()
        dead.raw.taking = slow.raw.taking = False
        for _ in range(10):
            await store.put(b"a", b"x" * 30_000)
        await until_async(lambda: proxy.engine.core.stats.sessions == 1, "both to be given up")
        slow.raw.take()
        status, text = await slow.raw.end()
        assert status == Status.UNAVAILABLE, text
        assert "behind" in text
        # A client that does not even read the end of its call gets its stream reset.
        await until_async(lambda: dead.raw.reset == 8, "the reset")
        await until_async(lambda: len(quick.values) == 10, "all events")


async def test_tls_and_plain_text_on_the_wrong_port(etcd: EtcdServer, tmp_path_factory: pytest.TempPathFactory) -> None:
    files = make_certificates(tmp_path_factory.mktemp("certificates"))
    inward, outward = server_context(files.server_cert, files.server_key), client_context(cacert=files.ca)
    async with (
        proxy_for(etcd, tls=inward) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port, tls=outward) as client,
    ):
        stream = await client.open_watch(b"a")
        assert SETTINGS not in await talk(proxy.port, PREFACE + SETTINGS)
        await store.put(b"a", b"x" * 300_000)
        await until_async(lambda: stream.values == [b"x" * 300_000], "the event")


async def test_a_tls_client_at_a_plain_port(etcd: EtcdServer) -> None:
    context = ssl.create_default_context()
    async with proxy_for(etcd) as proxy:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection(HOST, proxy.port, ssl=context)
        await until_async(lambda: not proxy.listener.connections, "it to be gone")


async def test_a_burst_of_requests_is_handled_over_several_turns(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy:
        connection = ServerConnection(proxy.listener)
        transport = Transport()
        connection.connection_made(cast(asyncio.Transport, transport))
        encoder = hpack.Encoder()
        requests = [raw(1, 4, 2 * number + 1, encoder.encode(REQUEST)) for number in range(500)]
        connection.data_received(PREFACE + settings() + b"".join(requests))
        opened = [len(connection.h2.streams)]
        assert not transport.reading
        while not transport.reading:
            turn = asyncio.Event()
            asyncio.get_running_loop().call_soon(turn.set)
            await turn.wait()
            opened.append(len(connection.h2.streams))
        # Other callbacks ran in between, repeatedly: two turns pass between samples. Nothing was skipped.
        steps = {later - earlier for earlier, later in pairwise(opened)}
        assert max(steps) <= 2 * proxy.listener.settings.http2.turn_work_max // REQUEST_WORK
        assert opened[-1] == 500
        connection.connection_lost(None)
