"""The same requests to the store and to a real etcd: every answer and every error must be the same.

A failure in a random sequence prints the requests so far. The answers here come from the store's pure parts;
test_server.py tests the services around them.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from google.protobuf.message import Message

from proto.pb import rpc_pb2
from tests.etcd.binaries import current
from tests.etcd.server import EtcdServer
from tests.store.both import Client, Refused, new_state
from tests.store.pair import REQUESTS, Pair
from upstream.store.state import StoreState


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with EtcdServer(current()) as server:
        client = Client(server.endpoint)
        yield Pair(client, new_state())
        client.close()


def watch_request(rng: Random, state: StoreState) -> rpc_pb2.WatchCreateRequest:
    first = max(state.mvcc.compact_revision, state.mvcc.revision - REQUESTS)
    made = rpc_pb2.WatchCreateRequest(
        key=rng.choice((b"", b"a", b"aa", b"b")),
        range_end=rng.choice((b"\x00", b"\x00", b"c", b"")),
        # A start at or below the current revision, so that etcd answers the progress request.
        start_revision=rng.randint(first, state.mvcc.revision),
        prev_kv=rng.random() < 0.5,
    )
    if rng.random() < 0.3:
        made.filters.append(rng.choice(rpc_pb2.WatchCreateRequest.FilterType.values()))
    return made


@pytest.mark.parametrize("block", range(5))
def test_random_sequences(pair: Pair, block: int) -> None:
    for seed in range(block * 30, block * 30 + 30):
        pair.run(seed)


@pytest.mark.long
@pytest.mark.parametrize("block", range(100))
def test_many_random_sequences(pair: Pair, block: int) -> None:
    for seed in range(10_000 + block * 100, 10_100 + block * 100):
        pair.run(seed)


@pytest.mark.parametrize("seed", range(20))
def test_watches_of_the_past(pair: Pair, seed: int) -> None:
    pair.run(seed)
    rng = Random(seed)
    for _ in range(2):
        pair.watch(watch_request(rng, pair.state))


def nested(depth: int, width: int = 0) -> rpc_pb2.TxnRequest:
    made = puts(width)
    if depth:
        made.failure.add().request_txn.CopyFrom(nested(depth - 1, width))
    return made


def puts(count: int) -> rpc_pb2.TxnRequest:
    return rpc_pb2.TxnRequest(
        success=[rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=b"%d" % at)) for at in range(count)]
    )


def txn(*ops: Message) -> rpc_pb2.TxnRequest:
    made = rpc_pb2.TxnRequest()
    for op in ops:
        target = made.success.add()
        if isinstance(op, rpc_pb2.PutRequest):
            target.request_put.CopyFrom(op)
        elif isinstance(op, rpc_pb2.DeleteRangeRequest):
            target.request_delete_range.CopyFrom(op)
        elif isinstance(op, rpc_pb2.TxnRequest):
            target.request_txn.CopyFrom(op)
    return made


def unknown(number: int) -> Any:
    """Pass a number that is not in the enum, which the generated types do not allow."""
    return number


PUT_A = rpc_pb2.PutRequest(key=b"a", value=b"1")
DELETE_A = rpc_pb2.DeleteRangeRequest(key=b"a")
DELETE_ALL = rpc_pb2.DeleteRangeRequest(key=b"\x00", range_end=b"\x00")
ODD = {
    "128 operations": puts(128),
    "129 operations": puts(129),
    # Python's protobuf parses 100 levels of messages, which are 33 levels of transactions.
    "deeply nested": nested(30),
    "too many operations with those of its parents": nested(3, 33),
    "just enough operations with those of its parents": nested(3, 32),
    "the same key twice": txn(PUT_A, PUT_A),
    "a put and its delete": txn(PUT_A, DELETE_A),
    "a put and a delete of everything": txn(DELETE_ALL, PUT_A),
    "a put in a nested one and its delete after": txn(txn(PUT_A), txn(DELETE_A)),
    "a delete in a nested one and a put after": txn(txn(DELETE_A), txn(PUT_A)),
    "a put, a delete and a put": txn(txn(PUT_A), txn(DELETE_ALL), txn(rpc_pb2.PutRequest(key=b"b"))),
    "the same key in both branches": rpc_pb2.TxnRequest(success=txn(PUT_A).success, failure=txn(PUT_A).success),
    "the same key in both branches of a nested one and outside": txn(
        rpc_pb2.TxnRequest(success=txn(PUT_A).success, failure=txn(PUT_A).success), PUT_A
    ),
    "a key in a nested branch that is not taken, and outside": txn(
        rpc_pb2.TxnRequest(compare=[rpc_pb2.Compare(key=b"a")], success=[], failure=txn(PUT_A).success), PUT_A
    ),
    "a put without a key in a branch that is not taken": rpc_pb2.TxnRequest(
        failure=txn(rpc_pb2.PutRequest(value=b"1")).success
    ),
    "a compare without a key": rpc_pb2.TxnRequest(compare=[rpc_pb2.Compare(version=1)]),
    "an unknown lease in a branch that is not taken": rpc_pb2.TxnRequest(
        failure=txn(rpc_pb2.PutRequest(key=b"a", lease=99)).success
    ),
    "a future revision in a branch that is not taken": rpc_pb2.TxnRequest(
        failure=[rpc_pb2.RequestOp(request_range=rpc_pb2.RangeRequest(key=b"a", revision=2**62))]
    ),
    "a range from a future revision after a put": rpc_pb2.TxnRequest(
        success=[
            *txn(PUT_A).success,
            rpc_pb2.RequestOp(request_range=rpc_pb2.RangeRequest(key=b"a", revision=2**62)),
        ]
    ),
    "the smallest limit and bounds": rpc_pb2.RangeRequest(
        key=b"a", limit=-(2**63), min_mod_revision=-(2**63), max_mod_revision=-1, max_create_revision=-1
    ),
    "the smallest revision": rpc_pb2.RangeRequest(key=b"a", revision=-(2**63)),
    "a compaction of the far future": rpc_pb2.CompactionRequest(revision=2**63 - 1),
    "an empty operation": rpc_pb2.TxnRequest(success=[rpc_pb2.RequestOp()]),
    "an unknown compare result": rpc_pb2.TxnRequest(compare=[rpc_pb2.Compare(key=b"a", result=unknown(9))]),
    "an unknown compare target": rpc_pb2.TxnRequest(compare=[rpc_pb2.Compare(key=b"a", target=unknown(9))]),
    "a lease without an end": rpc_pb2.LeaseGrantRequest(ID=21, TTL=9_000_000_000),
    "a lease that is too long": rpc_pb2.LeaseGrantRequest(ID=22, TTL=9_000_000_001),
    "a request that is just too large": rpc_pb2.PutRequest(key=b"a", value=bytes(1536 * 1024)),
}


SORT = rpc_pb2.RangeRequest.SortTarget
ORDER = rpc_pb2.RangeRequest.SortOrder


@pytest.mark.parametrize("order", ORDER.values(), ids=ORDER.Name)
@pytest.mark.parametrize("target", SORT.values(), ids=SORT.Name)
def test_a_limit_on_a_sorted_range(pair: Pair, target: SORT.ValueType, order: ORDER.ValueType) -> None:
    pair.reset()
    for at, key in enumerate((b"d", b"c", b"a", b"b", b"a")):
        pair.ask(rpc_pb2.PutRequest(key=key, value=b"%d" % (9 - at)))
    for limit in range(6):
        for oldest in (0, pair.state.mvcc.revision - 1, 1):
            request = rpc_pb2.RangeRequest(key=b"\x00", range_end=b"\x00", limit=limit, min_mod_revision=oldest)
            request.sort_target, request.sort_order = target, order
            pair.ask(request)


@pytest.mark.parametrize("what", ODD)
def test_odd_requests(pair: Pair, what: str) -> None:
    if what == "a request that is just too large":
        assert pair.client.ask(ODD[what]) == Refused(3, "etcdserver: request is too large")
        return
    pair.reset()
    pair.ask(ODD[what])
    pair.ask(rpc_pb2.RangeRequest(key=b"\x00", range_end=b"\x00"))
    pair.watch(rpc_pb2.WatchCreateRequest(range_end=b"\x00", start_revision=pair.state.mvcc.revision, prev_kv=True))
