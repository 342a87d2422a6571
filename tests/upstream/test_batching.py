"""Events that follow each other closely are read in batches, as the hub of `--workers` does."""

from __future__ import annotations

import asyncio

import pytest

from proxy.config.applied import upstream_settings
from proxy.config.knobs import Settings
from tests.upstream.recorder import Recorder, watching
from tests.upstream.scripted import ScriptedCall, ScriptedEtcd, scripted
from tests.upstream.stories import Opened, request
from tests.waiting import until_async
from upstream.connection import ClientConnection
from upstream.settings import HUB_BATCH_INTERVAL_S, ConnectionSettings, UpstreamSettings
from upstream.watching.client import WatchClient

BATCHED = UpstreamSettings(connection=ConnectionSettings(batch_interval_s=1.0))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads of connections to etcd."""
    sizes: list[int] = []
    data_received = ClientConnection.data_received

    def counted(self: ClientConnection, data: bytes) -> None:
        sizes.append(len(data))
        data_received(self, data)

    monkeypatch.setattr(ClientConnection, "data_received", counted)
    return sizes


async def followed(etcd: ScriptedEtcd, client: WatchClient, recorder: Recorder, watch: Opened) -> ScriptedCall:
    """Open a watch, send an event and one that follows it, each passed on when it comes; return the call."""
    await recorder.open(client, watch)
    [call] = etcd.watches()
    for revision in (20, 21):
        call.answer(0, revision, [revision])
        await until_async(lambda: revision in recorder.revisions(watch), "the event")  # noqa: B023 - awaited in this pass
    return call


async def unread(etcd: ScriptedEtcd) -> None:
    """Wait until the server has sent all, so that it lies in the kernel."""
    transport = etcd.connections[0].transport
    assert transport is not None
    await until_async(lambda: transport.get_write_buffer_size() == 0, "the server to send all")


async def test_a_burst_of_events_is_read_at_once_in_order(reads: list[int]) -> None:
    async with scripted() as etcd:
        recorder, watch = Recorder(), Opened(b"a")
        async with watching(etcd.endpoint, recorder, BATCHED) as client:
            call = await followed(etcd, client, recorder, watch)
            before = len(reads)
            for revision in range(22, 52):
                call.answer(0, revision, [revision])
                await asyncio.sleep(0)
            await unread(etcd)
            assert recorder.revisions(watch) == [20, 21]
            await until_async(lambda: len(recorder.revisions(watch)) == 32, "the events")
            assert recorder.revisions(watch) == list(range(20, 52))
            assert len(reads) - before == 1
            # Without a joined response the watch would have got 30, and each of its clients as many frames.
            assert len(recorder.of(watch)) == 4


async def test_a_connection_that_ends_in_a_batch_loses_no_event() -> None:
    async with scripted() as etcd:
        recorder, watch = Recorder(), Opened(b"a")
        async with watching(etcd.endpoint, recorder, BATCHED) as client:
            call = await followed(etcd, client, recorder, watch)
            call.answer(0, 22, [22])
            await unread(etcd)
            etcd.revision = 30
            etcd.drop()
            await until_async(lambda: len(etcd.watches()) > 1, "the client to come back")
            assert recorder.revisions(watch) in ([20, 21], [20, 21, 22])
            last = recorder.revisions(watch)[-1]
            await until_async(lambda: etcd.watches()[-1].messages, "the create")
            assert request(etcd.watches()[-1].messages[0]) == f"create a from {last + 1}"
            assert recorder.breaks == 1


def test_only_the_hub_reads_in_batches() -> None:
    assert upstream_settings(Settings()).connection.batch_interval_s == 0
    assert upstream_settings(Settings(), is_hub=True).connection.batch_interval_s == HUB_BATCH_INTERVAL_S
