"""The durable store: the data that survives, and the files that it refuses."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from proto.pb import rpc_pb2
from tests.etcd.server import EtcdServer
from tests.store import sequences
from tests.store.both import Client, ask_state
from tests.store.running import RunningStore
from upstream.store.errors import STOPPED, StoreError
from upstream.store.journal import FILE_NAME, Journal
from upstream.store.recorder import StoreDataError
from upstream.store.server import StoreSettings
from upstream.store.state import StoreIdentity, StoreState
from upstream.store.writer import StoreWriter


def open_state(directory: Path) -> tuple[StoreState, Journal]:
    journal = Journal(directory, 11, 12)
    stored = journal.take_stored()
    state = StoreState(StoreIdentity(stored.cluster_id, stored.member_id), lambda: 4711, journal)
    state.load(stored, 0.0)
    return state, journal


def snapshot(state: StoreState) -> object:
    """Return all data that a client could read."""
    mvcc = state.mvcc
    first = max(mvcc.compact_revision, 1)
    reads = [mvcc.range(b"\x00", b"\x00", revision).records for revision in range(first, mvcc.revision + 1)]
    log = mvcc.changes(max(mvcc.log_floor, first), mvcc.revision)
    leases = [(lease.lease_id, lease.ttl_s, sorted(lease.keys)) for lease in state.lessor.leases()]
    return mvcc.revision, mvcc.compact_revision, str(reads), str(log), sorted(leases), mvcc.size_bytes


@pytest.mark.parametrize("seed", range(20))
def test_committed_changes_survive_a_crash(seed: int, tmp_path: Path) -> None:
    rng = Random(seed)
    state, journal = open_state(tmp_path / "a")
    for _ in range(60):
        ask_state(state, sequences.request(rng, state.mvcc.revision))
    journal.commit()
    # A copy of the files as they are now has the contents after a crash: the process cannot close them properly.
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    ask_state(state, rpc_pb2.PutRequest(key=b"not committed"))
    again, second = open_state(tmp_path / "b")
    while not state.mvcc.compact_step(1000):
        pass
    while not again.mvcc.compact_step(1000):
        pass
    ask_state(again, rpc_pb2.PutRequest(key=b"not committed"))
    assert snapshot(again) == snapshot(state)
    assert again.identity == state.identity
    for opened in (journal, second):
        opened.close()
    third, last = open_state(tmp_path / "b")
    assert snapshot(third) == snapshot(again)
    last.close()


def test_alarms_survive_a_restart(tmp_path: Path) -> None:
    state, journal = open_state(tmp_path)
    activate, deactivate = rpc_pb2.AlarmRequest.ACTIVATE, rpc_pb2.AlarmRequest.DEACTIVATE
    for action, member_id in ((activate, 2**64 - 1), (activate, 7), (deactivate, 7)):
        state.alarm(rpc_pb2.AlarmRequest(action=action, memberID=member_id, alarm=rpc_pb2.NOSPACE))
    journal.close()
    again, second = open_state(tmp_path)
    assert again.alarms.all() == [(2**64 - 1, rpc_pb2.NOSPACE)]
    with pytest.raises(StoreError):
        again.put(rpc_pb2.PutRequest(key=b"a"))
    second.close()


def test_compaction_deletes_rows_of_the_file(tmp_path: Path) -> None:
    state, journal = open_state(tmp_path)
    for _ in range(50):
        ask_state(state, rpc_pb2.PutRequest(key=b"a"))
    ask_state(state, rpc_pb2.CompactionRequest(revision=51))
    while not state.mvcc.compact_step(1000):
        pass
    journal.close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as file:
        assert file.execute("SELECT count(*) FROM records").fetchone() == (1,)


def refusal(directory: Path) -> str:
    before = {path.name: path.read_bytes() for path in directory.iterdir() if path.name == FILE_NAME}
    with pytest.raises(StoreDataError) as error:
        Journal(directory, 1, 2)
    assert {name: (directory / name).read_bytes() for name in before} == before
    assert "\n" not in str(error.value)
    assert str(directory / FILE_NAME) in str(error.value)
    return str(error.value)


def filled(directory: Path) -> Path:
    """Make a data directory with some pages of records and return its file."""
    state, journal = open_state(directory)
    ask_state(state, rpc_pb2.LeaseGrantRequest(ID=23, TTL=100))
    for at in range(200):
        ask_state(state, rpc_pb2.PutRequest(key=b"%d" % at, value=bytes(200), lease=23 * (at == 5)))
    journal.close()
    return directory / FILE_NAME


def test_a_file_that_is_not_a_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("hello")
    assert "is not a store's data file" in refusal(tmp_path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).touch()
    assert "is not a store's data file" in refusal(tmp_path)


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as file:
        file.execute("CREATE TABLE mine (a)")
    assert "is an SQLite file of another program" in refusal(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(filled(tmp_path))) as file:
        file.execute("PRAGMA journal_mode = DELETE")
        file.execute("PRAGMA user_version = 2")
        file.commit()
    assert "has format 2; this release supports format 1 only" in refusal(tmp_path)


@pytest.mark.parametrize("where", [0.3, 0.6, 0.9])
def test_overwritten_pages_are_detected(where: float, tmp_path: Path) -> None:
    path = filled(tmp_path)
    data = bytearray(path.read_bytes())
    start = int(len(data) * where) // 4096 * 4096
    data[start : start + 4096] = b"\xa5" * 4096
    path.write_bytes(data)
    assert "is damaged" in refusal(tmp_path)


def test_a_truncated_file_is_detected(tmp_path: Path) -> None:
    path = filled(tmp_path)
    path.write_bytes(path.read_bytes()[:-8192])
    assert "is damaged" in refusal(tmp_path)


@pytest.mark.parametrize("seed", range(12))
def test_a_changed_byte_is_detected_or_harmless(seed: int, tmp_path: Path) -> None:
    path = filled(tmp_path)
    expected, journal = open_state(tmp_path)
    journal.close()
    rng = Random(seed)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    try:
        again, second = open_state(tmp_path)
    except StoreDataError:
        return
    second.close()
    assert snapshot(again) == snapshot(expected)


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("DELETE FROM records WHERE mod_revision = 7", "revision 7 is missing"),
        ("DELETE FROM records WHERE mod_revision > 190", "its newest revision is 201, but its records end at 190"),
        ("UPDATE records SET sub_revision = 3 WHERE mod_revision = 9", "the checksum of revision 9 is wrong"),
        ("DELETE FROM meta", "its revision is missing"),
        ("UPDATE records SET value = x'00' WHERE mod_revision = 7", "the checksum of revision 7 is wrong"),
        ("UPDATE records SET value = 'text' WHERE mod_revision = 7", "the checksum of revision 7 is wrong"),
        ("UPDATE meta SET revision = 'many'", "its revision is not a number"),
        ("DELETE FROM leases", "lease 17 is missing"),
        ("INSERT INTO auth VALUES ('user/a', x'ff')", "its users and roles cannot be read"),
        ("INSERT INTO auth VALUES ('state', x'ff')", "its users and roles cannot be read"),
        ("INSERT INTO alarms VALUES (x'ff')", "an alarm cannot be read"),
        ("DROP TABLE leases", "no such table: leases"),
    ],
)
def test_inconsistent_rows_are_detected(statement: str, what: str, tmp_path: Path) -> None:
    with closing(sqlite3.connect(filled(tmp_path))) as file:
        file.execute(statement)
        file.commit()
    assert what in refusal(tmp_path)


def test_a_second_store_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    _, journal = open_state(tmp_path)
    assert "is in use by another store" in refusal(tmp_path)
    journal.close()


def test_an_unusable_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreDataError, match="cannot be opened: "):
        Journal(tmp_path / "file" / "below", 1, 2)


@pytest.mark.parametrize("below", ["data", "data/member", "data/member/snap"])
def test_the_directory_of_a_real_etcd_is_refused(etcd: EtcdServer, below: str) -> None:
    directory = etcd.directory / below
    before = sorted(directory.rglob("*"))
    with pytest.raises(StoreDataError, match=r"holds the data of an etcd.*choose another --data-dir"):
        Journal(directory, 1, 2)
    assert sorted(directory.rglob("*")) == before


async def failing_write(journal: Journal, state: StoreState) -> None:
    writer = StoreWriter(state, journal)
    stream = state.watchable.open_stream()
    stream.create(b"a")
    stream.take()
    await writer.write(lambda: state.put(rpc_pb2.PutRequest(key=b"a")))
    assert stream.take() is not None
    journal._file.execute("PRAGMA query_only = ON")
    for _ in range(2):
        with pytest.raises(StoreError) as error:
            await writer.write(lambda: state.put(rpc_pb2.PutRequest(key=b"a")))
        assert error.value.refusal == STOPPED
    assert writer.failed.is_set()
    assert stream.take() is None


def test_a_failed_write_is_neither_acknowledged_nor_watched(tmp_path: Path) -> None:
    state, journal = open_state(tmp_path)
    asyncio.run(failing_write(journal, state))
    journal.close()
    again, second = open_state(tmp_path)
    assert again.mvcc.revision == 2
    second.close()


@pytest.mark.parametrize("commit_interval_s", [0.0, 0.005])
def test_a_restarted_server_continues(tmp_path: Path, commit_interval_s: float) -> None:
    settings = StoreSettings(data_dir=tmp_path, commit_interval_s=commit_interval_s)
    ids = []
    for turn in range(2):
        with RunningStore(settings) as running:
            client = Client(running.endpoint)
            answer = client.ask(rpc_pb2.PutRequest(key=b"a", value=b"%d" % turn))
            assert isinstance(answer, rpc_pb2.PutResponse)
            assert answer.header.revision == 2 + turn
            ids.append((answer.header.cluster_id, answer.header.member_id))
            first = client.watched(rpc_pb2.WatchCreateRequest(key=b"a", start_revision=2))
            assert [event.kv.value for event in first] == [b"%d" % at for at in range(turn + 1)]
            client.close()
    assert ids[0] == ids[1]
