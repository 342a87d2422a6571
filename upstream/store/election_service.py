"""The Election service of etcd (server/etcdserver/api/v3election): campaigning, proclaiming, observing, resigning."""

from __future__ import annotations

import grpc

from proto.framing import Status
from proto.pb import rpc_pb2, v3election_pb2
from upstream.store.calls import Context, answers_stream, parse, service
from upstream.store.errors import StoreError, StoreRefusal
from upstream.store.queueing import LockQueue, created_at, leave
from upstream.store.service import LineService

MISSING_LEADER_KEY = StoreRefusal(Status.UNKNOWN, '"leader" field must be provided')
NOT_LEADER = StoreRefusal(Status.UNKNOWN, "election: not leader")
NO_LEADER = StoreRefusal(Status.UNKNOWN, "election: no leader")


class ElectionService(LineService):
    """v3electionpb.Election."""

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the service to register."""
        return service(
            "v3electionpb.Election",
            {
                "Campaign": self._unary(v3election_pb2.CampaignRequest, self.campaign),
                "Proclaim": self._unary(v3election_pb2.ProclaimRequest, self.proclaim),
                "Leader": self._unary(v3election_pb2.LeaderRequest, self.leader),
                "Observe": answers_stream(self._observe),
                "Resign": self._unary(v3election_pb2.ResignRequest, self.resign),
            },
        )

    async def campaign(
        self, request: v3election_pb2.CampaignRequest, user: str | None
    ) -> v3election_pb2.CampaignResponse:
        """Answer Campaign once elected; a cancelled call withdraws."""
        line = self._line(request.name, user)
        lease_id = await line.lease(request.lease)
        key, entered = await line.enter(lease_id, request.value)
        leader = v3election_pb2.LeaderKey(name=request.name, key=key, rev=entered.header.revision, lease=lease_id)
        try:
            if not entered.succeeded:
                (there,) = entered.responses[0].response_range.kvs
                leader.rev = there.create_revision
                if there.value != request.value:
                    await self._proclaim(line, leader, request.value)
            await line.wait_for_turn(leader.rev)
        except BaseException:
            leave(lambda: self._resign(line, leader))
            raise
        return v3election_pb2.CampaignResponse(header=entered.header, leader=leader)

    async def proclaim(
        self, request: v3election_pb2.ProclaimRequest, user: str | None
    ) -> v3election_pb2.ProclaimResponse:
        """Answer Proclaim: the leader announces a new value."""
        if not request.HasField("leader"):
            raise StoreError(MISSING_LEADER_KEY)
        line = self._line(request.leader.name, user)
        response = await self._proclaim(line, request.leader, request.value)
        return v3election_pb2.ProclaimResponse(header=response.header)

    async def _proclaim(self, line: LockQueue, leader: v3election_pb2.LeaderKey, value: bytes) -> rpc_pb2.TxnResponse:
        request = rpc_pb2.TxnRequest(compare=[created_at(leader.key, leader.rev)])
        put = rpc_pb2.PutRequest(key=leader.key, value=value, lease=leader.lease)
        request.success.add().request_put.CopyFrom(put)
        response = await line.commit(request)
        if not response.succeeded:
            raise StoreError(NOT_LEADER)
        return response

    async def leader(self, request: v3election_pb2.LeaderRequest, user: str | None) -> v3election_pb2.LeaderResponse:
        """Answer Leader."""
        header, leader = self._line(request.name, user).first()
        if leader is None:
            raise StoreError(NO_LEADER)
        return v3election_pb2.LeaderResponse(header=header, kv=leader)

    async def resign(self, request: v3election_pb2.ResignRequest, user: str | None) -> v3election_pb2.ResignResponse:
        """Answer Resign; does nothing for a client that is not the leader any more."""
        if not request.HasField("leader"):
            raise StoreError(MISSING_LEADER_KEY)
        response = await self._resign(self._line(request.leader.name, user), request.leader)
        return v3election_pb2.ResignResponse(header=response.header)

    async def _resign(self, line: LockQueue, leader: v3election_pb2.LeaderKey) -> rpc_pb2.TxnResponse:
        request = rpc_pb2.TxnRequest(compare=[created_at(leader.key, leader.rev)])
        request.success.add().request_delete_range.CopyFrom(rpc_pb2.DeleteRangeRequest(key=leader.key))
        return await line.commit(request)

    async def _observe(self, data: bytes, context: Context) -> None:
        self._calls.traffic.received += len(data)
        request = parse(v3election_pb2.LeaderRequest, data)
        async for revision, leader in self._line(request.name, self._calls.user(context)).turns():
            response = v3election_pb2.LeaderResponse(kv=leader)
            response.header.revision = revision
            await self._calls.write(context, self._state.filled(response).SerializeToString())
