"""How a namespace translates keys, ranges and the messages of each call."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message

from proto.pb import kv_pb2, rpc_pb2, v3election_pb2, v3lock_pb2
from proto.pb.rpc_pb2 import DESCRIPTOR as RPC
from proto.scan import scan_watch_response
from proxy.passthrough.namespaced_calls import KEYLESS, SERVICES, rules
from upstream.namespace import Namespace

NS = Namespace(b"/ns/")
TRANSLATIONS = rules(NS).translations


@pytest.mark.parametrize(
    ("prefix", "interval", "expected"),
    [
        (b"/ns/", (b"a", b""), (b"/ns/a", b"")),
        (b"/ns/", (b"a", b"b"), (b"/ns/a", b"/ns/b")),
        (b"/ns/", (b"a", b"\0"), (b"/ns/a", b"/ns0")),
        (b"/ns/", (b"\0", b"\0"), (b"/ns/\0", b"/ns0")),
        (b"/ns/", (b"a", b"\0\0"), (b"/ns/a", b"/ns/\0\0")),
        # An empty key stays empty: etcd refuses it.
        (b"/ns/", (b"", b""), (b"", b"")),
        (b"/ns/", (b"", b"\0"), (b"", b"\0")),
        (b"n\xff\xff", (b"a", b"\0"), (b"n\xff\xffa", b"o")),
        (b"\xff", (b"a", b"\0"), (b"\xffa", b"\0")),
    ],
)
def test_ranges_get_the_prefix_at_both_ends(
    prefix: bytes, interval: tuple[bytes, bytes], expected: tuple[bytes, bytes]
) -> None:
    assert Namespace(prefix).interval(*interval) == expected


def _kv(key: bytes) -> kv_pb2.KeyValue:
    return kv_pb2.KeyValue(key=key, mod_revision=7, value=b"v")


def _op(**request: Message) -> rpc_pb2.RequestOp:
    return rpc_pb2.RequestOp(**request)  # type: ignore[arg-type]  # one of its four


def _answer(**response: Message) -> rpc_pb2.ResponseOp:
    return rpc_pb2.ResponseOp(**response)  # type: ignore[arg-type]  # one of its four


def _txn(prefix: bytes, end: bytes) -> rpc_pb2.TxnRequest:
    inner = rpc_pb2.TxnRequest(failure=[_op(request_range=rpc_pb2.RangeRequest(key=prefix + b"i", range_end=end))])
    return rpc_pb2.TxnRequest(
        compare=[rpc_pb2.Compare(key=prefix + b"c", range_end=prefix + b"d", version=3)],
        success=[
            _op(request_put=rpc_pb2.PutRequest(key=prefix + b"p", value=b"v")),
            _op(request_delete_range=rpc_pb2.DeleteRangeRequest(key=prefix + b"x", range_end=prefix + b"y")),
            _op(request_txn=inner),
            _op(),
        ],
    )


def _txn_done(prefix: bytes) -> rpc_pb2.TxnResponse:
    inner = rpc_pb2.TxnResponse(responses=[_answer(response_range=rpc_pb2.RangeResponse(kvs=[_kv(prefix + b"i")]))])
    return rpc_pb2.TxnResponse(
        responses=[
            _answer(response_put=rpc_pb2.PutResponse(prev_kv=_kv(prefix + b"p"))),
            _answer(response_put=rpc_pb2.PutResponse()),
            _answer(response_delete_range=rpc_pb2.DeleteRangeResponse(prev_kvs=[_kv(prefix + b"x")])),
            _answer(response_txn=inner),
            _answer(),
        ]
    )


def _leader(prefix: bytes) -> v3election_pb2.LeaderKey:
    return v3election_pb2.LeaderKey(name=prefix + b"n", key=prefix + b"n/1", rev=4, lease=1)


_END = b"/ns0"
REQUESTS = [
    ("etcdserverpb.KV/Range", rpc_pb2.RangeRequest(key=b"a", range_end=b"\0"), (b"/ns/a", _END)),
    ("etcdserverpb.KV/Put", rpc_pb2.PutRequest(key=b"a"), rpc_pb2.PutRequest(key=b"/ns/a")),
    ("etcdserverpb.KV/DeleteRange", rpc_pb2.DeleteRangeRequest(key=b"a", range_end=b"b"), (b"/ns/a", b"/ns/b")),
    ("etcdserverpb.KV/Txn", _txn(b"", b"\0"), _txn(b"/ns/", _END)),
    ("etcdserverpb.Lease/LeaseTimeToLive", rpc_pb2.LeaseTimeToLiveRequest(ID=3, keys=True), None),
    ("v3lockpb.Lock/Lock", v3lock_pb2.LockRequest(name=b"l"), v3lock_pb2.LockRequest(name=b"/ns/l")),
    ("v3lockpb.Lock/Lock", v3lock_pb2.LockRequest(), v3lock_pb2.LockRequest(name=b"/ns/")),
    ("v3lockpb.Lock/Unlock", v3lock_pb2.UnlockRequest(key=b"l/1"), v3lock_pb2.UnlockRequest(key=b"/ns/l/1")),
    ("v3lockpb.Lock/Unlock", v3lock_pb2.UnlockRequest(), None),
    *(
        (f"v3electionpb.Election/{name}", kind(name=b"e"), kind(name=b"/ns/e"))
        for name, kind in (
            ("Campaign", v3election_pb2.CampaignRequest),
            ("Leader", v3election_pb2.LeaderRequest),
            ("Observe", v3election_pb2.LeaderRequest),
        )
    ),
    *(
        (f"v3electionpb.Election/{name}", kind(leader=_leader(b"")), kind(leader=_leader(b"/ns/")))
        for name, kind in (("Proclaim", v3election_pb2.ProclaimRequest), ("Resign", v3election_pb2.ResignRequest))
    ),
    ("v3electionpb.Election/Resign", v3election_pb2.ResignRequest(), None),
]


@pytest.mark.parametrize(("path", "request_", "expected"), REQUESTS)
def test_keys_in_requests_get_the_prefix(
    path: str, request_: Message, expected: Message | tuple[bytes, bytes] | None
) -> None:
    translation = TRANSLATIONS[f"/{path}".encode()]
    assert type(request_) is translation.request
    got = translation.request.FromString(translation.to_etcd(request_.SerializeToString()))
    if isinstance(expected, tuple):
        wanted = type(request_)()
        wanted.CopyFrom(request_)
        wanted.key, wanted.range_end = expected  # type: ignore[attr-defined]  # those that have an interval
        expected = wanted
    assert got == (request_ if expected is None else expected)


ANSWERS = [
    ("etcdserverpb.KV/Range", lambda ns: rpc_pb2.RangeResponse(kvs=[_kv(ns + b"a"), _kv(ns + b"b")], more=True)),
    ("etcdserverpb.KV/Put", lambda ns: rpc_pb2.PutResponse(prev_kv=_kv(ns + b"a"))),
    ("etcdserverpb.KV/Put", lambda _: rpc_pb2.PutResponse()),
    ("etcdserverpb.KV/DeleteRange", lambda ns: rpc_pb2.DeleteRangeResponse(deleted=1, prev_kvs=[_kv(ns + b"a")])),
    ("etcdserverpb.KV/Txn", _txn_done),
    (
        "etcdserverpb.Lease/LeaseTimeToLive",
        lambda ns: rpc_pb2.LeaseTimeToLiveResponse(ID=3, keys=[ns + b"a", *([b"/outside", b"/ns"] if ns else [])]),
    ),
    ("v3lockpb.Lock/Lock", lambda ns: v3lock_pb2.LockResponse(key=ns + b"l/1")),
    ("v3lockpb.Lock/Unlock", lambda _: v3lock_pb2.UnlockResponse()),
    ("v3electionpb.Election/Campaign", lambda ns: v3election_pb2.CampaignResponse(leader=_leader(ns))),
    ("v3electionpb.Election/Leader", lambda ns: v3election_pb2.LeaderResponse(kv=_kv(ns + b"e/1"))),
    ("v3electionpb.Election/Observe", lambda ns: v3election_pb2.LeaderResponse(kv=_kv(ns + b"e/1"))),
    ("v3electionpb.Election/Observe", lambda _: v3election_pb2.LeaderResponse()),
    ("v3electionpb.Election/Proclaim", lambda _: v3election_pb2.ProclaimResponse()),
    ("v3electionpb.Election/Resign", lambda _: v3election_pb2.ResignResponse()),
]


@pytest.mark.parametrize(("path", "answer"), ANSWERS)
def test_keys_in_answers_lose_the_prefix(path: str, answer: object) -> None:
    assert callable(answer)
    translation = TRANSLATIONS[f"/{path}".encode()]
    theirs, ours = answer(b"/ns/"), answer(b"")
    assert type(theirs) is translation.response
    assert translation.response.FromString(translation.to_client(theirs.SerializeToString())) == ours


def test_every_call_with_a_key_is_translated() -> None:
    files = (RPC, v3lock_pb2.DESCRIPTOR, v3election_pb2.DESCRIPTOR)
    paths = {
        f"/{service.full_name}/{method.name}".encode()
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    }
    about_keys = {path for path in paths if path.startswith(SERVICES)}
    assert about_keys - {b"/etcdserverpb.Watch/Watch"} == TRANSLATIONS.keys() | KEYLESS
    assert (
        {path for path, _, _ in REQUESTS}
        == {path for path, _ in ANSWERS}
        == {path[1:].decode() for path in TRANSLATIONS}
    )


def test_fields_of_a_later_etcd_stay() -> None:
    later = rpc_pb2.PutRequest(key=b"a").SerializeToString() + b"\xa2\x06\x03new"
    assert TRANSLATIONS[b"/etcdserverpb.KV/Put"].to_etcd(later).endswith(b"\xa2\x06\x03new")


def test_events_lose_the_prefix_and_nothing_else() -> None:
    put = kv_pb2.Event(kv=_kv(b"/ns/a"), prev_kv=_kv(b"/ns/a"))
    delete = kv_pb2.Event(type=kv_pb2.Event.DELETE, kv=kv_pb2.KeyValue(key=b"/ns/b", mod_revision=8))
    header = rpc_pb2.ResponseHeader(cluster_id=1, member_id=2, revision=9, raft_term=3)
    data = rpc_pb2.WatchResponse(header=header, watch_id=4, events=[put, delete], fragment=True).SerializeToString()
    theirs, ours = scan_watch_response(data), NS.scan(data)
    assert [(event.kind, event.revision) for event in ours.events] == [(0, 7), (1, 8)]
    assert (ours.header.encoded, ours.watch_id, ours.fragment) == (theirs.header.encoded, 4, theirs.fragment)
    put.kv.key = put.prev_kv.key = b"a"
    delete.kv.key = b"b"
    encoded = b"".join(event.encoded for event in ours.events)
    assert list(rpc_pb2.WatchResponse.FromString(encoded).events) == [put, delete]
    bare = kv_pb2.Event(kv=put.kv)
    assert list(rpc_pb2.WatchResponse.FromString(ours.events[0].bare).events) == [bare]
