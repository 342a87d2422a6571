"""Kill -9 under load: no acknowledged write and no watched event is lost."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from random import Random

import grpc
import pytest

from proto.pb import rpc_pb2
from tests.store.both import Client, Refused
from tests.store.process import StoreProcess
from upstream.store import errors
from upstream.store.journal import FILE_NAME

WRITERS = 4


class Load:
    """Writers that record acknowledged writes, and a watch that records its events."""

    def __init__(self, endpoint: str, turn: int) -> None:
        self.acknowledged: dict[bytes, tuple[int, bytes]] = {}
        self.seen: dict[int, bytes] = {}
        self._client = Client(endpoint)
        self._turn = turn
        self._threads = [threading.Thread(target=self._write, args=(number,)) for number in range(WRITERS)]
        self._threads.append(threading.Thread(target=self._watch))
        for thread in self._threads:
            thread.start()

    def _write(self, number: int) -> None:
        for at in range(1_000_000):
            key, value = b"w%d/%d" % (number, at % 7), b"%d/%d" % (self._turn, at)
            answer = self._client.ask(rpc_pb2.PutRequest(key=key, value=value))
            if not isinstance(answer, rpc_pb2.PutResponse):
                return
            self.acknowledged[key] = (answer.header.revision, value)

    def _watch(self) -> None:
        try:
            with self._client.watch() as call:
                call.create(rpc_pb2.WatchCreateRequest(key=b"w", range_end=b"x"))
                for response in call:
                    for event in response.events:
                        self.seen[event.kv.mod_revision] = event.kv.value
        except grpc.RpcError:
            return

    def wait_for(self, revisions: int) -> None:
        """Wait until the watch has events of this many revisions."""
        deadline = time.monotonic() + 20
        while len(self.seen) < revisions:
            assert time.monotonic() < deadline, "no writes get through"
            threading.Event().wait(0.002)

    def end(self) -> None:
        """Wait for all threads after the store was killed."""
        for thread in self._threads:
            thread.join(30)
        self._client.close()


def crash_and_check(directory: Path, turn: int, revisions: int) -> None:
    with StoreProcess(directory) as process:
        load = Load(process.endpoint, turn)
        load.wait_for(revisions)
    load.end()
    assert load.acknowledged
    with StoreProcess(directory) as process:
        client = Client(process.endpoint)
        for key, (revision, value) in load.acknowledged.items():
            answer = client.ask(rpc_pb2.RangeRequest(key=key))
            assert isinstance(answer, rpc_pb2.RangeResponse)
            (found,) = answer.kvs
            # A write in flight at the crash may have been committed after it.
            assert found.mod_revision >= revision
            assert found.mod_revision > revision or found.value == value
        first = min(load.seen)
        past = client.watched(rpc_pb2.WatchCreateRequest(key=b"w", range_end=b"x", start_revision=first))
        kept = {event.kv.mod_revision: event.kv.value for event in past}
        assert {revision: kept.get(revision) for revision in load.seen} == load.seen
        client.close()


def test_a_killed_store_loses_nothing(tmp_path: Path) -> None:
    crash_and_check(tmp_path, 0, 300)


def test_a_full_disk_stops_the_store_with_one_line_and_no_loss(tmp_path: Path) -> None:
    acknowledged: list[bytes] = []
    with StoreProcess(tmp_path, file_bytes_max=2**20) as process:
        client = Client(process.endpoint)
        while True:
            key = b"full/%d" % len(acknowledged)
            answer = client.ask(rpc_pb2.PutRequest(key=key, value=bytes(20_000)))
            if not isinstance(answer, rpc_pb2.PutResponse):
                break
            acknowledged.append(key)
        assert answer == Refused(errors.STOPPED.code, errors.STOPPED.text)
        code, said = process.wait_ended()
        client.close()
    assert code == 1
    assert said.count("\n") == 1
    assert f"{tmp_path / FILE_NAME} cannot be written: " in said
    assert "check the disk" in said
    assert len(acknowledged) > 20
    with StoreProcess(tmp_path) as process:
        client = Client(process.endpoint)
        found = client.kv.Range(rpc_pb2.RangeRequest(key=b"full/", range_end=b"full0", keys_only=True))
        assert {kv.key for kv in found.kvs} == set(acknowledged)
        assert isinstance(client.ask(rpc_pb2.PutRequest(key=b"more")), rpc_pb2.PutResponse)
        client.close()


def test_a_disk_too_full_to_start_gives_an_error_of_one_line(tmp_path: Path) -> None:
    process = StoreProcess(tmp_path, file_bytes_max=4096)
    process.begin()
    code, said = process.wait_ended()
    assert code == 1
    assert said.count("\n") == 1
    assert f"{tmp_path / FILE_NAME} cannot be opened: " in said


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_store_killed_many_times_loses_nothing(tmp_path: Path) -> None:
    rng = Random(1)
    for turn in range(20):
        crash_and_check(tmp_path, turn, rng.randrange(5, 2000))
