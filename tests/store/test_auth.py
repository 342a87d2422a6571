"""Users, roles and permissions: the same calls to a real etcd and to the store, over the wire."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import grpc
import pytest
from google.protobuf.message import Message

from proto.pb import auth_pb2, rpc_pb2, rpc_pb2_grpc
from proto.spans import FROM_KEY
from tests.etcd.binaries import current
from tests.etcd.server import EtcdServer
from tests.store.both import Answer, comparable, refused
from tests.store.running import RunningStore
from upstream.store.auth import TOKEN_IDLE_S_MAX, Auth, Span, covers, merge
from upstream.store.errors import INVALID_AUTH_TOKEN, StoreError
from upstream.store.server import StoreSettings

READ, WRITE, BOTH = auth_pb2.Permission.READ, auth_pb2.Permission.WRITE, auth_pb2.Permission.READWRITE


class Caller:
    """Makes calls as different users and records the answers."""

    def __init__(self, endpoint: str) -> None:
        self.channel = grpc.insecure_channel(endpoint)
        self.auth = rpc_pb2_grpc.AuthStub(self.channel)
        self.kv = rpc_pb2_grpc.KVStub(self.channel)
        self.lease = rpc_pb2_grpc.LeaseStub(self.channel)
        self.watch = rpc_pb2_grpc.WatchStub(self.channel)
        self.tokens: dict[str, str] = {}
        self.answers: list[tuple[str, Answer]] = []

    def call(self, what: str, method: Callable[..., Message], request: Message, user: str = "") -> None:
        """Make a call."""
        metadata = [("token", self.tokens[user])] if user else []
        try:
            answer = comparable(method(request, timeout=10, metadata=metadata))
        except grpc.RpcError as error:
            answer = refused(error)
        self.answers.append((f"{what} as {user or 'no user'}", answer))

    def log_in(self, user: str, password: str) -> None:
        """Get a token."""
        request = rpc_pb2.AuthenticateRequest(name=user, password=password)
        self.tokens[user] = self.auth.Authenticate(request, timeout=10).token

    def watch_once(self, create: rpc_pb2.WatchCreateRequest, user: str = "") -> None:
        """Create a watch and record the first answer."""
        metadata = (("token", self.tokens[user]),) if user else ()
        call = self.watch.Watch(iter([rpc_pb2.WatchRequest(create_request=create)]), timeout=10, metadata=metadata)
        self.answers.append((f"watch {create.key!r} as {user or 'no user'}", comparable(next(call))))
        call.cancel()


def administer(caller: Caller) -> None:
    call, auth = caller.call, caller.auth
    call("status", auth.AuthStatus, rpc_pb2.AuthStatusRequest())
    call("enable without root", auth.AuthEnable, rpc_pb2.AuthEnableRequest())
    call("log in while off", auth.Authenticate, rpc_pb2.AuthenticateRequest(name="root", password="r"))
    call("a user without a name", auth.UserAdd, rpc_pb2.AuthUserAddRequest(password="r"))
    for name in ("root", "root", "alice", "bob"):
        call(f"add {name}", auth.UserAdd, rpc_pb2.AuthUserAddRequest(name=name, password=name))
    no_password = rpc_pb2.AuthUserAddRequest(name="cert", options=auth_pb2.UserAddOptions(no_password=True))
    call("add one without a password", auth.UserAdd, no_password)
    call("enable without the role", auth.AuthEnable, rpc_pb2.AuthEnableRequest())
    for name in ("reader", "writer", "writer", ""):
        call(f"add role {name}", auth.RoleAdd, rpc_pb2.AuthRoleAddRequest(name=name))
    for user, role in (("root", "root"), ("alice", "none"), ("none", "reader"), ("alice", "reader"), ("bob", "writer")):
        call(f"give {user} {role}", auth.UserGrantRole, rpc_pb2.AuthUserGrantRoleRequest(user=user, role=role))
    call("give again", auth.UserGrantRole, rpc_pb2.AuthUserGrantRoleRequest(user="bob", role="writer"))
    call("take", auth.UserRevokeRole, rpc_pb2.AuthUserRevokeRoleRequest(name="bob", role="reader"))
    call("take from none", auth.UserRevokeRole, rpc_pb2.AuthUserRevokeRoleRequest(name="none", role="reader"))
    call("nothing given", auth.RoleGrantPermission, rpc_pb2.AuthRoleGrantPermissionRequest(name="reader"))
    for role, kind, key, end in (
        ("reader", READ, b"a", b"c"),
        ("reader", READ, b"c", b"d"),
        ("reader", READ, b"x", b""),
        ("reader", READ, b"q", b"\x00"),
        ("writer", WRITE, b"a", b"c"),
        ("writer", BOTH, b"m", b""),
        ("writer", WRITE, b"m", b""),
        ("writer", BOTH, b"m", b""),
        ("none", READ, b"a", b""),
    ):
        permission = auth_pb2.Permission(permType=kind, key=key, range_end=end)
        request = rpc_pb2.AuthRoleGrantPermissionRequest(name=role, perm=permission)
        call(f"permit {role} {key!r}", auth.RoleGrantPermission, request)
    for key in (b"nothing", b"x"):
        request_ = rpc_pb2.AuthRoleRevokePermissionRequest(role="reader", key=key)
        call(f"take permission {key!r}", auth.RoleRevokePermission, request_)
    for role in ("reader", "writer", "root", "none"):
        call(f"role {role}", auth.RoleGet, rpc_pb2.AuthRoleGetRequest(role=role))
    call("roles", auth.RoleList, rpc_pb2.AuthRoleListRequest())
    call("users", auth.UserList, rpc_pb2.AuthUserListRequest())
    call("status", auth.AuthStatus, rpc_pb2.AuthStatusRequest())
    call("lease", caller.lease.LeaseGrant, rpc_pb2.LeaseGrantRequest(ID=5, TTL=1000))
    call("put", caller.kv.Put, rpc_pb2.PutRequest(key=b"secret", lease=5))


def call_with_auth_on(caller: Caller) -> None:
    call, auth, kv, lease = caller.call, caller.auth, caller.kv, caller.lease
    call("enable", auth.AuthEnable, rpc_pb2.AuthEnableRequest())
    for name, password in (("alice", "wrong"), ("none", "x"), ("cert", "x"), ("cert", "")):
        call(f"log in {name}", auth.Authenticate, rpc_pb2.AuthenticateRequest(name=name, password=password))
    for user in ("root", "alice", "bob"):
        caller.log_in(user, user)
    caller.tokens["stranger"] = "abc.1"
    for user in ("", "stranger", "alice", "bob", "root"):
        for key, end in ((b"a", b""), (b"a", b"c"), (b"a", b"d"), (b"a", b"e"), (b"q", b"\x00"), (b"r", b"z")):
            call(f"range {key!r} {end!r}", kv.Range, rpc_pb2.RangeRequest(key=key, range_end=end), user)
        call("put a", kv.Put, rpc_pb2.PutRequest(key=b"a"), user)
        call("put a, prev_kv", kv.Put, rpc_pb2.PutRequest(key=b"a", prev_kv=True), user)
        call("put m, prev_kv", kv.Put, rpc_pb2.PutRequest(key=b"m", prev_kv=True), user)
        call("put with a lease of others", kv.Put, rpc_pb2.PutRequest(key=b"a", lease=5), user)
        call("delete", kv.DeleteRange, rpc_pb2.DeleteRangeRequest(key=b"b"), user)
        call("delete, prev_kv", kv.DeleteRange, rpc_pb2.DeleteRangeRequest(key=b"b", prev_kv=True), user)
        check = rpc_pb2.TxnRequest(failure=[rpc_pb2.RequestOp(request_range=rpc_pb2.RangeRequest(key=b"a"))])
        call("txn that reads in the branch not taken", kv.Txn, check, user)
        compares = rpc_pb2.TxnRequest(compare=[rpc_pb2.Compare(key=b"secret")])
        call("txn that compares", kv.Txn, compares, user)
        call("time to live", lease.LeaseTimeToLive, rpc_pb2.LeaseTimeToLiveRequest(ID=5, keys=True), user)
        call("leases", lease.LeaseLeases, rpc_pb2.LeaseLeasesRequest(), user)
        call("grant", lease.LeaseGrant, rpc_pb2.LeaseGrantRequest(ID=6, TTL=1000), user)
        call("revoke", lease.LeaseRevoke, rpc_pb2.LeaseRevokeRequest(ID=5 if user != "root" else 6), user)
        call("compact", kv.Compact, rpc_pb2.CompactionRequest(revision=99), user)
        call("user get alice", auth.UserGet, rpc_pb2.AuthUserGetRequest(name="alice"), user)
        call("role get reader", auth.RoleGet, rpc_pb2.AuthRoleGetRequest(role="reader"), user)
        call("user list", auth.UserList, rpc_pb2.AuthUserListRequest(), user)
        call("role list", auth.RoleList, rpc_pb2.AuthRoleListRequest(), user)
        call("user add", auth.UserAdd, rpc_pb2.AuthUserAddRequest(name="x", password="x"), user)
        call("auth disable", auth.AuthDisable, rpc_pb2.AuthDisableRequest(), user) if user != "root" else None
        for key, end, start in ((b"a", b"c", 0), (b"a", b"z", 0), (b"", b"\x00", 0), (b"a", b"z", -1)):
            create = rpc_pb2.WatchCreateRequest(key=key, range_end=end, start_revision=start)
            caller.watch_once(create, user)
    change = rpc_pb2.AuthUserChangePasswordRequest(name="alice", password="new")
    call("change password", auth.UserChangePassword, change, "root")
    call("with the old token", kv.Range, rpc_pb2.RangeRequest(key=b"a"), "alice")
    caller.log_in("alice", "new")
    call("with the new token", kv.Range, rpc_pb2.RangeRequest(key=b"a"), "alice")
    call("delete root", auth.UserDelete, rpc_pb2.AuthUserDeleteRequest(name="root"), "root")
    call("root without root", auth.UserRevokeRole, rpc_pb2.AuthUserRevokeRoleRequest(name="root", role="root"), "root")
    call("delete role root", auth.RoleDelete, rpc_pb2.AuthRoleDeleteRequest(role="root"), "root")
    call("delete role", auth.RoleDelete, rpc_pb2.AuthRoleDeleteRequest(role="reader"), "root")
    call("without the role", kv.Range, rpc_pb2.RangeRequest(key=b"a"), "alice")
    call("delete alice", auth.UserDelete, rpc_pb2.AuthUserDeleteRequest(name="alice"), "root")
    call("without the user", kv.Range, rpc_pb2.RangeRequest(key=b"a"), "alice")
    call("disable", auth.AuthDisable, rpc_pb2.AuthDisableRequest(), "root")
    call("after it", kv.Range, rpc_pb2.RangeRequest(key=b"a"), "bob")
    call("status", auth.AuthStatus, rpc_pb2.AuthStatusRequest())


def test_answers_match_etcd() -> None:
    with EtcdServer(current()) as etcd, RunningStore() as store:
        callers = [Caller(etcd.endpoint), Caller(store.endpoint)]
        for caller in callers:
            administer(caller)
            call_with_auth_on(caller)
            caller.channel.close()
    theirs, ours = (caller.answers for caller in callers)
    assert len(theirs) == len(ours)
    different = [
        f"{what}\netcd:\n{their}\nstore:\n{our}"
        for (what, their), (_, our) in zip(theirs, ours, strict=True)
        if their != our
    ]
    assert not different, "\n\n".join(different)


def test_users_survive_a_restart(tmp_path: Path) -> None:
    settings = StoreSettings(data_dir=tmp_path)
    with RunningStore(settings) as store:
        caller = Caller(store.endpoint)
        administer(caller)
        caller.call("enable", caller.auth.AuthEnable, rpc_pb2.AuthEnableRequest())
        caller.channel.close()
    with RunningStore(settings) as store:
        caller = Caller(store.endpoint)
        caller.log_in("alice", "alice")
        caller.call("allowed", caller.kv.Range, rpc_pb2.RangeRequest(key=b"a", range_end=b"d"), "alice")
        caller.call("refused", caller.kv.Range, rpc_pb2.RangeRequest(key=b"m"), "alice")
        assert [isinstance(answer, Message) for _, answer in caller.answers] == [True, False]
        caller.channel.close()


def test_an_unused_token_expires() -> None:
    auth = Auth()
    auth.enabled = True
    auth.add_token("t", "alice", 0.0)
    assert auth.user_of("t", TOKEN_IDLE_S_MAX) == "alice"
    assert auth.user_of("t", 2 * TOKEN_IDLE_S_MAX) == "alice"
    with pytest.raises(StoreError) as error:
        auth.user_of("t", 3 * TOKEN_IDLE_S_MAX + 1)
    assert error.value.refusal == INVALID_AUTH_TOKEN


@pytest.mark.parametrize("seed", range(30))
def test_merged_permissions_cover_exactly_their_union(seed: int) -> None:
    rng = Random(seed)
    keys = [bytes([letter]) for letter in b"abcdefgh"]

    def some_span() -> Span:
        start, end = sorted(rng.sample(keys, 2))
        return rng.choice([(start, end), (start, end), (start, b""), (start, FROM_KEY)])

    def points(span: Span) -> set[bytes]:
        # One point for each key, for the gap after each key, and for the far end.
        places = sorted([*keys, *(key + b"\x00" for key in keys), b"\xff"])
        start, end = span
        return {p for p in places if p >= start and (end == FROM_KEY or p < (end or start + b"\x00"))}

    spans = [some_span() for _ in range(rng.randint(0, 5))]
    union = {point for span in spans for point in points(span)}
    for _ in range(50):
        asked = some_span()
        assert covers(merge(spans), *asked) == (points(asked) <= union)
