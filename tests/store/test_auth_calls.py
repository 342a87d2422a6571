"""With auth on: the permissions of every call match a real etcd, for no token, a wrong token, a plain user and root."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import grpc
import pytest

from proto.pb import rpc_pb2 as rpc
from proto.pb import rpc_pb2_grpc, v3election_pb2, v3election_pb2_grpc, v3lock_pb2, v3lock_pb2_grpc
from tests.etcd.binaries import current
from tests.etcd.server import EtcdServer
from tests.store.both import Refused, refused
from tests.store.running import RunningStore

Metadata = tuple[tuple[str, str], ...]
WHO = ("no token", "wrong token", "user", "root")


class AuthedClient:
    """A client that turns auth on at its server."""

    def __init__(self, endpoint: str) -> None:
        self.channel = grpc.insecure_channel(endpoint)
        self.auth = auth = rpc_pb2_grpc.AuthStub(self.channel)
        for user in ("root", "user"):
            auth.UserAdd(rpc.AuthUserAddRequest(name=user, password="p"))
        auth.RoleAdd(rpc.AuthRoleAddRequest(name="root"))
        auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user="root", role="root"))
        auth.AuthEnable(rpc.AuthEnableRequest())
        tokens = {
            user: auth.Authenticate(rpc.AuthenticateRequest(name=user, password="p")).token for user in ("root", "user")
        }
        self.metadata: Mapping[str, Metadata] = {
            "no token": (),
            "wrong token": (("token", "nonsense.1"),),
            **{user: (("token", token),) for user, token in tokens.items()},
        }

    def ask(self, name: str, who: str) -> Refused | None:
        """Make a call; return its refusal, None when it is answered."""
        try:
            CALLS[name](self.channel, self.metadata[who])
        except grpc.RpcError as error:
            return refused(error)
        return None


def keep_alive(channel: grpc.Channel, metadata: Metadata) -> object:
    requests = iter([rpc.LeaseKeepAliveRequest(ID=9)])
    return next(rpc_pb2_grpc.LeaseStub(channel).LeaseKeepAlive(requests, metadata=metadata, timeout=10))


def unary(stub: Callable[[grpc.Channel], Any], method: str, request: object) -> Callable[[grpc.Channel, Metadata], Any]:
    return lambda channel, metadata: getattr(stub(channel), method)(request, metadata=metadata, timeout=10)


AUTH, CLUSTER, KV = rpc_pb2_grpc.AuthStub, rpc_pb2_grpc.ClusterStub, rpc_pb2_grpc.KVStub
LEASE, MAINTENANCE = rpc_pb2_grpc.LeaseStub, rpc_pb2_grpc.MaintenanceStub
ELECTION, LOCK = v3election_pb2_grpc.ElectionStub, v3lock_pb2_grpc.LockStub
CALLS: dict[str, Callable[[grpc.Channel, Metadata], Any]] = {
    "status": unary(MAINTENANCE, "Status", rpc.StatusRequest()),
    "hash": unary(MAINTENANCE, "Hash", rpc.HashRequest()),
    "hash of keys": unary(MAINTENANCE, "HashKV", rpc.HashKVRequest()),
    "list alarms": unary(MAINTENANCE, "Alarm", rpc.AlarmRequest()),
    "end an alarm": unary(
        MAINTENANCE, "Alarm", rpc.AlarmRequest(action=rpc.AlarmRequest.DEACTIVATE, alarm=rpc.NOSPACE)
    ),
    "defragment": unary(MAINTENANCE, "Defragment", rpc.DefragmentRequest()),
    "members": unary(CLUSTER, "MemberList", rpc.MemberListRequest(linearizable=True)),
    "leases": unary(LEASE, "LeaseLeases", rpc.LeaseLeasesRequest()),
    "grant": unary(LEASE, "LeaseGrant", rpc.LeaseGrantRequest(TTL=100)),
    "time to live": unary(LEASE, "LeaseTimeToLive", rpc.LeaseTimeToLiveRequest(ID=9)),
    "revoke": unary(LEASE, "LeaseRevoke", rpc.LeaseRevokeRequest(ID=9)),
    "keep alive": keep_alive,
    "compact": unary(KV, "Compact", rpc.CompactionRequest(revision=99)),
    "range": unary(KV, "Range", rpc.RangeRequest(key=b"a")),
    "put": unary(KV, "Put", rpc.PutRequest(key=b"a")),
    "put nothing": unary(KV, "Put", rpc.PutRequest()),
    "delete": unary(KV, "DeleteRange", rpc.DeleteRangeRequest(key=b"a")),
    "txn": unary(KV, "Txn", rpc.TxnRequest()),
    "auth status": unary(AUTH, "AuthStatus", rpc.AuthStatusRequest()),
    "users": unary(AUTH, "UserList", rpc.AuthUserListRequest()),
    "another user": unary(AUTH, "UserGet", rpc.AuthUserGetRequest(name="root")),
    "the user": unary(AUTH, "UserGet", rpc.AuthUserGetRequest(name="user")),
    "a leader": unary(ELECTION, "Leader", v3election_pb2.LeaderRequest(name=b"a")),
    "resign": unary(ELECTION, "Resign", v3election_pb2.ResignRequest(leader=v3election_pb2.LeaderKey(key=b"a"))),
    "lock": unary(LOCK, "Lock", v3lock_pb2.LockRequest(name=b"a")),
    "lock with another's lease": unary(LOCK, "Lock", v3lock_pb2.LockRequest(name=b"a", lease=99)),
    "unlock": unary(LOCK, "Unlock", v3lock_pb2.UnlockRequest(key=b"a")),
    "a long password": unary(AUTH, "UserAdd", rpc.AuthUserAddRequest(password="x" * 73)),
    "a role": unary(AUTH, "RoleGet", rpc.AuthRoleGetRequest(role="root")),
}


@pytest.fixture(scope="module")
def answers() -> tuple[dict[tuple[str, str], Refused | None], dict[tuple[str, str], Refused | None]]:
    with EtcdServer(current()) as etcd, RunningStore() as store:
        both = [AuthedClient(endpoint) for endpoint in (etcd.endpoint, store.endpoint)]
        theirs, ours = ({(name, who): one.ask(name, who) for name in CALLS for who in WHO} for one in both)
        for one in both:
            one.channel.close()
    return theirs, ours


@pytest.mark.parametrize("name", CALLS)
def test_permissions_match_etcd(
    name: str, answers: tuple[dict[tuple[str, str], Refused | None], dict[tuple[str, str], Refused | None]]
) -> None:
    theirs, ours = ({who: of[name, who] for who in WHO} for of in answers)
    assert ours == theirs
