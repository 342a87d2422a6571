"""KV requests: the checks, and their execution on the multi-version store.

Checks are in the same order and answers are the same as in etcd's v3rpc/key.go (checks that need no store) and
etcdserver/txn (checks on the store, and execution). A transaction first decides which branch each level takes, then
checks that every operation of these branches can run. Only then does it write, and from there on nothing can fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from proto.pb import kv_pb2, rpc_pb2
from proto.spans import FROM_KEY
from upstream.store import errors
from upstream.store.errors import StoreError
from upstream.store.index import RevisionRecord
from upstream.store.mvcc import Mvcc, RangeResult, WriteTxn

TXN_OPS_MAX = 128
"""Operations per list of a transaction, etcd's --max-txn-ops default; a nested one gets what its parents leave."""

LeaseExists = Callable[[int], bool]

_Range = rpc_pb2.RangeRequest
_Compare = rpc_pb2.Compare

_SORT_KEYS: dict[int, Callable[[RevisionRecord], int | bytes]] = {
    _Range.KEY: lambda record: record.key,
    _Range.VERSION: lambda record: record.version,
    _Range.CREATE: lambda record: record.create_revision,
    _Range.MOD: lambda record: record.mod_revision,
    _Range.VALUE: lambda record: record.value,
}


def key_value(record: RevisionRecord) -> kv_pb2.KeyValue:
    """Make the KeyValue message of a record."""
    return kv_pb2.KeyValue(
        key=record.key,
        value=record.value,
        create_revision=record.create_revision,
        mod_revision=record.mod_revision,
        version=record.version,
        lease=record.lease,
    )


# Checks that need no store


def check_range(request: rpc_pb2.RangeRequest) -> None:
    """Refuse a malformed range. Raises StoreError."""
    if not request.key:
        raise StoreError(errors.EMPTY_KEY)
    if request.sort_order not in (_Range.NONE, _Range.ASCEND, _Range.DESCEND) or request.sort_target not in _SORT_KEYS:
        raise StoreError(errors.INVALID_SORT_OPTION)


def check_put(request: rpc_pb2.PutRequest) -> None:
    """Refuse a malformed put. Raises StoreError."""
    if not request.key:
        raise StoreError(errors.EMPTY_KEY)
    if request.ignore_value and request.value:
        raise StoreError(errors.VALUE_PROVIDED)
    if request.ignore_lease and request.lease:
        raise StoreError(errors.LEASE_PROVIDED)


def check_delete_range(request: rpc_pb2.DeleteRangeRequest) -> None:
    """Refuse a malformed delete. Raises StoreError."""
    if not request.key:
        raise StoreError(errors.EMPTY_KEY)


def check_txn(request: rpc_pb2.TxnRequest, ops_max: int = TXN_OPS_MAX) -> None:
    """Refuse a transaction that is malformed or might write a key twice. Raises StoreError."""
    _check_txn_ops(request, ops_max)
    _check_overlaps(request.success)
    _check_overlaps(request.failure)


def _check_txn_ops(request: rpc_pb2.TxnRequest, ops_max: int) -> None:
    ops = max(len(request.compare), len(request.success), len(request.failure))
    if ops > ops_max:
        raise StoreError(errors.TOO_MANY_OPS)
    if not all(compare.key for compare in request.compare):
        raise StoreError(errors.EMPTY_KEY)
    for branch in (request.success, request.failure):
        for op in branch:
            kind = op.WhichOneof("request")
            if kind == "request_range":
                check_range(op.request_range)
            elif kind == "request_put":
                check_put(op.request_put)
            elif kind == "request_delete_range":
                check_delete_range(op.request_delete_range)
            elif kind == "request_txn":
                _check_txn_ops(op.request_txn, ops_max - ops)
            else:
                raise StoreError(errors.KEY_NOT_FOUND)


Deletes = list[tuple[bytes, bytes]]


def _check_overlaps(branch: Iterable[rpc_pb2.RequestOp]) -> tuple[set[bytes], Deletes]:
    """Refuse a put of a key that the same branch also puts or deletes; return the puts and deletes for the level above.

    As etcd's checkIntervals: the two branches of a nested transaction may share keys, and a delete in a later nested
    transaction does not conflict with a put in an earlier one. A range_end of b"\\x00" is compared like any other.
    """
    ops = [(op.WhichOneof("request"), op) for op in branch]
    deletes: Deletes = [
        (op.request_delete_range.key, op.request_delete_range.range_end)
        for kind, op in ops
        if kind == "request_delete_range"
    ]
    puts: set[bytes] = set()
    for kind, op in ops:
        if kind != "request_txn":
            continue
        puts_then, deletes_then = _check_overlaps(op.request_txn.success)
        puts_else, deletes_else = _check_overlaps(op.request_txn.failure)
        _refuse_overlap(puts_then, puts, deletes)
        _refuse_overlap(puts_else - puts_then, puts, deletes)
        puts |= puts_then | puts_else
        deletes += deletes_then + deletes_else
    for kind, op in ops:
        if kind == "request_put":
            _refuse_overlap((op.request_put.key,), puts, deletes)
            puts.add(op.request_put.key)
    return puts, deletes


def _refuse_overlap(keys: Iterable[bytes], puts: set[bytes], deletes: Deletes) -> None:
    for key in keys:
        if key in puts or any(start <= key < range_end if range_end else key == start for start, range_end in deletes):
            raise StoreError(errors.DUPLICATE_KEY)


# Running single requests


def run_range(view: Mvcc | WriteTxn, request: rpc_pb2.RangeRequest) -> rpc_pb2.RangeResponse:
    """Answer a range, outside or inside a transaction. Raises StoreError."""
    result = view.range(request.key, request.range_end, request.revision)
    response = rpc_pb2.RangeResponse(count=len(result.records))
    response.header.revision = result.revision
    if request.count_only:
        return response
    records = _filtered(result, request)
    unfiltered = records is result.records
    if request.limit > 0 and request.sort_order == _Range.NONE and unfiltered:
        # Without an order etcd reads only limit + 1 records (one more, for `more`), and sorts those.
        del records[request.limit + 1 :]
    records = _sorted(records, request)
    if 0 < request.limit < len(records):
        del records[request.limit :]
        response.more = True
    if request.keys_only:
        records = [_without_value(record) for record in records]
    response.kvs.extend(map(key_value, records))
    return response


def _filtered(result: RangeResult, request: rpc_pb2.RangeRequest) -> list[RevisionRecord]:
    records = result.records
    if bound := request.max_mod_revision:
        records = [record for record in records if record.mod_revision <= bound]
    if bound := request.min_mod_revision:
        records = [record for record in records if record.mod_revision >= bound]
    if bound := request.max_create_revision:
        records = [record for record in records if record.create_revision <= bound]
    if bound := request.min_create_revision:
        records = [record for record in records if record.create_revision >= bound]
    return records


def _sorted(records: list[RevisionRecord], request: rpc_pb2.RangeRequest) -> list[RevisionRecord]:
    by_key = request.sort_target == _Range.KEY
    if by_key and request.sort_order != _Range.DESCEND:
        return records
    # Any other target without an order is ascending (etcd txn/range.go, sortRangeResults).
    return sorted(records, key=_SORT_KEYS[request.sort_target], reverse=request.sort_order == _Range.DESCEND)


def _without_value(record: RevisionRecord) -> RevisionRecord:
    return RevisionRecord(record.key, b"", record.create_revision, record.mod_revision, 0, record.version, record.lease)


def check_put_runs(mvcc: Mvcc, request: rpc_pb2.PutRequest, lease_exists: LeaseExists) -> None:
    """Refuse a put with an unknown lease, or one that keeps the value or lease of a missing key. Raises StoreError."""
    _check_lease(request, lease_exists)
    _check_kept(mvcc, request)


def _check_lease(request: rpc_pb2.PutRequest, lease_exists: LeaseExists) -> None:
    if request.lease and not lease_exists(request.lease):
        raise StoreError(errors.LEASE_NOT_FOUND)


def _check_kept(mvcc: Mvcc, request: rpc_pb2.PutRequest) -> None:
    if (request.ignore_value or request.ignore_lease) and mvcc.index.newest(request.key) is None:
        raise StoreError(errors.KEY_NOT_FOUND)


def run_put(txn: WriteTxn, request: rpc_pb2.PutRequest) -> rpc_pb2.PutResponse:
    """Run a checked put."""
    response = rpc_pb2.PutResponse()
    value, lease = request.value, request.lease
    before = txn.newest(request.key) if request.ignore_value or request.ignore_lease or request.prev_kv else None
    if before is not None:
        value = before.value if request.ignore_value else value
        lease = before.lease if request.ignore_lease else lease
        if request.prev_kv:
            response.prev_kv.CopyFrom(key_value(before))
    response.header.revision = txn.put(request.key, value, lease).mod_revision
    return response


def run_delete_range(txn: WriteTxn, request: rpc_pb2.DeleteRangeRequest) -> rpc_pb2.DeleteRangeResponse:
    """Run a delete."""
    response = rpc_pb2.DeleteRangeResponse()
    if request.prev_kv:
        response.prev_kvs.extend(map(key_value, txn.range(request.key, request.range_end).records))
    response.deleted = txn.delete_range(request.key, request.range_end)
    response.header.revision = txn.revision
    return response


# Transactions


@dataclass(slots=True)
class Branch:
    """The branch that a transaction takes, including the branches of its nested transactions."""

    succeeded: bool
    ops: list[tuple[str | None, rpc_pb2.RequestOp, Branch | None]]


def decide(mvcc: Mvcc, request: rpc_pb2.TxnRequest) -> Branch:
    """Evaluate the compares of every level, all on the store as it is before the transaction."""
    succeeded = all(_holds(mvcc, compare) for compare in request.compare)
    branch = Branch(succeeded, [])
    for op in request.success if succeeded else request.failure:
        kind = op.WhichOneof("request")
        branch.ops.append((kind, op, decide(mvcc, op.request_txn) if kind == "request_txn" else None))
    return branch


def check_branch(mvcc: Mvcc, branch: Branch, lease_exists: LeaseExists) -> None:
    """Refuse a transaction if one of its operations could not run. Raises StoreError.

    All puts are checked before all ranges, as in etcd 3.5: the order decides which error the client gets.
    """
    _check_puts(mvcc, branch, lease_exists)
    _check_ranges(mvcc, branch)
    check_nothing_kept_is_deleted(branch)


def check_nothing_kept_is_deleted(branch: Branch, deletes: Deletes | None = None) -> None:
    """Refuse a put that keeps the value or lease of a key which the same transaction deletes first. Raises StoreError.

    etcd up to 3.6 lacks this check and crashes in the middle of the transaction (etcdserver/txn/put.go), then again at
    every restart.
    """
    deletes = [] if deletes is None else deletes
    for kind, op, nested in branch.ops:
        if nested is not None:
            check_nothing_kept_is_deleted(nested, deletes)
        elif kind == "request_delete_range":
            deletes.append((op.request_delete_range.key, op.request_delete_range.range_end))
        elif kind == "request_put" and (op.request_put.ignore_value or op.request_put.ignore_lease):
            key = op.request_put.key
            if any(_contains(span, key) for span in deletes):
                raise StoreError(errors.KEY_NOT_FOUND)


def _contains(span: tuple[bytes, bytes], key: bytes) -> bool:
    start, range_end = span
    if not range_end:
        return key == start
    return start <= key and (range_end == FROM_KEY or key < range_end)


def _check_puts(mvcc: Mvcc, branch: Branch, lease_exists: LeaseExists) -> None:
    for kind, op, nested in branch.ops:
        if nested is not None:
            _check_puts(mvcc, nested, lease_exists)
        elif kind == "request_put":
            # The reverse order of a plain Put's checks, as in etcd 3.5 (3.6 checks the lease first here too).
            _check_kept(mvcc, op.request_put)
            _check_lease(op.request_put, lease_exists)


def _check_ranges(mvcc: Mvcc, branch: Branch) -> None:
    for kind, op, nested in branch.ops:
        if nested is not None:
            _check_ranges(mvcc, nested)
        elif kind == "request_range":
            mvcc.check_readable(op.request_range.revision)


def run_branch(txn: WriteTxn, branch: Branch) -> rpc_pb2.TxnResponse:
    """Run a transaction that was decided and checked; the caller fills the header's revision."""
    response = rpc_pb2.TxnResponse(succeeded=branch.succeeded)
    response.header.SetInParent()
    for kind, op, nested in branch.ops:
        answer = response.responses.add()
        if nested is not None:
            answer.response_txn.CopyFrom(run_branch(txn, nested))
        elif kind == "request_range":
            answer.response_range.CopyFrom(run_range(txn, op.request_range))
        elif kind == "request_put":
            answer.response_put.CopyFrom(run_put(txn, op.request_put))
        elif kind == "request_delete_range":
            answer.response_delete_range.CopyFrom(run_delete_range(txn, op.request_delete_range))
    return response


def _holds(mvcc: Mvcc, compare: rpc_pb2.Compare) -> bool:
    """Return whether a compare holds for every key of its range (a missing key counts as an empty key-value)."""
    records = mvcc.range(compare.key, compare.range_end).records
    if records:
        return all(_matches(compare, record) for record in records)
    # A missing key has no value: it does not equal an empty one.
    return compare.target != _Compare.VALUE and _matches(compare, _MISSING)


_MISSING = RevisionRecord(b"", b"", 0, 0, 0, 0, 0)


def _matches(compare: rpc_pb2.Compare, record: RevisionRecord) -> bool:
    if compare.target == _Compare.VALUE:
        order = _order(record.value, compare.value)
    elif compare.target in _NUMBERS:
        has, wants = _NUMBERS[compare.target](record, compare)
        order = _order(has, wants)
    else:
        # An unknown target compares equal.
        order = 0
    if compare.result == _Compare.EQUAL:
        return order == 0
    if compare.result == _Compare.NOT_EQUAL:
        return order != 0
    if compare.result == _Compare.GREATER:
        return order > 0
    if compare.result == _Compare.LESS:
        return order < 0
    # etcd treats an unknown result as a match.
    return True


# (the record's number, the compare's number), by target.
_NUMBERS: dict[int, Callable[[RevisionRecord, rpc_pb2.Compare], tuple[int, int]]] = {
    _Compare.CREATE: lambda record, compare: (record.create_revision, compare.create_revision),
    _Compare.MOD: lambda record, compare: (record.mod_revision, compare.mod_revision),
    _Compare.VERSION: lambda record, compare: (record.version, compare.version),
    _Compare.LEASE: lambda record, compare: (record.lease, compare.lease),
}

_Ordered = TypeVar("_Ordered", bytes, int)


def _order(left: _Ordered, right: _Ordered) -> int:
    return (left > right) - (left < right)
