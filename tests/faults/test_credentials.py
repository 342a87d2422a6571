"""The proxy's own etcd user: trunks are watched as this user, and nothing else is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from proto.framing import Status
from proto.pb import rpc_pb2
from tests.e2e.raw_client import RawClient
from tests.e2e.running import next_to_etcd, proxy_for
from tests.e2e.test_auth import DENIED, EMPTY, put, token_of, with_users
from tests.etcd.server import EtcdServer
from tests.faults.relay import relay_to
from tests.faults.test_tokens import TTL_S, broken
from tests.waiting import until_async
from upstream.credentials import Credentials

PUT = "/etcdserverpb.KV/Put"
RANGE = "/etcdserverpb.KV/Range"


def with_proxy_user(etcd: EtcdServer) -> None:
    """Add the user `proxy`, with the rights of all the others, and enable auth."""
    with_users(etcd)
    for line in ("user add proxy:secret", "user grant-role proxy reader"):
        etcd.ctl("--user=root:r", *line.split())


OWN = Credentials("proxy", "secret")


def test_the_password_is_never_shown() -> None:
    assert "secret" not in repr(OWN)


@pytest.mark.long
async def test_trunks_live_on_when_every_token_has_expired() -> None:
    with EtcdServer(extra=[f"--auth-token-ttl={TTL_S}"]) as etcd:
        with_proxy_user(etcd)
        async with (
            relay_to(etcd.client_port) as way,
            proxy_for(way.endpoint, credentials=OWN) as proxy,
            await RawClient.connect(proxy.port) as client,
        ):
            tokens = [await token_of(client, user) for user in ("u1", "u2")]
            streams = [await client.open_watch(b"a/", b"a0", 0, [("token", token)]) for token in tokens]
            upstream = next_to_etcd(proxy).upstream
            first = upstream.own_token
            assert first is not None
            end = asyncio.get_running_loop().time() + TTL_S + 1.5
            await until_async(lambda: asyncio.get_running_loop().time() > end, "all tokens to expire")
            await broken(proxy, way)
            await put(etcd, "a/k", "1")
            for stream in streams:
                await until_async(lambda s=stream: s.values == [b"1"], "the event after the break")  # type: ignore[misc]
            assert upstream.own_token not in (None, first)
            assert not any(stream.raw.over for stream in streams)


async def test_client_requests_never_use_the_user_of_the_proxy(etcd: EtcdServer) -> None:
    with_proxy_user(etcd)
    async with (
        proxy_for(etcd, credentials=OWN) as proxy,
        await RawClient.connect(proxy.port) as client,
    ):
        await until_async(lambda: proxy.upstream.own_token, "the proxy to log in")
        reader = await client.open_watch(b"a/", b"a0", 0, [("token", await token_of(client, "u1"))])
        other: list[Any] = [("token", await token_of(client, "u3"))]
        for metadata, reason in ((other, DENIED), ([], EMPTY)):
            for start in (0, 1, 2):
                stream = client.watch(metadata)
                stream.create(b"a/", b"a0", start)
                response = await stream.next()
                assert (response.created, response.canceled, response.cancel_reason) == (True, True, reason)
        message = rpc_pb2.RangeRequest(key=b"a/k").SerializeToString()
        assert (await client.unary(RANGE, message)).text == "etcdserver: user name is empty"
        assert (await client.unary(RANGE, message, other)).status == Status.PERMISSION_DENIED
        await put(etcd, "a/k", "1")
        await until_async(lambda: reader.values == [b"1"], "the event")


@pytest.mark.long
async def test_ranges_the_proxy_may_not_read_use_client_tokens(etcd: EtcdServer) -> None:
    """Also if the proxy cannot log in at all."""
    with_proxy_user(etcd)
    for own in (OWN, Credentials("proxy", "wrong"), Credentials("unknown", "x")):
        async with (
            relay_to(etcd.client_port) as way,
            proxy_for(way.endpoint, credentials=own) as proxy,
            await RawClient.connect(proxy.port) as client,
        ):
            token = await token_of(client, "u3")
            streams = [await client.open_watch(b"b", b"", start, [("token", token)]) for start in (0, 0)]
            await put(etcd, "b", own.password)
            await broken(proxy, way)
            await put(etcd, "b", "again")
            expected = [own.password.encode(), b"again"]
            for stream in streams:
                await until_async(lambda s=stream, e=expected: s.values == e, "the events")  # type: ignore[misc]


async def test_credentials_while_auth_is_off(etcd: EtcdServer) -> None:
    async with (
        relay_to(etcd.client_port) as way,
        proxy_for(way.endpoint, credentials=OWN) as proxy,
        await RawClient.connect(proxy.port) as client,
    ):
        stream = await client.open_watch(b"a/", b"a0")
        await asyncio.to_thread(etcd.ctl, "put", "a/k", "1")
        await until_async(lambda: stream.values == [b"1"], "the event")
        await asyncio.to_thread(with_proxy_user, etcd)
        # From the next connection on, the trunk uses the proxy's user.
        await broken(proxy, way)
        await put(etcd, "a/k", "2")
        await until_async(lambda: stream.values == [b"1", b"2"], "the event after the break")
        assert next_to_etcd(proxy).upstream.own_token is not None
