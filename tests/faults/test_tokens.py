"""Tokens that expire, become stale or lose their rights while clients watch: clients with a valid one continue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from proto.framing import Status
from proxy.server import Proxy
from tests.e2e.raw_client import RawClient
from tests.e2e.running import next_to_etcd, proxy_for, two_tiers
from tests.e2e.test_auth import DENIED, INVALID, put, token_of, with_users
from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.server import EtcdServer
from tests.faults.relay import Relay, relay_to
from tests.waiting import until_async

TTL_S = 1

Proxies = Callable[..., AbstractAsyncContextManager[Proxy]]
BOTH = pytest.mark.parametrize("proxies", [proxy_for, two_tiers], ids=["one tier", "two tiers"])


async def broken(proxy: Proxy, way: Relay) -> None:
    """Break all connections to etcd once, and wait until the one of the watches is back."""
    stats = next_to_etcd(proxy).engine.stats
    resumed = stats.upstream_resumed
    way.cut()
    way.mend()
    await until_async(lambda: stats.upstream_resumed > resumed, "the connection to be back")


@asynccontextmanager
async def behind_a_relay(
    etcd: EtcdServer, proxies: Proxies = proxy_for
) -> AsyncIterator[tuple[Proxy, RawClient, Relay]]:
    """Yield a proxy behind a relay, a client of the proxy, and the relay; `proxies`: one proxy, or two tiers."""
    async with (
        relay_to(etcd.client_port) as way,
        proxies(way.endpoint) as proxy,
        await RawClient.connect(proxy.port) as client,
    ):
        yield proxy, client, way


async def expire_while_using(client: RawClient, used: str) -> None:
    """Let all tokens expire but one, which is used all the time."""
    loop = asyncio.get_running_loop()
    end = loop.time() + TTL_S + 1.5

    def over() -> bool:
        stream = client.watch([("token", used)])
        stream.create(b"a/used")
        stream.raw.cancel()
        return loop.time() > end

    await until_async(over, "the tokens to expire")


@BOTH
async def test_one_expired_token_does_not_stop_the_others(proxies: Proxies) -> None:
    with EtcdServer(extra=[f"--auth-token-ttl={TTL_S}"]) as etcd:
        with_users(etcd)
        async with behind_a_relay(etcd, proxies) as (proxy, client, way):
            expiring, used = await token_of(client, "u1"), await token_of(client, "u2")
            first = await client.open_watch(b"a/", b"a0", 0, [("token", expiring)])
            second = await client.open_watch(b"a/", b"a0", 0, [("token", used)])
            await expire_while_using(client, used)
            late = client.watch([("token", expiring)])
            late.create(b"a/", b"a0")
            assert (await late.next()).cancel_reason == INVALID
            await broken(proxy, way)
            await put(etcd, "a/k", "1")
            for stream in (first, second):
                await until_async(lambda s=stream: s.values == [b"1"], "the event after the break")  # type: ignore[misc]
                assert not stream.raw.over


@pytest.mark.long
@BOTH
async def test_sessions_return_with_new_tokens_when_all_expired(proxies: Proxies) -> None:
    with EtcdServer(extra=[f"--auth-token-ttl={TTL_S}"]) as etcd:
        with_users(etcd)
        async with behind_a_relay(etcd, proxies) as (proxy, client, way):
            tokens = [await token_of(client, user) for user in ("u1", "u2")]
            streams = [await client.open_watch(b"a/", b"a0", 0, [("token", token)]) for token in tokens]
            kept = await token_of(client, "u3")
            other = await client.open_watch(b"b", b"", 0, [("authorization", kept)])
            loop = asyncio.get_running_loop()
            end = loop.time() + TTL_S + 1.5

            def over() -> bool:
                stream = client.watch([("token", kept)])
                stream.create(b"b")
                stream.raw.cancel()
                return loop.time() > end

            await until_async(over, "the tokens to expire")
            await broken(proxy, way)
            for stream in streams:
                assert await stream.raw.end() == (Status.UNAVAILABLE, "etcdserver: invalid auth token")
            again = await client.open_watch(b"a/", b"a0", 0, [("token", await token_of(client, "u1"))])
            await put(etcd, "a/k", "1")
            await put(etcd, "b", "2")
            await until_async(lambda: again.values == [b"1"], "the event")
            await until_async(lambda: other.values == [b"2"], "the event of the user who was not concerned")


@pytest.mark.parametrize("binary", etcds(), ids=lambda binary: binary.name)
async def test_watches_beyond_a_right_are_refused(binary: EtcdBinary) -> None:
    """From a key on, and from the first key on: releases before 3.5.33 and 3.6.14 allow those."""
    with EtcdServer(binary) as etcd:
        with_users(etcd)
        async with behind_a_relay(etcd) as (proxy, client, _way):
            token = await token_of(client, "u1")
            root = await token_of(client, "root", "r")
            # Also if a trunk for such a range exists already.
            for key in (b"a/", b"a/k", b"\0"):
                await client.open_watch(key, b"\0", 0, [("token", root)])
            stream = client.watch([("token", token)])
            for key, range_end in (
                (b"a/", b"\0"),
                (b"a/k", b"\0"),
                (b"\0", b"\0"),
                (b"", b"\0"),
                (b"a/", b"a1"),
                (b"a", b"a0"),
            ):
                for start in (0, 1):
                    stream.create(key, range_end, start)
                    response = await stream.next()
                    assert (response.created, response.canceled) == (True, True), (key, range_end)
                    assert response.cancel_reason == DENIED
            stream.create(b"a/", b"a0")
            await stream.created()
            assert proxy.engine.core.stats.watches == 4


@BOTH
async def test_a_revoked_role_does_not_stop_the_others(etcd: EtcdServer, proxies: Proxies) -> None:
    with_users(etcd)
    async with behind_a_relay(etcd, proxies) as (proxy, client, way):
        first, second = [await token_of(client, user) for user in ("u1", "u2")]
        revoked = await client.open_watch(b"a/", b"a0", 0, [("token", first)])
        stayer = await client.open_watch(b"a/", b"a0", 0, [("token", second)])
        await asyncio.to_thread(etcd.ctl, "--user=root:r", "user", "revoke-role", "u1", "reader")
        refused = client.watch([("token", first)])
        refused.create(b"a/", b"a0")
        assert (await refused.next()).cancel_reason == DENIED
        await broken(proxy, way)
        await put(etcd, "a/k", "1")
        await until_async(lambda: stayer.values == [b"1"], "the event after the break")
        # etcd, too, checks rights only when a watch is created.
        await until_async(lambda: revoked.values == [b"1"], "the event after the break")
        await asyncio.to_thread(etcd.ctl, "--user=root:r", "user", "revoke-role", "u2", "reader")
        await broken(proxy, way)
        for stream in (revoked, stayer):
            assert await stream.raw.end() == (Status.UNAVAILABLE, "etcdserver: permission denied")


def jwt_flags(directory: Path, ttl: str) -> list[str]:
    """Return the flags of an etcd whose tokens are signed, and expire even in use."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private, public = directory / "jwt.key", directory / "jwt.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return [f"--auth-token=jwt,pub-key={public},priv-key={private},sign-method=RS256,ttl={ttl}"]


@pytest.mark.long
async def test_signed_tokens_that_are_older_than_the_users(tmp_path: Path) -> None:
    """With signed tokens any change of users invalidates all older ones: refused as etcd does, trunks rotate."""
    with EtcdServer(extra=jwt_flags(tmp_path, "5m")) as etcd:
        with_users(etcd)
        async with behind_a_relay(etcd) as (proxy, client, way):
            old = await token_of(client, "u1")
            first = await client.open_watch(b"a/", b"a0", 0, [("token", old)])
            await asyncio.to_thread(etcd.ctl, "--user=root:r", "user", "add", "another:p")
            direct = await RawClient.connect(etcd.client_port)
            reasons = []
            for asked in (direct, client):
                stream = asked.watch([("token", old)])
                stream.create(b"a/", b"a0")
                reasons.append((await stream.next()).cancel_reason)
            await direct.close()
            assert (
                reasons[0]
                == reasons[1]
                == "rpc error: code = InvalidArgument desc = etcdserver: revision of auth store is old"
            )
            second = await client.open_watch(b"a/", b"a0", 0, [("token", await token_of(client, "u2"))])
            await broken(proxy, way)
            await put(etcd, "a/k", "1")
            for stream in (first, second):
                await until_async(lambda s=stream: s.values == [b"1"], "the event after the break")  # type: ignore[misc]
            await asyncio.to_thread(etcd.ctl, "--user=root:r", "user", "delete", "another")
            await broken(proxy, way)
            for stream in (first, second):
                status, text = await stream.raw.end()
                assert (status, text) == (Status.UNAVAILABLE, "etcdserver: revision of auth store is old")


@pytest.mark.long
async def test_signed_tokens_that_expire(tmp_path: Path) -> None:
    with EtcdServer(extra=jwt_flags(tmp_path, "4s")) as etcd:
        with_users(etcd)
        async with behind_a_relay(etcd) as (proxy, client, way):
            first = await client.open_watch(b"a/", b"a0", 0, [("token", await token_of(client, "u1"))])
            end = asyncio.get_running_loop().time() + 5
            await until_async(lambda: asyncio.get_running_loop().time() > end, "the token to expire")
            second = await client.open_watch(b"a/", b"a0", 0, [("token", await token_of(client, "u2"))])
            await broken(proxy, way)
            await put(etcd, "a/k", "1")
            for stream in (first, second):
                await until_async(lambda s=stream: s.values == [b"1"], "the event after the break")  # type: ignore[misc]


@pytest.mark.parametrize("binary", etcds(), ids=lambda binary: binary.name)
async def test_without_auth_no_token_is_needed(binary: EtcdBinary) -> None:
    with EtcdServer(binary) as etcd:
        async with behind_a_relay(etcd) as (_proxy, client, _way):
            stream = await client.open_watch(b"a/", b"a0")
            await asyncio.to_thread(etcd.ctl, "put", "a/k", "1")
            await until_async(lambda: stream.values == [b"1"], "the event")


async def test_without_auth_one_probe_a_second_at_most(etcd: EtcdServer) -> None:
    async with behind_a_relay(etcd) as (proxy, client, _way):
        await asyncio.to_thread(etcd.ctl, "put", "a/k", "0")
        await client.open_watch(b"a/", b"a0", 1)
        loop = asyncio.get_running_loop()
        reads, began = proxy.reader.reads, loop.time()
        for _ in range(60):
            await client.open_watch(b"a/", b"a0", 2)
        assert proxy.reader.reads - reads <= 1 + (loop.time() - began)
