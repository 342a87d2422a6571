"""The Lock and Election services: the same tests on a real etcd and on the store."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import grpc
import pytest

from proto.pb import rpc_pb2, rpc_pb2_grpc, v3election_pb2, v3election_pb2_grpc, v3lock_pb2, v3lock_pb2_grpc
from tests.etcd.binaries import current
from tests.etcd.server import EtcdServer
from tests.store.both import refused
from tests.store.running import RunningStore
from tests.waiting import until


@pytest.fixture(scope="module", params=["etcd", "store"])
def endpoint(request: pytest.FixtureRequest) -> Iterator[str]:
    with ExitStack() as stack:
        if request.param == "etcd":
            yield stack.enter_context(EtcdServer(current())).endpoint
        else:
            yield stack.enter_context(RunningStore()).endpoint


class Client:
    """Stubs on one connection."""

    def __init__(self, endpoint: str) -> None:
        self.channel = grpc.insecure_channel(endpoint)
        self.lock = v3lock_pb2_grpc.LockStub(self.channel)
        self.election = v3election_pb2_grpc.ElectionStub(self.channel)
        self.kv = rpc_pb2_grpc.KVStub(self.channel)
        self.lease = rpc_pb2_grpc.LeaseStub(self.channel)

    def new_lease(self) -> int:
        """Get a lease."""
        return self.lease.LeaseGrant(rpc_pb2.LeaseGrantRequest(TTL=100)).ID

    def keys(self, prefix: bytes) -> list[bytes]:
        """Return the keys in line."""
        request = rpc_pb2.RangeRequest(key=prefix, range_end=prefix + b"\xff", keys_only=True)
        return [kv.key for kv in self.kv.Range(request).kvs]


@pytest.fixture
def client(endpoint: str) -> Iterator[Client]:
    client = Client(endpoint)
    yield client
    client.channel.close()


def test_a_lock_is_held_by_one_client_at_a_time_in_order(client: Client) -> None:
    leases = [client.new_lease() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        first = client.lock.Lock(v3lock_pb2.LockRequest(name=b"order", lease=leases[0]), timeout=10)
        assert first.key == b"order/%x" % leases[0]
        waiting = []
        for place, lease in enumerate(leases[1:], 2):
            request = v3lock_pb2.LockRequest(name=b"order", lease=lease)
            waiting.append(pool.submit(client.lock.Lock, request, timeout=10))
            until(lambda place=place: len(client.keys(b"order/")) == place, "the next in line")  # type: ignore[misc]  # default argument
        assert not any(future.done() for future in waiting)
        client.lock.Unlock(v3lock_pb2.UnlockRequest(key=first.key), timeout=10)
        second = waiting[0].result(10)
        assert not waiting[1].done()
        # The end of the lease releases the lock too.
        client.lease.LeaseRevoke(rpc_pb2.LeaseRevokeRequest(ID=leases[1]))
        third = waiting[1].result(10)
    assert (second.key, third.key) == (b"order/%x" % leases[1], b"order/%x" % leases[2])
    assert first.header.revision < second.header.revision < third.header.revision


def test_locking_again_with_the_same_lease_does_not_wait(client: Client) -> None:
    request = v3lock_pb2.LockRequest(name=b"again", lease=client.new_lease())
    assert client.lock.Lock(request, timeout=10).key == client.lock.Lock(request, timeout=10).key


def test_a_lock_without_a_lease_gets_one(client: Client) -> None:
    key = client.lock.Lock(v3lock_pb2.LockRequest(name=b"free"), timeout=10).key
    lease = client.kv.Range(rpc_pb2.RangeRequest(key=key)).kvs[0].lease
    assert client.lease.LeaseTimeToLive(rpc_pb2.LeaseTimeToLiveRequest(ID=lease)).grantedTTL == 60


def test_a_lock_with_an_unknown_lease_is_refused(client: Client) -> None:
    with pytest.raises(grpc.RpcError) as error:
        client.lock.Lock(v3lock_pb2.LockRequest(name=b"no", lease=404), timeout=10)
    assert refused(error.value).text == "etcdserver: requested lease not found"


def test_a_cancelled_waiter_leaves_the_line(client: Client) -> None:
    client.lock.Lock(v3lock_pb2.LockRequest(name=b"leave", lease=client.new_lease()), timeout=10)
    call = client.lock.Lock.future(v3lock_pb2.LockRequest(name=b"leave", lease=client.new_lease()))
    until(lambda: len(client.keys(b"leave/")) == 2, "the second in line")
    call.cancel()
    until(lambda: len(client.keys(b"leave/")) == 1, "the second to leave")


def test_a_lost_session_does_not_get_the_lock(client: Client) -> None:
    first = client.lock.Lock(v3lock_pb2.LockRequest(name=b"lost", lease=client.new_lease()), timeout=10)
    lease = client.new_lease()
    call = client.lock.Lock.future(v3lock_pb2.LockRequest(name=b"lost", lease=lease), timeout=10)
    until(lambda: len(client.keys(b"lost/")) == 2, "the second in line")
    client.lease.LeaseRevoke(rpc_pb2.LeaseRevokeRequest(ID=lease))
    client.lock.Unlock(v3lock_pb2.UnlockRequest(key=first.key), timeout=10)
    with pytest.raises(grpc.RpcError) as error:
        call.result()
    assert refused(error.value).text == "mutex: session is expired"


def test_an_election_from_campaign_to_resignation(client: Client) -> None:
    election = client.election
    name = b"leader"
    with pytest.raises(grpc.RpcError) as error:
        election.Leader(v3election_pb2.LeaderRequest(name=name), timeout=10)
    assert (refused(error.value).code, refused(error.value).text) == (2, "election: no leader")
    observer = election.Observe(v3election_pb2.LeaderRequest(name=name), timeout=20)
    requests = [v3election_pb2.CampaignRequest(name=name, lease=client.new_lease(), value=b"%d" % n) for n in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        # The observer may start before or after the first election: it gets the first leader either way.
        won = election.Campaign(requests[0], timeout=10)
        assert (won.leader.name, won.leader.key) == (name, b"leader/%x" % requests[0].lease)
        assert next(observer).kv.value == b"1"
        waiting = pool.submit(election.Campaign, requests[1], timeout=10)
        until(lambda: len(client.keys(b"leader/")) == 2, "the second candidate")
        election.Proclaim(v3election_pb2.ProclaimRequest(leader=won.leader, value=b"1b"), timeout=10)
        assert next(observer).kv.value == b"1b"
        assert election.Leader(v3election_pb2.LeaderRequest(name=name), timeout=10).kv.value == b"1b"
        assert not waiting.done()
        election.Resign(v3election_pb2.ResignRequest(leader=won.leader), timeout=10)
        assert waiting.result(10).leader.lease == requests[1].lease
    assert next(observer).kv.value == b"2"
    observer.cancel()
    with pytest.raises(grpc.RpcError) as error:
        election.Proclaim(v3election_pb2.ProclaimRequest(leader=won.leader, value=b"x"), timeout=10)
    assert (refused(error.value).code, refused(error.value).text) == (2, "election: not leader")
    election.Resign(v3election_pb2.ResignRequest(leader=won.leader), timeout=10)
    with pytest.raises(grpc.RpcError) as error:
        election.Resign(v3election_pb2.ResignRequest(), timeout=10)
    assert refused(error.value).text == '"leader" field must be provided'


def test_campaigning_again_with_another_value_proclaims_it(client: Client) -> None:
    lease = client.new_lease()
    won = [
        client.election.Campaign(v3election_pb2.CampaignRequest(name=b"twice", lease=lease, value=value), timeout=10)
        for value in (b"a", b"b")
    ]
    assert won[0].leader == won[1].leader
    found = client.election.Leader(v3election_pb2.LeaderRequest(name=b"twice"), timeout=10)
    assert found.kv.value == b"b"
