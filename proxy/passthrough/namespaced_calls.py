"""Translation of calls under a namespace: keys get the prefix in requests and lose it in responses.

There is one row for each call whose messages have keys. Calls of the same services without keys are listed too, so that
a call added by a later etcd is refused rather than forwarded with a key outside the namespace. Unknown fields are kept.
Messages: etcd's api/etcdserverpb/rpc.proto, v3lock.proto, v3election.proto; semantics: its client/v3/namespace.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from google.protobuf.message import Message

from proto.pb import rpc_pb2, v3election_pb2, v3lock_pb2
from proxy.passthrough.rewriting import Changes
from proxy.passthrough.translation import Translation, TranslationRules
from upstream.namespace import Namespace

NamespacedChange = Callable[[Namespace, Any], None]
"""Changes a message in place. Its type is the one next to it in `_CALLS` and `_INNER`."""


# KV


def _interval(namespace: Namespace, message: Any) -> None:
    """A RangeRequest, a DeleteRangeRequest or a Compare."""
    message.key, message.range_end = namespace.interval(message.key, message.range_end)


def _key(namespace: Namespace, message: Any) -> None:
    """A PutRequest or an UnlockRequest."""
    message.key = namespace.key(message.key)


def _txn(namespace: Namespace, message: rpc_pb2.TxnRequest) -> None:
    for compare in message.compare:
        _interval(namespace, compare)
    for branch in (message.success, message.failure):
        for operation in branch:
            _operation(namespace, operation)


def _ranged(namespace: Namespace, message: rpc_pb2.RangeResponse) -> None:
    namespace.strip_all(message.kvs)


def _put(namespace: Namespace, message: Any) -> None:
    """A PutResponse."""
    if message.HasField("prev_kv"):
        namespace.strip(message.prev_kv)


def _deleted(namespace: Namespace, message: rpc_pb2.DeleteRangeResponse) -> None:
    namespace.strip_all(message.prev_kvs)


def _txn_done(namespace: Namespace, message: rpc_pb2.TxnResponse) -> None:
    for answer in message.responses:
        _operation(namespace, answer)


def _operation(namespace: Namespace, message: Any) -> None:
    """A RequestOp or a ResponseOp: change the message that it holds."""
    for field, held in message.ListFields():
        _OPERATIONS[field.name](namespace, held)


_OPERATIONS: Final[dict[str, NamespacedChange]] = {
    "request_range": _interval,
    "request_put": _key,
    "request_delete_range": _interval,
    "request_txn": _txn,
    "response_range": _ranged,
    "response_put": _put,
    "response_delete_range": _deleted,
    "response_txn": _txn_done,
}

# Lease, Lock, Election. The name of a lock or an election is the prefix of its keys, and may be empty.


def _leased(namespace: Namespace, message: rpc_pb2.LeaseTimeToLiveResponse) -> None:
    """Remove keys outside the namespace: the lease may have such keys as well."""
    inside = [key.removeprefix(namespace.prefix) for key in message.keys if namespace.has(key)]
    del message.keys[:]
    message.keys.extend(inside)


def _name(namespace: Namespace, message: Any) -> None:
    """A LockRequest, a CampaignRequest or a LeaderRequest."""
    message.name = namespace.prefix + message.name


def _locked(namespace: Namespace, message: v3lock_pb2.LockResponse) -> None:
    message.key = message.key.removeprefix(namespace.prefix)


def _leader(namespace: Namespace, message: Any) -> None:
    """A ProclaimRequest or a ResignRequest."""
    if message.HasField("leader"):
        message.leader.name = namespace.prefix + message.leader.name
        message.leader.key = namespace.key(message.leader.key)


def _campaigned(namespace: Namespace, message: v3election_pb2.CampaignResponse) -> None:
    message.leader.name = message.leader.name.removeprefix(namespace.prefix)
    message.leader.key = message.leader.key.removeprefix(namespace.prefix)


def _led(namespace: Namespace, message: v3election_pb2.LeaderResponse) -> None:
    if message.HasField("kv"):
        namespace.strip(message.kv)


_KV: Final = b"/etcdserverpb.KV/"
_LEASE: Final = b"/etcdserverpb.Lease/"
_LOCK: Final = b"/v3lockpb.Lock/"
_ELECTION: Final = b"/v3electionpb.Election/"

SERVICES: Final = (_KV, _LEASE, _LOCK, _ELECTION, b"/etcdserverpb.Watch/")
"""The services whose calls have keys: only their calls listed here are forwarded."""

_pb, _election, _lock = rpc_pb2, v3election_pb2, v3lock_pb2

_CALLS: Final[dict[bytes, tuple[type[Message], type[Message], NamespacedChange | None, NamespacedChange | None]]] = {
    _KV + b"Range": (_pb.RangeRequest, _pb.RangeResponse, _interval, _ranged),
    _KV + b"Put": (_pb.PutRequest, _pb.PutResponse, _key, _put),
    _KV + b"DeleteRange": (_pb.DeleteRangeRequest, _pb.DeleteRangeResponse, _interval, _deleted),
    _KV + b"Txn": (_pb.TxnRequest, _pb.TxnResponse, _txn, _txn_done),
    _LEASE + b"LeaseTimeToLive": (_pb.LeaseTimeToLiveRequest, _pb.LeaseTimeToLiveResponse, None, _leased),
    _LOCK + b"Lock": (_lock.LockRequest, _lock.LockResponse, _name, _locked),
    _LOCK + b"Unlock": (_lock.UnlockRequest, _lock.UnlockResponse, _key, None),
    _ELECTION + b"Campaign": (_election.CampaignRequest, _election.CampaignResponse, _name, _campaigned),
    _ELECTION + b"Proclaim": (_election.ProclaimRequest, _election.ProclaimResponse, _leader, None),
    _ELECTION + b"Leader": (_election.LeaderRequest, _election.LeaderResponse, _name, _led),
    _ELECTION + b"Observe": (_election.LeaderRequest, _election.LeaderResponse, _name, _led),
    _ELECTION + b"Resign": (_election.ResignRequest, _election.ResignResponse, _leader, None),
}
"""By path: the calls with keys, their message types, and the changes of request and response; None: unchanged."""

_INNER: Final[dict[type[Message], NamespacedChange]] = {
    _pb.RequestOp: _operation,
    _pb.TxnRequest: _txn,
    _pb.ResponseOp: _operation,
    _pb.RangeResponse: _ranged,
    _pb.DeleteRangeResponse: _deleted,
    _pb.TxnResponse: _txn_done,
}
"""Types that may be large within a message: changed piece by piece (proxy/passthrough/rewriting.py)."""

KEYLESS: Final = frozenset(
    (
        _KV + b"Compact",
        _LEASE + b"LeaseGrant",
        _LEASE + b"LeaseRevoke",
        _LEASE + b"LeaseKeepAlive",
        _LEASE + b"LeaseLeases",
    )
)
"""Calls of these services without keys: forwarded frame by frame, untranslated."""


def rules(namespace: Namespace) -> TranslationRules:
    """Return the rules of one namespace."""

    def bound(kind: type[Message], change: NamespacedChange | None) -> Changes | None:
        if change is None:
            return None
        return {each.DESCRIPTOR.full_name: partial(one, namespace) for each, one in {**_INNER, kind: change}.items()}

    translations = {
        path: Translation(request, response, bound(request, outward), bound(response, inward))
        for path, (request, response, outward, inward) in _CALLS.items()
    }
    return TranslationRules("--namespace", translations, SERVICES, KEYLESS)
