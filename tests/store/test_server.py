"""The store over the wire: statuses and limits, watches, health, reflection, HTTP, listening."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]  # no stubs
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from proto.pb import rpc_pb2, rpc_pb2_grpc
from tests.store.both import Client, Refused, refused
from tests.store.running import RunningStore
from tests.waiting import until
from upstream.store import errors
from upstream.store.server import StoreListenError, StoreSettings, parse_address
from upstream.store.watchable import WatchLimits


@pytest.fixture(scope="module")
def running() -> Iterator[RunningStore]:
    with RunningStore() as store:
        yield store


@pytest.fixture
def client(running: RunningStore) -> Iterator[Client]:
    client = Client(running.endpoint)
    yield client
    client.close()


def scrape(running: RunningStore) -> dict[str, float]:
    with urllib.request.urlopen(f"{running.metrics_url}/metrics", timeout=5) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_headers_have_the_ids_of_the_store(client: Client) -> None:
    response = client.ask(rpc_pb2.PutRequest(key=b"a"))
    assert isinstance(response, rpc_pb2.PutResponse)
    assert response.header.cluster_id
    assert response.header.member_id
    assert response.header.raft_term == 2
    assert response.header.revision > 1


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (rpc_pb2.PutRequest(), errors.EMPTY_KEY),
        (rpc_pb2.RangeRequest(key=b"a", revision=10**9), errors.FUTURE_REVISION),
        (rpc_pb2.CompactionRequest(revision=-1), errors.COMPACTED),
        (rpc_pb2.LeaseRevokeRequest(ID=404), errors.LEASE_NOT_FOUND),
        (rpc_pb2.PutRequest(key=b"a", value=bytes(1536 * 1024)), errors.REQUEST_TOO_LARGE),
        (rpc_pb2.RangeRequest.FromString(b"\x0a\x01a\x28\x07"), errors.INVALID_SORT_OPTION),
    ],
)
def test_refusals_become_statuses(client: Client, request_: rpc_pb2.PutRequest, expected: errors.StoreRefusal) -> None:
    assert client.ask(request_) == Refused(expected.code, expected.text)


def test_a_too_large_message_is_refused_with_etcds_text(client: Client) -> None:
    answer = client.ask(rpc_pb2.PutRequest(key=b"a", value=bytes(3 * 1024 * 1024)))
    assert answer == Refused(8, "grpc: received message larger than max (3145736 vs. 2097152)")


def test_an_unimplemented_call_returns_the_reason(client: Client) -> None:
    maintenance = rpc_pb2_grpc.MaintenanceStub(client.channel)
    with pytest.raises(grpc.RpcError) as error:
        next(maintenance.Snapshot(rpc_pb2.SnapshotRequest(), timeout=5))
    assert refused(error.value).code == grpc.StatusCode.UNIMPLEMENTED.value[0]
    assert "--data-dir" in refused(error.value).text


def test_a_watch_over_the_wire(client: Client) -> None:
    first = client.kv.Put(rpc_pb2.PutRequest(key=b"w", value=b"1")).header.revision
    with client.watch() as call:
        call.create(rpc_pb2.WatchCreateRequest(key=b"w", start_revision=first, prev_kv=True))
        assert call.next().created
        past = call.next()
        assert (past.watch_id, [event.kv.value for event in past.events]) == (0, [b"1"])
        call.create(rpc_pb2.WatchCreateRequest(key=b"w"))
        assert call.next().created
        call.half_close()
        client.kv.Put(rpc_pb2.PutRequest(key=b"w", value=b"2"))
        now = {response.watch_id: response for response in (call.next(), call.next())}
        assert {id_: [e.prev_kv.value for e in r.events] for id_, r in now.items()} == {0: [b"1"], 1: [b""]}
        assert {r.header.revision for r in now.values()} == {first + 1}


def test_a_slow_client_loses_nothing_and_delays_no_other_client(running: RunningStore, client: Client) -> None:
    count, value = 300, bytes(100_000)
    slow, quick = Client(running.endpoint), client
    with slow.watch() as late, quick.watch() as prompt:
        for call in (late, prompt):
            call.create(rpc_pb2.WatchCreateRequest(key=b"slow", prev_kv=True))
            assert call.next().created
        sent = []
        for _ in range(count):
            sent.append(client.kv.Put(rpc_pb2.PutRequest(key=b"slow", value=value)).header.revision)
            assert [event.kv.mod_revision for event in prompt.next().events] == sent[-1:]
        assert scrape(running)["etcd_debugging_mvcc_slow_watcher_total"] == 1
        assert scrape(running)["etcd_debugging_mvcc_pending_events_total"] <= WatchLimits().queue_events_max
        got: list[int] = []
        while len(got) < count:
            got += [event.kv.mod_revision for event in late.next().events]
        assert got == sent
    slow.close()


def test_a_thousand_creates_at_once_are_all_answered(client: Client) -> None:
    with client.watch() as call:
        for _ in range(1000):
            call.create(rpc_pb2.WatchCreateRequest(key=b"many"))
        assert [call.next().watch_id for _ in range(1000)] == list(range(1000))


def test_watchers_are_counted_until_their_stream_ends(running: RunningStore, client: Client) -> None:
    with client.watch() as call:
        call.create(rpc_pb2.WatchCreateRequest(key=b"counted"))
        call.create(rpc_pb2.WatchCreateRequest(key=b"counted"))
        assert call.next().created
        assert call.next().created
        metrics = scrape(running)
        assert metrics["etcd_debugging_mvcc_watcher_total"] >= 2
        assert metrics["etcd_debugging_mvcc_watch_stream_total"] >= 1
    until(lambda: scrape(running)["etcd_debugging_mvcc_watcher_total"] == 0, "the watchers to be gone")
    metrics = scrape(running)
    assert metrics["etcd_debugging_mvcc_watch_stream_total"] == 0
    assert metrics["etcd_network_client_grpc_sent_bytes_total"] > 0
    assert (
        metrics["etcd_debugging_mvcc_current_revision"]
        == client.kv.Range(rpc_pb2.RangeRequest(key=b"a")).header.revision
    )


def test_an_expired_lease_deletes_its_keys(client: Client) -> None:
    granted = client.lease.LeaseGrant(rpc_pb2.LeaseGrantRequest(TTL=1))
    revision = client.kv.Put(rpc_pb2.PutRequest(key=b"leased", lease=granted.ID)).header.revision
    with client.watch() as call:
        call.create(rpc_pb2.WatchCreateRequest(key=b"leased", start_revision=revision + 1))
        assert call.next().created
        assert [event.type for event in call.next().events] == [1]
    assert client.lease.LeaseTimeToLive(rpc_pb2.LeaseTimeToLiveRequest(ID=granted.ID)).TTL == -1


def test_a_physical_compaction_is_complete_when_answered(running: RunningStore, client: Client) -> None:
    for _ in range(600):
        revision = client.kv.Put(rpc_pb2.PutRequest(key=b"old")).header.revision
    client.kv.Compact(rpc_pb2.CompactionRequest(revision=revision, physical=True))
    assert running.store is not None
    assert sum(record.key == b"old" for record in running.store.state.mvcc.index.records()) == 1


def test_the_hash_covers_only_what_a_compaction_keeps(running: RunningStore, client: Client) -> None:
    maintenance = rpc_pb2_grpc.MaintenanceStub(client.channel)
    for at in range(50):
        revision = client.kv.Put(rpc_pb2.PutRequest(key=b"hashed/%d" % (at % 5))).header.revision

    def hashed(upto: int) -> tuple[int, int]:
        response = maintenance.HashKV(rpc_pb2.HashKVRequest(revision=upto), timeout=5)
        assert response.hash_revision == upto
        return response.hash, response.compact_revision

    before = hashed(revision)
    assert hashed(revision) == before != hashed(revision - 1)
    assert running.store is not None
    running.store.state.mvcc.compact(revision - 3)
    decided = hashed(revision)
    assert decided != before
    while not running.store.state.mvcc.compact_step(1):
        assert hashed(revision) == decided
    assert hashed(revision) == decided


def test_health_and_reflection_are_served(client: Client) -> None:
    health = health_pb2_grpc.HealthStub(client.channel)
    for service in ("", "etcdserverpb.KV", "etcdserverpb.Watch"):
        assert health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status == 1
    services = ProtoReflectionDescriptorDatabase(client.channel).get_services()
    assert {"etcdserverpb.KV", "etcdserverpb.Watch", "v3lockpb.Lock", "grpc.health.v1.Health"} <= set(services)


def test_health_version_and_metrics_are_served(running: RunningStore) -> None:
    def read(path: str) -> dict[str, str]:
        with urllib.request.urlopen(running.metrics_url + path, timeout=5) as answer:
            parsed: dict[str, str] = json.load(answer)
            return parsed

    assert read("/health")["health"] == "true"
    assert read("/version") == {"etcdserver": "3.5.30", "etcdcluster": "3.5.0"}


def test_a_port_in_use_gives_an_error_of_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for settings, flag in (
            (StoreSettings(address), "--listen-addr"),
            (StoreSettings("127.0.0.1:0", address), "--listen-metrics-urls"),
        ):
            with pytest.raises(StoreListenError) as error, RunningStore(settings):
                pass
            text = str(error.value)
            assert text.startswith(f"the store cannot listen on {address}: it is in use; ")
            assert flag in text
            assert "\n" not in text


def test_two_stores_do_not_share_a_port(running: RunningStore) -> None:
    with pytest.raises(StoreListenError), RunningStore(StoreSettings(running.endpoint)):
        pass


@pytest.mark.parametrize(
    ("text", "address"), [("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:2379", ("::1", 2379)), ("h:65535", ("h", 65535))]
)
def test_listen_addresses_are_read(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text, "--listen-addr") == address


@pytest.mark.parametrize("text", ["", "2379", ":2379", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536"])
def test_bad_listen_addresses_name_the_right_form(text: str) -> None:
    with pytest.raises(StoreListenError, match="write HOST:PORT"):
        parse_address(text, "--listen-addr")
