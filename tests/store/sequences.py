"""Random KV, Txn, Compact and Lease requests: few keys, many options, some of them invalid."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from google.protobuf.message import Message

from proto.pb import rpc_pb2

KEYS = (b"a", b"a\x00", b"aa", b"ab", b"b", b"ba", b"c", b"\xfe", b"\xff\xff")
RANGE_ENDS = (b"", b"", b"\x00", b"a", b"ab", b"b", b"c", b"d", b"\xff", b"\xff\xff\xff")
VALUES = (b"", b"1", b"2", b"10", b"\x00", b"a longer value")
LEASES = (21, 22, 23)
UNKNOWN_LEASE = 99

Pick = Callable[[Random, int], Message]


def request(rng: Random, revision: int) -> Message:
    """Make a request of any kind."""
    kinds: list[tuple[int, Pick]] = [
        (8, put),
        (8, range_request),
        (4, delete_range),
        (8, txn),
        (1, compact),
        (2, lease_grant),
        (1, lease_revoke),
        (1, lease_time_to_live),
    ]
    (kind,) = rng.choices([pick for _, pick in kinds], [weight for weight, _ in kinds])
    return kind(rng, revision)


def key(rng: Random) -> bytes:
    """Pick a key; rarely an empty one."""
    return b"" if rng.random() < 0.02 else rng.choice(KEYS)


def some_revision(rng: Random, revision: int) -> int:
    """Pick a revision: mostly the current or a recent one, sometimes an invalid one."""
    if rng.random() < 0.5:
        return 0
    return rng.choice((revision, revision - 1, revision - 2, revision - 5, revision - 10, revision + 1, 1, -1, -7))


def some_lease(rng: Random) -> int:
    """Pick a lease: mostly none, sometimes an unknown one."""
    if rng.random() < 0.6:
        return 0
    return UNKNOWN_LEASE if rng.random() < 0.1 else rng.choice(LEASES)


def put(rng: Random, _revision: int) -> rpc_pb2.PutRequest:
    """Make a Put."""
    made = rpc_pb2.PutRequest(key=key(rng), value=rng.choice(VALUES), lease=some_lease(rng))
    made.prev_kv = rng.random() < 0.3
    if rng.random() < 0.15:
        made.ignore_value = True
        if rng.random() < 0.8:
            made.value = b""
    if rng.random() < 0.15:
        made.ignore_lease = True
        if rng.random() < 0.8:
            made.lease = 0
    return made


def range_request(rng: Random, revision: int) -> rpc_pb2.RangeRequest:
    """Make a Range."""
    made = rpc_pb2.RangeRequest(key=key(rng), range_end=rng.choice(RANGE_ENDS), revision=some_revision(rng, revision))
    if rng.random() < 0.4:
        made.limit = rng.choice((1, 2, 3, 100, -1))
    if rng.random() < 0.5:
        made.sort_order = rng.choice(rpc_pb2.RangeRequest.SortOrder.values())
        made.sort_target = rng.choice(rpc_pb2.RangeRequest.SortTarget.values())
    made.keys_only = rng.random() < 0.1
    made.count_only = rng.random() < 0.1
    made.serializable = rng.random() < 0.2
    for bound in ("min_mod_revision", "max_mod_revision", "min_create_revision", "max_create_revision"):
        if rng.random() < 0.1:
            setattr(made, bound, max(0, revision - rng.randrange(12)))
    return made


def delete_range(rng: Random, _revision: int) -> rpc_pb2.DeleteRangeRequest:
    """Make a DeleteRange."""
    return rpc_pb2.DeleteRangeRequest(key=key(rng), range_end=rng.choice(RANGE_ENDS), prev_kv=rng.random() < 0.5)


def compare(rng: Random, revision: int) -> rpc_pb2.Compare:
    """Make a compare, sometimes of a range, sometimes with the operand of another target."""
    results, targets = rpc_pb2.Compare.CompareResult.values(), rpc_pb2.Compare.CompareTarget.values()
    made = rpc_pb2.Compare(key=key(rng), result=rng.choice(results), target=rng.choice(targets))
    if rng.random() < 0.2:
        made.range_end = rng.choice(RANGE_ENDS)
    operand = made.target if rng.random() < 0.9 else rng.choice(targets)
    if operand == rpc_pb2.Compare.VERSION:
        made.version = rng.choice((0, 1, 2, 3))
    elif operand == rpc_pb2.Compare.CREATE:
        made.create_revision = rng.choice((0, revision, revision - 1, revision - 3))
    elif operand == rpc_pb2.Compare.MOD:
        made.mod_revision = rng.choice((0, revision, revision - 1, revision - 3))
    elif operand == rpc_pb2.Compare.VALUE:
        made.value = rng.choice(VALUES)
    else:
        made.lease = rng.choice((0, *LEASES))
    return made


def txn(rng: Random, revision: int, depth: int = 0) -> rpc_pb2.TxnRequest:
    """Make a Txn, up to three levels deep."""
    made = rpc_pb2.TxnRequest(compare=[compare(rng, revision) for _ in range(rng.choice((0, 1, 1, 2)))])
    for branch in (made.success, made.failure):
        for _ in range(rng.choice((0, 1, 2, 3))):
            branch.append(operation(rng, revision, depth))
    return made


def operation(rng: Random, revision: int, depth: int) -> rpc_pb2.RequestOp:
    """Make one operation of a Txn; rarely an empty one."""
    made = rpc_pb2.RequestOp()
    kind = rng.random()
    if kind < 0.35:
        made.request_put.CopyFrom(put(rng, revision))
    elif kind < 0.65:
        made.request_range.CopyFrom(range_request(rng, revision))
    elif kind < 0.8:
        made.request_delete_range.CopyFrom(delete_range(rng, revision))
    elif kind < 0.99 and depth < 2:
        made.request_txn.CopyFrom(txn(rng, revision, depth + 1))
    elif kind < 0.99:
        made.request_put.CopyFrom(put(rng, revision))
    return made


def compact(rng: Random, revision: int) -> rpc_pb2.CompactionRequest:
    """Make a Compact, sometimes an invalid one."""
    return rpc_pb2.CompactionRequest(
        revision=rng.choice((revision, revision - 1, revision - 3, revision - 8, revision + 1, 0, -1)),
        physical=rng.random() < 0.5,
    )


def lease_grant(rng: Random, _revision: int) -> rpc_pb2.LeaseGrantRequest:
    """Make a LeaseGrant with one of a few ids, which may be in use."""
    return rpc_pb2.LeaseGrantRequest(ID=rng.choice(LEASES), TTL=rng.choice((1000, 5000, 9_000_000_001)))


def lease_revoke(rng: Random, _revision: int) -> rpc_pb2.LeaseRevokeRequest:
    """Make a LeaseRevoke."""
    return rpc_pb2.LeaseRevokeRequest(ID=rng.choice((*LEASES, UNKNOWN_LEASE)))


def lease_time_to_live(rng: Random, _revision: int) -> rpc_pb2.LeaseTimeToLiveRequest:
    """Make a LeaseTimeToLive."""
    return rpc_pb2.LeaseTimeToLiveRequest(ID=rng.choice((*LEASES, UNKNOWN_LEASE)), keys=True)
