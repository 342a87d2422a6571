"""Users, roles and permissions: the same story told to a real etcd and to the store, over the wire."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import grpc
import pytest
from google.protobuf.message import Message

from proto.pb import auth_pb2, rpc_pb2, rpc_pb2_grpc
from tests.etcd.binaries import current
from tests.etcd.server import EtcdServer
from tests.store.both import Answer, comparable, refused
from tests.store.running import RunningStore
from upstream.store.auth import TOKEN_IDLE_S_MAX, Auth, Span, covers, merge
from upstream.store.errors import INVALID_AUTH_TOKEN, StoreError
from upstream.store.index import FROM_KEY
from upstream.store.server import StoreSettings

READ, WRITE, BOTH = auth_pb2.Permission.READ, auth_pb2.Permission.WRITE, auth_pb2.Permission.READWRITE


class Teller:
    """Makes calls as different users and keeps the answers."""

    def __init__(self, endpoint: str) -> None:
        self.channel = grpc.insecure_channel(endpoint)
        self.auth = rpc_pb2_grpc.AuthStub(self.channel)
        self.kv = rpc_pb2_grpc.KVStub(self.channel)
        self.lease = rpc_pb2_grpc.LeaseStub(self.channel)
        self.watch = rpc_pb2_grpc.WatchStub(self.channel)
        self.tokens: dict[str, str] = {}
        self.answers: list[tuple[str, Answer]] = []

    def say(self, what: str, method: Callable[..., Message], request: Message, user: str = "") -> None:
        """Make a call."""
        metadata = [("token", self.tokens[user])] if user else []
        try:
            answer = comparable(method(request, timeout=10, metadata=metadata))
        except grpc.RpcError as error:
            answer = refused(error)
        self.answers.append((f"{what} as {user or 'nobody'}", answer))

    def log_in(self, user: str, password: str) -> None:
        """Get a token."""
        request = rpc_pb2.AuthenticateRequest(name=user, password=password)
        self.tokens[user] = self.auth.Authenticate(request, timeout=10).token

    def watch_once(self, create: rpc_pb2.WatchCreateRequest, user: str = "") -> None:
        """Create a watch and keep the first answer."""
        metadata = (("token", self.tokens[user]),) if user else ()
        call = self.watch.Watch(iter([rpc_pb2.WatchRequest(create_request=create)]), timeout=10, metadata=metadata)
        self.answers.append((f"watch {create.key!r} as {user or 'nobody'}", comparable(next(call))))
        call.cancel()


def tell_administration(teller: Teller) -> None:
    say, auth = teller.say, teller.auth
    say("status", auth.AuthStatus, rpc_pb2.AuthStatusRequest())
    say("enable without root", auth.AuthEnable, rpc_pb2.AuthEnableRequest())
    say("log in while off", auth.Authenticate, rpc_pb2.AuthenticateRequest(name="root", password="r"))
    say("a user without a name", auth.UserAdd, rpc_pb2.AuthUserAddRequest(password="r"))
    for name in ("root", "root", "alice", "bob"):
        say(f"add {name}", auth.UserAdd, rpc_pb2.AuthUserAddRequest(name=name, password=name))
    nobody = rpc_pb2.AuthUserAddRequest(name="cert", options=auth_pb2.UserAddOptions(no_password=True))
    say("add one without a password", auth.UserAdd, nobody)
    say("enable without the role", auth.AuthEnable, rpc_pb2.AuthEnableRequest())
    for name in ("reader", "writer", "writer", ""):
        say(f"add role {name}", auth.RoleAdd, rpc_pb2.AuthRoleAddRequest(name=name))
    for user, role in (("root", "root"), ("alice", "none"), ("none", "reader"), ("alice", "reader"), ("bob", "writer")):
        say(f"give {user} {role}", auth.UserGrantRole, rpc_pb2.AuthUserGrantRoleRequest(user=user, role=role))
    say("give again", auth.UserGrantRole, rpc_pb2.AuthUserGrantRoleRequest(user="bob", role="writer"))
    say("take", auth.UserRevokeRole, rpc_pb2.AuthUserRevokeRoleRequest(name="bob", role="reader"))
    say("take from none", auth.UserRevokeRole, rpc_pb2.AuthUserRevokeRoleRequest(name="none", role="reader"))
    say("nothing given", auth.RoleGrantPermission, rpc_pb2.AuthRoleGrantPermissionRequest(name="reader"))
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
        say(f"permit {role} {key!r}", auth.RoleGrantPermission, request)
    for key in (b"nothing", b"x"):
        request_ = rpc_pb2.AuthRoleRevokePermissionRequest(role="reader", key=key)
        say(f"take permission {key!r}", auth.RoleRevokePermission, request_)
    for role in ("reader", "writer", "root", "none"):
        say(f"role {role}", auth.RoleGet, rpc_pb2.AuthRoleGetRequest(role=role))
    say("roles", auth.RoleList, rpc_pb2.AuthRoleListRequest())
    say("users", auth.UserList, rpc_pb2.AuthUserListRequest())
    say("status", auth.AuthStatus, rpc_pb2.AuthStatusRequest())
    say("lease", teller.lease.LeaseGrant, rpc_pb2.LeaseGrantRequest(ID=5, TTL=1000))
    say("put", teller.kv.Put, rpc_pb2.PutRequest(key=b"secret", lease=5))


def tell_protected(teller: Teller) -> None:
    say, auth, kv, lease = teller.say, teller.auth, teller.kv, teller.lease
    say("enable", auth.AuthEnable, rpc_pb2.AuthEnableRequest())
    for name, password in (("alice", "wrong"), ("none", "x"), ("cert", "x"), ("cert", "")):
        say(f"log in {name}", auth.Authenticate, rpc_pb2.AuthenticateRequest(name=name, password=password))
    for user in ("root", "alice", "bob"):
        teller.log_in(user, user)
    teller.tokens["stranger"] = "abc.1"
    for user in ("", "stranger", "alice", "bob", "root"):
        for key, end in ((b"a", b""), (b"a", b"c"), (b"a", b"d"), (b"a", b"e"), (b"q", b"\x00"), (b"r", b"z")):
            say(f"range {key!r} {end!r}", kv.Range, rpc_pb2.RangeRequest(key=key, range_end=end), user)
        say("put a", kv.Put, rpc_pb2.PutRequest(key=b"a"), user)
        say("put a, prev_kv", kv.Put, rpc_pb2.PutRequest(key=b"a", prev_kv=True), user)
        say("put m, prev_kv", kv.Put, rpc_pb2.PutRequest(key=b"m", prev_kv=True), user)
        say("put with a lease of others", kv.Put, rpc_pb2.PutRequest(key=b"a", lease=5), user)
        say("delete", kv.DeleteRange, rpc_pb2.DeleteRangeRequest(key=b"b"), user)
        say("delete, prev_kv", kv.DeleteRange, rpc_pb2.DeleteRangeRequest(key=b"b", prev_kv=True), user)
        check = rpc_pb2.TxnRequest(failure=[rpc_pb2.RequestOp(request_range=rpc_pb2.RangeRequest(key=b"a"))])
        say("txn that reads in the branch not taken", kv.Txn, check, user)
        compares = rpc_pb2.TxnRequest(compare=[rpc_pb2.Compare(key=b"secret")])
        say("txn that compares", kv.Txn, compares, user)
        say("time to live", lease.LeaseTimeToLive, rpc_pb2.LeaseTimeToLiveRequest(ID=5, keys=True), user)
        say("leases", lease.LeaseLeases, rpc_pb2.LeaseLeasesRequest(), user)
        say("grant", lease.LeaseGrant, rpc_pb2.LeaseGrantRequest(ID=6, TTL=1000), user)
        say("revoke", lease.LeaseRevoke, rpc_pb2.LeaseRevokeRequest(ID=5 if user != "root" else 6), user)
        say("compact", kv.Compact, rpc_pb2.CompactionRequest(revision=99), user)
        say("user get alice", auth.UserGet, rpc_pb2.AuthUserGetRequest(name="alice"), user)
        say("role get reader", auth.RoleGet, rpc_pb2.AuthRoleGetRequest(role="reader"), user)
        say("user list", auth.UserList, rpc_pb2.AuthUserListRequest(), user)
        say("role list", auth.RoleList, rpc_pb2.AuthRoleListRequest(), user)
        say("user add", auth.UserAdd, rpc_pb2.AuthUserAddRequest(name="x", password="x"), user)
        say("auth disable", auth.AuthDisable, rpc_pb2.AuthDisableRequest(), user) if user != "root" else None
        for key, end, start in ((b"a", b"c", 0), (b"a", b"z", 0), (b"", b"\x00", 0), (b"a", b"z", -1)):
            create = rpc_pb2.WatchCreateRequest(key=key, range_end=end, start_revision=start)
            teller.watch_once(create, user)
    change = rpc_pb2.AuthUserChangePasswordRequest(name="alice", password="new")
    say("change password", auth.UserChangePassword, change, "root")
    say("with the old token", kv.Range, rpc_pb2.RangeRequest(key=b"a"), "alice")
    teller.log_in("alice", "new")
    say("with the new token", kv.Range, rpc_pb2.RangeRequest(key=b"a"), "alice")
    say("delete root", auth.UserDelete, rpc_pb2.AuthUserDeleteRequest(name="root"), "root")
    say("root without root", auth.UserRevokeRole, rpc_pb2.AuthUserRevokeRoleRequest(name="root", role="root"), "root")
    say("delete role root", auth.RoleDelete, rpc_pb2.AuthRoleDeleteRequest(role="root"), "root")
    say("delete role", auth.RoleDelete, rpc_pb2.AuthRoleDeleteRequest(role="reader"), "root")
    say("without the role", kv.Range, rpc_pb2.RangeRequest(key=b"a"), "alice")
    say("delete alice", auth.UserDelete, rpc_pb2.AuthUserDeleteRequest(name="alice"), "root")
    say("without the user", kv.Range, rpc_pb2.RangeRequest(key=b"a"), "alice")
    say("disable", auth.AuthDisable, rpc_pb2.AuthDisableRequest(), "root")
    say("after it", kv.Range, rpc_pb2.RangeRequest(key=b"a"), "bob")
    say("status", auth.AuthStatus, rpc_pb2.AuthStatusRequest())


def test_the_same_story() -> None:
    with EtcdServer(current()) as etcd, RunningStore() as store:
        tellers = [Teller(etcd.endpoint), Teller(store.endpoint)]
        for teller in tellers:
            tell_administration(teller)
            tell_protected(teller)
            teller.channel.close()
    theirs, ours = (teller.answers for teller in tellers)
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
        teller = Teller(store.endpoint)
        tell_administration(teller)
        teller.say("enable", teller.auth.AuthEnable, rpc_pb2.AuthEnableRequest())
        teller.channel.close()
    with RunningStore(settings) as store:
        teller = Teller(store.endpoint)
        teller.log_in("alice", "alice")
        teller.say("allowed", teller.kv.Range, rpc_pb2.RangeRequest(key=b"a", range_end=b"d"), "alice")
        teller.say("refused", teller.kv.Range, rpc_pb2.RangeRequest(key=b"m"), "alice")
        assert [isinstance(answer, Message) for _, answer in teller.answers] == [True, False]
        teller.channel.close()


def test_an_unused_token_ends() -> None:
    auth = Auth()
    auth.enabled = True
    auth.add_token("t", "alice", 0.0)
    assert auth.user_of("t", TOKEN_IDLE_S_MAX) == "alice"
    assert auth.user_of("t", 2 * TOKEN_IDLE_S_MAX) == "alice"
    with pytest.raises(StoreError) as error:
        auth.user_of("t", 3 * TOKEN_IDLE_S_MAX + 1)
    assert error.value.refusal == INVALID_AUTH_TOKEN


@pytest.mark.parametrize("seed", range(30))
def test_merged_permissions_cover_what_their_union_covers(seed: int) -> None:
    rng = Random(seed)
    keys = [bytes([letter]) for letter in b"abcdefgh"]

    def some_span() -> Span:
        start, end = sorted(rng.sample(keys, 2))
        return rng.choice([(start, end), (start, end), (start, b""), (start, FROM_KEY)])

    def points(span: Span) -> set[bytes]:
        # Single keys, the gaps behind them, and the far end, each a point of its own.
        places = sorted([*keys, *(key + b"\x00" for key in keys), b"\xff"])
        start, end = span
        return {p for p in places if p >= start and (end == FROM_KEY or p < (end or start + b"\x00"))}

    spans = [some_span() for _ in range(rng.randint(0, 5))]
    union = {point for span in spans for point in points(span)}
    for _ in range(50):
        asked = some_span()
        assert covers(merge(spans), *asked) == (points(asked) <= union)
