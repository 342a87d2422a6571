"""A restored store is detected by its log; a lagging member of the old one is not mistaken for it."""

from __future__ import annotations

import asyncio

import pytest

from proto.scan import Header
from tests.e2e.running import Etcd, direct
from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.server import EtcdServer
from tests.upstream.recorder import Recorder
from tests.upstream.stories import Opened
from tests.waiting import until_async
from upstream.endpoints import parse_endpoints
from upstream.settings import UpstreamSettings
from upstream.watching.client import WatchClient
from upstream.watching.lineage import HistoryTracker, HistoryVerdict, RaftPosition, is_suspect


def at(revision: int, applied: int, committed: int | None = None, cluster_id: int = 7) -> RaftPosition:
    return RaftPosition(Header.make(cluster_id, 8, revision, 2), applied, applied if committed is None else committed)


@pytest.mark.parametrize(
    ("before", "now", "suspect"),
    [
        (at(51, 54), at(51, 54), False),
        (at(51, 54), at(81, 84), False),
        # Each revision is one entry, and some entries have none.
        (at(51, 54), at(81, 200), False),
        (at(51, 54), at(81, 83), True),
        # A snapshot at 21, and 60 writes since.
        (at(51, 54), at(81, 64), True),
        # Restored twice from one snapshot: not detectable.
        (at(81, 64), at(91, 74), False),
        # Members that lag: at a lower revision, or only by entries without revisions.
        (at(51, 54), at(40, 43), False),
        (at(51, 154), at(51, 90), False),
        (at(51, 154), at(52, 154), True),
        (at(51, 154), at(52, 155), False),
        # The applied index lags behind the committed one.
        (at(51, 54), at(81, 60, 84), False),
        # Not an etcd, or one that does not report its log.
        (at(51, 0), at(81, 0), False),
        (at(51, 54), at(81, 0), False),
        (at(51, 54), at(51, 54, cluster_id=9), True),
    ],
)
def test_log_that_grew_less_than_the_revision_is_suspect(
    before: RaftPosition, now: RaftPosition, suspect: bool
) -> None:
    assert is_suspect(before, now) is suspect


def test_suspect_that_does_not_answer_is_not_used() -> None:
    lineage = HistoryTracker()
    assert lineage.check(at(51, 54)) is HistoryVerdict.SAME
    suspect = at(81, 64)
    assert lineage.check(suspect) is HistoryVerdict.SUSPECT
    assert lineage.check_again(suspect, None) is HistoryVerdict.UNKNOWN
    # The known position has not changed.
    assert lineage.check(suspect) is HistoryVerdict.SUSPECT
    assert lineage.check_again(suspect, at(90, 100)) is HistoryVerdict.SAME


def test_restored_store_becomes_the_known_history() -> None:
    lineage = HistoryTracker()
    lineage.check(at(51, 54))
    restored = at(81, 64)
    lineage.check(restored)
    assert lineage.check_again(restored, at(82, 65)) is HistoryVerdict.OTHER
    assert lineage.known == restored
    assert lineage.check(at(90, 73)) is HistoryVerdict.SAME
    # Restored again, from a snapshot at 81: the log is shorter than before.
    assert lineage.check(at(95, 17)) is HistoryVerdict.SUSPECT


def test_history_is_checked_again_after_the_known_revision() -> None:
    lineage = HistoryTracker()
    lineage.check(at(51, 54))
    connected = at(51, 40)
    assert lineage.check(connected) is HistoryVerdict.SAME
    assert not lineage.is_check_due(connected, 51)
    assert lineage.is_check_due(connected, 52)
    assert not lineage.is_check_due(None, 52)
    # Its first position is known already.
    assert lineage.known is not None
    assert not lineage.is_check_due(lineage.known, 60)


CURRENT, *OLDER = etcds()


@pytest.mark.parametrize(
    "binary",
    [CURRENT, *(pytest.param(older, marks=pytest.mark.long) for older in OLDER)],
    ids=lambda binary: binary.name,
)
async def test_restore_is_detected_and_restart_is_not_taken_for_one(
    binary: EtcdBinary, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also when the restored store is at first not ahead of the old one, and passes it later."""
    snapshot = tmp_path_factory.mktemp("snapshot") / "s"

    async def story(etcd: EtcdServer, store: Etcd, client: WatchClient, seen: Recorder) -> None:
        watch = Opened(b"a")
        for number in range(20):
            await store.put(b"a", b"%d" % number)
        etcd.ctl("snapshot", "save", str(snapshot))
        for number in range(30):
            last = await store.put(b"a", b"%d" % number)
        client.open(watch)
        client.start()
        await until_async(lambda: seen.created(watch), "the watch")
        await asyncio.to_thread(etcd.stop)
        etcd.start()
        last = await store.put(b"a", b"x")
        await until_async(lambda: last in seen.revisions(watch), "the event after a restart")
        assert seen.others == []
        await asyncio.to_thread(etcd.stop)
        etcd.restore(snapshot)
        etcd.start()
        while await store.put(b"a", b"new") < last:
            pass
        await until_async(lambda: seen.resumes >= 3, "the connection to the restored store")
        assert seen.others == []
        after = await store.put(b"a", b"past it")
        await until_async(lambda: bool(seen.others), "the look at the history")
        assert seen.others[0] >= after

    with EtcdServer(binary) as etcd:
        seen = Recorder()
        client = WatchClient(parse_endpoints(etcd.endpoint), seen, UpstreamSettings(create_timeout_s=0.4))
        async with direct(etcd) as store:
            try:
                await story(etcd, store, client, seen)
            finally:
                # In any case: a loop with open connections does not close.
                await client.stop()
