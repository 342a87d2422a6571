"""Messages rewritten in pieces: same result as at once, in bounded steps, and no key outside the namespace."""

from __future__ import annotations

import random

import pytest
from google.protobuf.message import DecodeError, Message

from proto.fields import bytes_field
from proto.pb import kv_pb2, rpc_pb2
from proxy.passthrough.namespaced_calls import rules
from proxy.passthrough.rewriting import PIECE_BYTES, Changes, Rewriting, changed
from upstream.namespace import Namespace

NS = Namespace(b"/ns/")
TRANSLATIONS = rules(NS).translations
KV = b"/etcdserverpb.KV/"


def rewritten(kind: type[Message], changes: Changes | None, message: bytes) -> tuple[bytes, int]:
    """Return the rewritten message, and the number of steps."""
    assert changes is not None
    rewriting = Rewriting(kind, changes, message)
    steps = 1
    while not rewriting.step():
        steps += 1
    data = b"".join(rewriting.pieces)
    assert rewriting.size == len(data)
    return data, steps


def at_once(kind: type[Message], changes: Changes | None, message: bytes) -> Message:
    assert changes is not None
    return kind.FromString(changed(kind, changes[kind.DESCRIPTOR.full_name], message))


def _kvs(count: int, size: int) -> list[kv_pb2.KeyValue]:
    return [kv_pb2.KeyValue(key=b"/ns/%d" % place, value=bytes(size), mod_revision=place) for place in range(count)]


def _ranged(count: int, size: int) -> rpc_pb2.RangeResponse:
    header = rpc_pb2.ResponseHeader(revision=7)
    return rpc_pb2.RangeResponse(header=header, kvs=_kvs(count, size), more=True, count=count)


def _answers() -> list[tuple[bytes, Message]]:
    nested = rpc_pb2.TxnResponse(
        responses=[
            rpc_pb2.ResponseOp(response_range=_ranged(1000, 50)),
            rpc_pb2.ResponseOp(response_put=rpc_pb2.PutResponse(prev_kv=_kvs(1, 50_000)[0])),
        ]
    )
    return [
        (b"Range", _ranged(5_000, 20)),
        (b"Range", _ranged(3, 100_000)),
        (b"Range", _ranged(0, 0)),
        (b"DeleteRange", rpc_pb2.DeleteRangeResponse(deleted=9, prev_kvs=_kvs(3_000, 10))),
        (b"Txn", rpc_pb2.TxnResponse(succeeded=True, responses=[rpc_pb2.ResponseOp(response_txn=nested)] * 3)),
        (b"Txn", rpc_pb2.TxnResponse(responses=[rpc_pb2.ResponseOp(response_range=_ranged(1, 1))] * 2_000)),
    ]


@pytest.mark.parametrize(("method", "answer"), _answers())
def test_pieces_are_the_same_as_at_once(method: bytes, answer: Message) -> None:
    translation = TRANSLATIONS[KV + method]
    data = answer.SerializeToString() + b"\xa2\x06\x03new"
    got, steps = rewritten(type(answer), translation.inward, data)
    assert type(answer).FromString(got) == at_once(type(answer), translation.inward, data)
    assert b"/ns/" not in got
    assert b"\xa2\x06\x03new" in got
    # Bounded steps: a piece ends with the element that fills it.
    assert steps >= len(data) / (PIECE_BYTES + 100_100)


def test_a_large_answer_takes_many_steps() -> None:
    """100 MB of key-values, as from one Range: no step handles more than one piece."""
    data = _ranged(20_000, 500).SerializeToString()
    _, steps = rewritten(rpc_pb2.RangeResponse, TRANSLATIONS[KV + b"Range"].inward, data)
    assert steps > len(data) / (PIECE_BYTES + 600)


def _request(rng: random.Random, depth: int) -> rpc_pb2.TxnRequest:
    def operation() -> rpc_pb2.RequestOp:
        match rng.randrange(5):
            case 0:
                return rpc_pb2.RequestOp(request_range=rpc_pb2.RangeRequest(key=b"a", range_end=b"\0"))
            case 1:
                return rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=b"p", value=bytes(rng.randrange(40_000))))
            case 2:
                return rpc_pb2.RequestOp(request_delete_range=rpc_pb2.DeleteRangeRequest(key=b"x", range_end=b"y"))
            case 3 if depth:
                return rpc_pb2.RequestOp(request_txn=_request(rng, depth - 1))
            case _:
                return rpc_pb2.RequestOp()

    compare = [rpc_pb2.Compare(key=b"c", version=1)] * rng.randrange(3)
    success = [operation() for _ in range(rng.randrange(6))]
    return rpc_pb2.TxnRequest(compare=compare, success=success, failure=[operation() for _ in range(rng.randrange(3))])


@pytest.mark.parametrize("seed", range(60))
def test_transactions_of_any_shape(seed: int) -> None:
    translation = TRANSLATIONS[KV + b"Txn"]
    data = _request(random.Random(seed), 4).SerializeToString()
    got, _ = rewritten(rpc_pb2.TxnRequest, translation.outward, data)
    assert rpc_pb2.TxnRequest.FromString(got) == at_once(rpc_pb2.TxnRequest, translation.outward, data)


def test_a_range_cannot_be_changed_in_two_halves() -> None:
    """Decoders merge a field that occurs twice: an end without a key would stay unchanged, and reach outside."""
    key = rpc_pb2.RequestOp(request_range=rpc_pb2.RangeRequest(key=b"a" * 20_000)).SerializeToString()
    end = rpc_pb2.RequestOp(request_range=rpc_pb2.RangeRequest(range_end=b"\0")).SerializeToString()
    halves = bytes_field(0x12, key + end)
    translation = TRANSLATIONS[KV + b"Txn"]
    with pytest.raises(DecodeError, match="a RequestOp of more than one field"):
        translation.to_etcd(halves)
    # Small messages are decoded whole.
    small = rpc_pb2.RequestOp(request_range=rpc_pb2.RangeRequest(key=b"a")).SerializeToString() + end
    (operation,) = rpc_pb2.TxnRequest.FromString(translation.to_etcd(bytes_field(0x12, small))).success
    assert (operation.request_range.key, operation.request_range.range_end) == (b"/ns/a", b"/ns0")


def test_messages_nested_too_deep_or_cut_are_refused() -> None:
    deep = bytes(20_000)
    operation = rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=b"k", value=deep)).SerializeToString()
    for _ in range(40):
        operation = bytes_field(0x22, bytes_field(0x12, operation))
    translation = TRANSLATIONS[KV + b"Txn"]
    with pytest.raises(DecodeError, match="too many messages within each other"):
        translation.to_etcd(bytes_field(0x12, operation))
    whole = _ranged(1_000, 100).SerializeToString()
    for cut in range(len(whole) - 5, len(whole)):
        if cut != len(whole) - 3 and cut != len(whole) - 5:
            with pytest.raises(DecodeError):
                TRANSLATIONS[KV + b"Range"].to_client(whole[:cut])
