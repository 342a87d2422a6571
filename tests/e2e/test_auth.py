"""etcd's auth through the proxy: each client may watch exactly the ranges that its own token may read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from proto.framing import Status
from proto.pb import rpc_pb2
from proxy.server import Proxy
from tests.e2e.raw_client import RawClient
from tests.e2e.running import proxy_for
from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.server import EtcdServer
from tests.waiting import until_async

AUTHENTICATE = "/etcdserverpb.Auth/Authenticate"


def with_users(etcd: EtcdServer) -> None:
    """Enable auth: root may do everything, u1 and u2 may read [a/, a0), u3 the key b."""
    lines = ["user add root:r", "user grant-role root root", "role add reader", "role add other"]
    lines += ["role grant-permission reader read a/ a0", "role grant-permission other read b"]
    for user, role in (("u1", "reader"), ("u2", "reader"), ("u3", "other")):
        lines += [f"user add {user}:p", f"user grant-role {user} {role}"]
    for line in (*lines, "auth enable"):
        etcd.ctl(*line.split())


async def token_of(client: RawClient, user: str, password: str = "p") -> str:
    """Log in through the proxy."""
    request = rpc_pb2.AuthenticateRequest(name=user, password=password).SerializeToString()
    call = await client.unary(AUTHENTICATE, request)
    assert call.status == Status.OK, call.text
    return rpc_pb2.AuthenticateResponse.FromString(call.messages[0]).token


@asynccontextmanager
async def proxy_and_client(etcd: EtcdServer) -> AsyncIterator[tuple[Proxy, RawClient]]:
    """Yield a proxy in front of an etcd with auth on, and a client of it."""
    async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port) as client:
        yield proxy, client


async def put(etcd: EtcdServer, key: str, value: str) -> None:
    """Put as root."""
    await asyncio.to_thread(etcd.ctl, "--user=root:r", "put", key, value)


DENIED = "rpc error: code = PermissionDenied desc = etcdserver: permission denied"
INVALID = "rpc error: code = Unauthenticated desc = etcdserver: invalid auth token"
EMPTY = "rpc error: code = InvalidArgument desc = etcdserver: user name is empty"


@pytest.mark.parametrize("header", ["token", "authorization"])
@pytest.mark.parametrize("binary", etcds(), ids=lambda binary: binary.name)
async def test_watches_are_refused_with_etcds_texts(binary: EtcdBinary, header: str) -> None:
    with EtcdServer(binary) as etcd:
        with_users(etcd)
        async with proxy_and_client(etcd) as (proxy, client):
            token = await token_of(client, "u1")
            stream = client.watch([(header, token)])
            stream.create(b"b")
            # A right to [a/, a0) does not cover everything from a/ on, though older releases of etcd allow that.
            stream.create(b"a/k", b"a/z")
            refused = await stream.next()
            assert (refused.created, refused.canceled, refused.watch_id) == (True, True, -1)
            assert refused.cancel_reason == DENIED
            assert refused.header.revision > 0
            assert (await stream.created()).watch_id == 0
            for metadata, reason in (([(header, "nonsense")], INVALID), ([], EMPTY)):
                stranger = client.watch(metadata)
                stranger.create(b"a/k")
                response = await stranger.next()
                assert (response.created, response.canceled, response.cancel_reason) == (True, True, reason)
            assert proxy.engine.core.stats.watches == 1


async def test_users_with_the_same_right_share_a_watch(etcd: EtcdServer) -> None:
    with_users(etcd)
    async with proxy_and_client(etcd) as (_proxy, client):
        tokens = [await token_of(client, user) for user in ("u1", "u2", "u3")]
        base = etcd.watchers()
        streams = [client.watch([("token", token)]) for token in tokens[:2] for _ in range(5)]
        for stream in streams:
            stream.create(b"a/", b"a0")
            await stream.created()
        assert etcd.watchers() == base + 1
        third = client.watch([("token", tokens[2])])
        third.create(b"a/", b"a0")
        assert (await third.next()).cancel_reason == DENIED
        await put(etcd, "a/k", "v")
        for stream in streams:
            await until_async(lambda s=stream: s.values == [b"v"], "the event")  # type: ignore[misc]  # bound
        assert third.values == []


async def test_a_trunk_outlives_the_user_who_opened_it(etcd: EtcdServer) -> None:
    with_users(etcd)
    async with proxy_and_client(etcd) as (_proxy, client):
        first, second = await token_of(client, "u1"), await token_of(client, "u2")
        opener, stayer = client.watch([("token", first)]), client.watch([("token", second)])
        for stream in (opener, stayer):
            stream.create(b"a/k")
            await stream.created()
        opener.raw.cancel()
        await put(etcd, "a/k", "1")
        await until_async(lambda: stayer.values == [b"1"], "the event")


async def test_sessions_whose_token_etcd_forgets_are_ended(etcd: EtcdServer) -> None:
    with_users(etcd)
    async with proxy_and_client(etcd) as (proxy, client):
        stream = client.watch([("token", await token_of(client, "u1"))])
        stayer = client.watch([("token", await token_of(client, "u2"))])
        for each, key in ((stream, b"a/k"), (stayer, b"a/l")):
            each.create(key)
            await each.created()
        # A new password invalidates the tokens of a user; a watch that etcd has admitted goes on until it breaks.
        await asyncio.to_thread(etcd.ctl, "--user=root:r", "user", "passwd", "u1", "--interactive=false", stdin="new")
        await asyncio.to_thread(etcd.kill)
        await asyncio.to_thread(etcd.start)
        status, text = await stream.raw.end()
        assert status == Status.UNAVAILABLE, text
        again = await client.open_watch(b"a/k", metadata=[("token", await token_of(client, "u1", "new"))])
        await put(etcd, "a/k", "1")
        await put(etcd, "a/l", "2")
        await until_async(lambda: again.values == [b"1"], "the event")
        # The other token may or may not have come back from etcd's log; either way its client is served or refused.
        await until_async(lambda: stayer.values == [b"2"] or stayer.raw.over, "an event or the end of the other one")
        assert stayer.raw.status in (None, Status.UNAVAILABLE)
        assert proxy.engine.core.stats.sessions == 2 - stayer.raw.over


async def test_auth_is_enabled_while_clients_watch(etcd: EtcdServer) -> None:
    async with proxy_and_client(etcd) as (_proxy, client):
        await client.open_watch(b"a/k")
        await asyncio.to_thread(with_users, etcd)
        # "Auth is off" is cached for a second at most; in that second a client is admitted, or refused.
        reasons: list[str] = []
        while not reasons or reasons[-1] != EMPTY:
            asked = client.watch()
            asked.create(b"a/k")
            await until_async(lambda a=asked: a.raw.messages or a.raw.over, "an answer")  # type: ignore[misc]  # bound
            reasons.append(asked.responses[0].cancel_reason if asked.raw.messages else str(asked.raw.status))
        assert set(reasons) <= {"", EMPTY, str(int(Status.UNAVAILABLE))}
        await client.open_watch(b"a/k", metadata=[("token", await token_of(client, "u1"))])
