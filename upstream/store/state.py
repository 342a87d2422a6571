"""The whole state of one member, and the calls on it: the store without a network.

Pure like its parts: time is passed in as `now` (seconds, monotonic), random ids come from a function passed in. A write
has two steps. First the call's method changes the store and returns the answer, then `publish` passes the changes to
the watchers. In between a journal can make the changes durable, so that a crash never loses a change that a watcher has
seen. The services answer only after `publish`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import Message

from proto.pb import rpc_pb2
from upstream.store import txn as requests
from upstream.store.alarms import Alarms
from upstream.store.auth import Auth
from upstream.store.errors import StoreError
from upstream.store.index import RevisionRecord
from upstream.store.lease import Lessor
from upstream.store.mvcc import Changes, Mvcc, WriteTxn
from upstream.store.recorder import JournalRecorder, Stored
from upstream.store.watch_batch import ResponseHead
from upstream.store.watchable import WatchableStore

Answer = TypeVar("Answer", bound=Message)

RAFT_TERM = 2
"""The raft term of a new single-member etcd."""

LEASE_GONE_TTL = -1
"""The TTL that LeaseTimeToLive reports for an unknown lease."""


@dataclass(slots=True, frozen=True)
class StoreIdentity:
    """The ids in every response header. Never 0, which clients read as "not filled"."""

    cluster_id: int
    member_id: int
    name: str = "watchmux"


@dataclass(slots=True)
class CallStats:
    """Counters for the metrics etcd_mvcc_*_total and etcd_debugging_lease_*_total."""

    ranges: int = 0
    puts: int = 0
    deletes: int = 0
    txns: int = 0
    leases_granted: int = 0
    leases_revoked: int = 0
    leases_renewed: int = 0


class StoreState:
    """The store's parts wired together, with one method per call. They raise StoreError where etcd refuses."""

    def __init__(
        self,
        identity: StoreIdentity,
        random_id: Callable[[], int],
        recorder: JournalRecorder | None = None,
        lessor: Lessor | None = None,
    ) -> None:
        """Start empty. `random_id` returns positive 63-bit lease ids; `recorder` gets every change."""
        self.identity = identity
        self.mvcc = Mvcc()
        self.watchable = WatchableStore(self.mvcc)
        self.lessor = lessor or Lessor()
        self.auth = Auth()
        self.alarms = Alarms()
        self.head = ResponseHead(identity.cluster_id, identity.member_id, RAFT_TERM)
        self.stats = CallStats()
        # The raft index to report: it only has to grow with every write.
        self.raft_index = 4
        self._random_id = random_id
        self._recorder = recorder or JournalRecorder()
        self.mvcc.on_drop = self._recorder.dropped
        self._unpublished: list[Changes] = []

    def load(self, stored: Stored, now: float) -> None:
        """Fill the empty store with stored data. Leases restart with their full TTL, as after etcd's restart."""
        self.mvcc.load(stored.records, stored.revision, stored.compact_revision)
        for lease_id, ttl_s in stored.leases:
            self.lessor.grant(lease_id, ttl_s, now)
        self.lessor.follow(self.mvcc.index.newest_records())
        self.auth.load(stored.auth)
        self.alarms.load(stored.alarms)
        self.raft_index += stored.revision

    def filled(self, response: Answer) -> Answer:
        """Fill a response's header: ids and raft term, and the newest revision unless it has a revision already."""
        message: Any = response
        header: rpc_pb2.ResponseHeader = message.header
        header.cluster_id = self.identity.cluster_id
        header.member_id = self.identity.member_id
        header.raft_term = RAFT_TERM
        if not header.revision:
            header.revision = self.mvcc.revision
        return response

    def publish(self) -> None:
        """Pass the changes committed since the last call to the watchers."""
        while self._unpublished:
            for changes in self._take_unpublished():
                self.watchable.notify(changes)

    def _take_unpublished(self) -> list[Changes]:
        taken = self._unpublished
        self._unpublished = []
        return taken

    # KV

    def range(self, request: rpc_pb2.RangeRequest, user: str | None = None) -> rpc_pb2.RangeResponse:
        """Answer Range."""
        requests.check_range(request)
        self.auth.check(user, request.key, request.range_end)
        self.stats.ranges += 1
        return self.filled(requests.run_range(self.mvcc, request))

    def put(self, request: rpc_pb2.PutRequest, user: str | None = None) -> rpc_pb2.PutResponse:
        """Apply Put."""
        requests.check_put(request)
        self.auth.check_put(user, request, self.lessor.keys_of)
        self.alarms.check(grows=True)
        requests.check_put_runs(self.mvcc, request, self.lessor.exists)
        txn = self.mvcc.write()
        response = requests.run_put(txn, request)
        self._commit(txn)
        return self.filled(response)

    def delete_range(self, request: rpc_pb2.DeleteRangeRequest, user: str | None = None) -> rpc_pb2.DeleteRangeResponse:
        """Apply DeleteRange."""
        requests.check_delete_range(request)
        self.auth.check_delete_range(user, request)
        self.alarms.check()
        txn = self.mvcc.write()
        response = requests.run_delete_range(txn, request)
        self._commit(txn)
        return self.filled(response)

    def txn(self, request: rpc_pb2.TxnRequest, user: str | None = None) -> rpc_pb2.TxnResponse:
        """Apply Txn."""
        requests.check_txn(request)
        self.auth.check_txn(user, request, self.lessor.keys_of)
        if self.alarms:
            kinds = {op.WhichOneof("request") for op in (*request.success, *request.failure)}
            # etcd checks alarms when it applies a raft entry, and read-only transactions do not go through raft.
            if not kinds <= {"request_range"}:
                self.alarms.check(grows="request_put" in kinds)
        branch = requests.decide(self.mvcc, request)
        requests.check_branch(self.mvcc, branch, self.lessor.exists)
        self.stats.txns += 1
        txn = self.mvcc.write()
        response = requests.run_branch(txn, branch)
        self._commit(txn)
        return self.filled(response)

    def compact(self, request: rpc_pb2.CompactionRequest, user: str | None = None) -> rpc_pb2.CompactionResponse:
        """Apply Compact; `mvcc.compact_step` does the physical part."""
        self.auth.check_admin(user)
        self.alarms.check()
        self.mvcc.compact(request.revision)
        self._recorder.compacted(request.revision)
        self.raft_index += 1
        return self.filled(rpc_pb2.CompactionResponse())

    # Leases

    def lease_grant(
        self, request: rpc_pb2.LeaseGrantRequest, now: float, user: str | None = None
    ) -> rpc_pb2.LeaseGrantResponse:
        """Apply LeaseGrant; a request without an id gets a random one. Any user may, but not a call without a user."""
        self.auth.check_user(user)
        self.alarms.check(grows=True)
        lease_id = request.ID
        while not lease_id:
            lease_id = self._random_id()
        lease = self.lessor.grant(lease_id, request.TTL, now)
        self._recorder.granted(lease_id, lease.ttl_s)
        self.raft_index += 1
        self.stats.leases_granted += 1
        return self.filled(rpc_pb2.LeaseGrantResponse(ID=lease_id, TTL=lease.ttl_s))

    def lease_revoke(self, lease_id: int, user: str | None = None) -> rpc_pb2.LeaseRevokeResponse:
        """Apply LeaseRevoke: delete the lease's keys in one revision."""
        self.auth.check_user(user)
        for key in self.lessor.keys_of(lease_id):
            self.auth.check(user, key, write=True)
        self.alarms.check()
        return self._revoke(lease_id)

    def _revoke(self, lease_id: int) -> rpc_pb2.LeaseRevokeResponse:
        keys = self.lessor.keys(lease_id)
        txn = self.mvcc.write()
        for key in keys:
            txn.delete_range(key)
        self._commit(txn)
        self.lessor.drop(lease_id)
        self._recorder.revoked(lease_id)
        self.stats.leases_revoked += 1
        return self.filled(rpc_pb2.LeaseRevokeResponse())

    def lease_keep_alive(self, lease_id: int, now: float, user: str | None = None) -> rpc_pb2.LeaseKeepAliveResponse:
        """Answer one message of LeaseKeepAlive; TTL 0 means that the lease does not exist."""
        self._check_lease(lease_id, user, write=True)
        response = self.filled(rpc_pb2.LeaseKeepAliveResponse(ID=lease_id))
        try:
            response.TTL = self.lessor.renew(lease_id, now)
        except StoreError:
            return response
        self.stats.leases_renewed += 1
        return response

    def lease_time_to_live(
        self, request: rpc_pb2.LeaseTimeToLiveRequest, now: float, user: str | None = None
    ) -> rpc_pb2.LeaseTimeToLiveResponse:
        """Answer LeaseTimeToLive; for an unknown lease the TTL is LEASE_GONE_TTL."""
        self._check_lease(request.ID, user)
        response = self.filled(rpc_pb2.LeaseTimeToLiveResponse(ID=request.ID))
        try:
            lease = self.lessor.live(request.ID, now)
        except StoreError:
            response.TTL = LEASE_GONE_TTL
            return response
        response.TTL = int(lease.remaining_s(now))
        response.grantedTTL = lease.ttl_s
        if request.keys:
            response.keys.extend(sorted(lease.keys))
        return response

    def lease_leases(self, user: str | None = None) -> rpc_pb2.LeaseLeasesResponse:
        """Answer LeaseLeases."""
        self.auth.check_user(user)
        for lease in self.lessor.leases():
            self._check_lease(lease.lease_id, user)
        response = self.filled(rpc_pb2.LeaseLeasesResponse())
        response.leases.extend(rpc_pb2.LeaseStatus(ID=lease.lease_id) for lease in self.lessor.leases())
        return response

    def expire_leases(self, now: float) -> int:
        """Revoke a bounded number of expired leases; return how many."""
        due = self.lessor.expired(now)
        for lease_id in due:
            self._revoke(lease_id)
        return len(due)

    def _check_lease(self, lease_id: int, user: str | None, *, write: bool = False) -> None:
        """Refuse access to a lease unless the user may read (or write) all its keys. Raises StoreError."""
        self.auth.check_user(user)
        for key in self.lessor.keys_of(lease_id):
            self.auth.check(user, key, write=write)

    def alarm(self, request: rpc_pb2.AlarmRequest, user: str | None = None) -> rpc_pb2.AlarmResponse:
        """Answer or apply Alarm. Any user may list alarms."""
        response = rpc_pb2.AlarmResponse()
        if request.action == rpc_pb2.AlarmRequest.GET:
            self.auth.check_user(user)
        else:
            self.auth.check_admin(user)
        for member_id, kind in self.alarms.answer(request):
            response.alarms.add(memberID=member_id, alarm=kind)
        if response.alarms and request.action != rpc_pb2.AlarmRequest.GET:
            self.raft_index += 1
            self._recorder.alarms_changed(self.alarms.all())
        return self.filled(response)

    def auth_changed(self) -> None:
        """Record a change of users, roles, or auth being on or off."""
        self.raft_index += 1
        self._recorder.auth_changed(self.auth.rows())

    def _commit(self, txn: WriteTxn) -> None:
        changes = txn.commit()
        self.raft_index += 1
        if changes:
            self._count(changes)
            self.lessor.follow(changes)
            self._recorder.changed(changes)
            self._unpublished.append(changes)

    def _count(self, changes: tuple[RevisionRecord, ...]) -> None:
        deletes = sum(record.deleted for record in changes)
        self.stats.deletes += deletes
        self.stats.puts += len(changes) - deletes
