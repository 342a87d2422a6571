"""The Maintenance service: status, hashes, alarms; calls that need raft or bolt are refused with the reason."""

from __future__ import annotations

import asyncio
import zlib

import grpc

from proto.pb import rpc_pb2
from upstream.store import errors
from upstream.store.calls import service, unimplemented
from upstream.store.errors import StoreError
from upstream.store.index import RevisionRecord
from upstream.store.service import StoreService
from upstream.store.state import RAFT_TERM
from upstream.store.txn import key_value

VERSION = "3.5.30"
"""The etcd release whose behaviour the store follows. Clients infer features from it, such as ordered progress."""

EMPTY_BYTES = 20 * 1024
"""The size that an empty store reports: etcd's empty database has five pages, and 0 looks like a missing answer."""

HASH_RECORDS_PER_STEP = 1000
"""Records hashed between two turns of the event loop: a few milliseconds."""

NO_SNAPSHOT = "the bundled store has no bolt database to send: copy its --data-dir, or read the keys with Range"
NO_LEADER_TO_MOVE = "the bundled store is a single member: leadership cannot move"
NO_DOWNGRADE = "the bundled store has no older version to go back to"


class MaintenanceService(StoreService):
    """etcdserverpb.Maintenance."""

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the service to register."""
        return service(
            "etcdserverpb.Maintenance",
            {
                "Alarm": self._write(rpc_pb2.AlarmRequest, self._state.alarm),
                "Status": self._read(rpc_pb2.StatusRequest, self.status),
                "Defragment": self._calls.unary(rpc_pb2.DefragmentRequest, self.defragment, maintenance=True),
                "Hash": self._calls.unary(rpc_pb2.HashRequest, self.hash, maintenance=True),
                "HashKV": self._calls.unary(rpc_pb2.HashKVRequest, self.hash_kv, maintenance=True),
                "Snapshot": unimplemented(NO_SNAPSHOT, streams_answers=True),
                "MoveLeader": unimplemented(NO_LEADER_TO_MOVE),
                "Downgrade": unimplemented(NO_DOWNGRADE),
            },
        )

    def status(self, _request: rpc_pb2.StatusRequest, user: str | None) -> rpc_pb2.StatusResponse:
        """Answer Status."""
        state = self._state
        state.auth.check_admin(user)
        response = rpc_pb2.StatusResponse(
            version=VERSION,
            dbSize=EMPTY_BYTES + state.mvcc.size_bytes,
            dbSizeInUse=EMPTY_BYTES + state.mvcc.size_bytes,
            leader=state.identity.member_id,
            raftIndex=state.raft_index,
            raftAppliedIndex=state.raft_index,
            raftTerm=RAFT_TERM,
            errors=state.alarms.texts(),
        )
        return state.filled(response)

    async def defragment(self, _request: rpc_pb2.DefragmentRequest, _user: str | None) -> rpc_pb2.DefragmentResponse:
        """Answer Defragment: does nothing, since the store has no bolt file."""
        return rpc_pb2.DefragmentResponse()

    async def hash(self, _request: rpc_pb2.HashRequest, _user: str | None) -> rpc_pb2.HashResponse:
        """Answer Hash."""
        return self._state.filled(rpc_pb2.HashResponse(hash=await self._hash(self._state.mvcc.revision)))

    async def hash_kv(self, request: rpc_pb2.HashKVRequest, _user: str | None) -> rpc_pb2.HashKVResponse:
        """Answer HashKV: a hash of all revisions up to the given one; 0 = the newest."""
        mvcc = self._state.mvcc
        revision = request.revision
        if 0 < revision < mvcc.compact_revision:
            raise StoreError(errors.COMPACTED)
        if revision > mvcc.revision:
            raise StoreError(errors.FUTURE_REVISION)
        revision = revision or mvcc.revision
        response = rpc_pb2.HashKVResponse(compact_revision=mvcc.compact_revision, hash_revision=revision)
        response.hash = await self._hash(revision)
        return self._state.filled(response)

    async def _hash(self, revision: int) -> int:
        """Hash the records up to a revision that compaction keeps, in order of revision, yielding to calls in between.

        CRC-32 instead of etcd's CRC-32C: the values only have to match between members of one cluster.
        """
        mvcc = self._state.mvcc

        def place(record: RevisionRecord) -> tuple[int, int]:
            return record.mod_revision, record.sub_revision

        records = sorted(
            (r for r in mvcc.index.records(mvcc.compact_revision) if r.mod_revision <= revision), key=place
        )
        value = 0
        for start in range(0, len(records), HASH_RECORDS_PER_STEP):
            for record in records[start : start + HASH_RECORDS_PER_STEP]:
                value = zlib.crc32(key_value(record).SerializeToString(deterministic=True), value)
            await asyncio.sleep(0)
        return value
