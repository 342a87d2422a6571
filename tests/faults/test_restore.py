"""A store restored from an older snapshot: its revision goes back, and no client is left waiting."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from coalesce.ending import OTHER_HISTORY
from proto.framing import Status
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct, proxy_for, served
from tests.e2e.test_auth import put, token_of
from tests.etcd.server import EtcdServer
from tests.faults.relay import relay_to
from tests.faults.scene import PREFIX, PREFIX_END, also_with_a_cover
from tests.faults.test_credentials import OWN, with_proxy_user
from tests.waiting import until_async
from upstream.credentials import Credentials
from upstream.settings import UpstreamSettings

pytestmark = also_with_a_cover()


@pytest.mark.parametrize("beyond", [False, True])
async def test_a_store_restored_from_a_snapshot(etcd: EtcdServer, tmp_path: Path, beyond: bool) -> None:
    """`beyond`: the restored store is written to before the proxy sees it, but not past the old revision."""
    async with served(etcd) as (proxy, store, client):
        for number in range(10):
            kept = await store.put(PREFIX + b"a", b"%d" % number)
        await asyncio.to_thread(etcd.ctl, "snapshot", "save", str(tmp_path / "s"))
        for number in range(40):
            lost = await store.put(PREFIX + b"a", b"lost %d" % number)
        above = [await client.open_watch(PREFIX, PREFIX_END, start) for start in (0, kept, lost)]
        above.append(await client.open_watch(PREFIX + b"a"))
        future = await client.open_watch(PREFIX, PREFIX_END, lost + 50)
        await until_async(lambda: len(above[1].values) == lost - kept + 1, "the past")
        await asyncio.to_thread(etcd.stop)
        await asyncio.to_thread(etcd.restore, tmp_path / "s")
        await asyncio.to_thread(etcd.start)
        if beyond:
            for number in range(5):
                kept = await store.put(PREFIX + b"a", b"new %d" % number)
        for stream in above:
            await until_async(lambda s=stream: s.responses[-1].canceled, "the cancel")  # type: ignore[misc]
            last = stream.responses[-1]
            assert (last.cancel_reason, last.compact_revision) == (OTHER_HISTORY, last.header.revision)
            assert last.header.revision <= kept + 1
        assert proxy.engine.stats.went_back == 1
        # The same sessions go on.
        stream = above[0]
        stream.create(PREFIX, PREFIX_END)
        await until_async(lambda: stream.responses[-1].created, "a new watch")
        assert stream.responses[-1].header.revision < lost
        old = await client.open_watch(PREFIX, PREFIX_END, 2)
        first = await store.put(PREFIX + b"a", b"again")
        assert first < lost
        await until_async(lambda: stream.values[-1:] == [b"again"], "an event of the restored store")
        await until_async(lambda: old.values[-1:] == [b"again"], "an event of the restored store")
        assert not [value for value in old.values if value.startswith(b"lost")]
        assert len(old.values) == first - 1
        while await store.put(PREFIX + b"a", b"later") < lost + 50:
            pass
        await until_async(lambda: future.values == [b"later"], "the future")


async def test_a_restored_store_that_has_grown_past_the_old_one(etcd: EtcdServer, tmp_path: Path) -> None:
    """Its revision is not lower, its ids and term are the same; its log differs, which is detected before any event."""
    async with (
        relay_to(etcd.client_port) as way,
        proxy_for(way.endpoint) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port) as client,
    ):
        for number in range(10):
            kept = await store.put(PREFIX + b"a", b"%d" % number)
        await asyncio.to_thread(etcd.ctl, "snapshot", "save", str(tmp_path / "s"))
        for number in range(20):
            lost = await store.put(PREFIX + b"a", b"lost %d" % number)
        old = [await client.open_watch(PREFIX, PREFIX_END, start) for start in (0, kept, lost)]
        future = await client.open_watch(PREFIX, PREFIX_END, lost + 60)
        await until_async(lambda: old[1].values[-1:] == [b"lost 19"], "the past")
        way.cut()
        await asyncio.to_thread(etcd.stop)
        await asyncio.to_thread(etcd.restore, tmp_path / "s")
        await asyncio.to_thread(etcd.start)
        while (newest := await store.put(PREFIX + b"a", b"new")) < lost + 30:
            pass
        way.mend()
        for stream in old:
            await until_async(lambda s=stream: s.responses[-1].canceled, "the cancel")  # type: ignore[misc]
            last = stream.responses[-1]
            assert (last.cancel_reason, last.compact_revision) == (OTHER_HISTORY, last.header.revision)
            assert b"new" not in stream.values
        assert proxy.engine.stats.went_back == 1
        again = await client.open_watch(PREFIX, PREFIX_END, kept + 1)
        await until_async(lambda: len(again.values) == newest - kept, "the history of the restored store")
        assert set(again.values) == {b"new"}
        while await store.put(PREFIX + b"a", b"later") < lost + 60:
            pass
        await until_async(lambda: future.values == [b"later"], "the future")
        assert proxy.engine.stats.went_back == 1


async def test_a_restore_while_a_client_waits_for_progress(etcd: EtcdServer, tmp_path: Path) -> None:
    async with served(etcd) as (_proxy, store, client):
        await store.put(b"x", b"0")
        await asyncio.to_thread(etcd.ctl, "snapshot", "save", str(tmp_path / "s"))
        for _ in range(20):
            lost = await store.put(b"x", b"1")
        stream = await client.open_watch(PREFIX, PREFIX_END)
        stream.progress()
        await until_async(lambda: stream.responses[-1].watch_id == -1, "progress")
        assert stream.responses[-1].header.revision == lost
        await asyncio.to_thread(etcd.stop)
        stream.progress()
        await asyncio.to_thread(etcd.restore, tmp_path / "s")
        await asyncio.to_thread(etcd.start)
        await until_async(lambda: stream.responses[-1].canceled, "the cancel")
        assert stream.responses[-1].cancel_reason == OTHER_HISTORY
        again = await client.open_watch(PREFIX, PREFIX_END)
        again.progress()
        await until_async(lambda: again.responses[-1].watch_id == -1, "progress of the restored store")
        assert again.responses[-1].header.revision < lost


@pytest.mark.long
@pytest.mark.parametrize("own", [None, OWN], ids=["tokens of clients", "a user of the proxy's own"])
async def test_a_restore_that_takes_the_tokens_along(etcd: EtcdServer, tmp_path: Path, own: Credentials | None) -> None:
    """With auth on no client may read until it has logged in again; the restore is detected all the same."""
    with_proxy_user(etcd)
    root = "--user=root:r"
    async with (
        proxy_for(etcd, credentials=own, upstream=UpstreamSettings(create_timeout_s=1)) as proxy,
        await RawClient.connect(proxy.port) as client,
    ):
        await put(etcd, "a/k", "kept")
        await asyncio.to_thread(etcd.ctl, root, "snapshot", "save", str(tmp_path / "s"))
        for number in range(4):
            await put(etcd, "a/k", f"lost {number}")
        old = await client.open_watch(b"a/", b"a0", 2, [("token", await token_of(client, "u1"))])
        await until_async(lambda: old.values[-1:] == [b"lost 3"], "the past")
        await asyncio.to_thread(etcd.stop)
        await asyncio.to_thread(etcd.restore, tmp_path / "s")
        await asyncio.to_thread(etcd.start)
        if own is None:
            assert (await old.raw.end())[0] == Status.UNAVAILABLE
            # At once, as clients do: before the trunk's linger ends.
            again = await client.open_watch(b"a/", b"a0", 2, [("token", await token_of(client, "u1"))])
            await put(etcd, "a/k", "new")
            await until_async(lambda: again.values[-1:] == [b"new"], "an event of the restored store")
            assert not [value for value in again.values if value.startswith(b"lost")]
        else:
            await until_async(lambda: old.responses[-1].canceled, "the cancel")
            assert old.responses[-1].cancel_reason == OTHER_HISTORY
        assert proxy.engine.stats.went_back == 1
