"""Kill -9 under load: no acknowledged write and no watched event is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from proto.pb import rpc_pb2
from tests.store.both import Client, Refused
from tests.store.process import StoreProcess
from tests.store.soak import soak
from upstream.store import errors
from upstream.store.journal import FILE_NAME


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.long)])
def test_a_killed_store_loses_nothing(tmp_path: Path, seconds: float) -> None:
    report = soak(tmp_path, seconds, seed=1)
    assert report.endswith(": nothing lost")
    assert not report.startswith("0 "), report


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
