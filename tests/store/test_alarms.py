"""Alarms: the same calls to a real etcd and to the store get the same answers."""

from __future__ import annotations

from collections.abc import Callable

import grpc
from google.protobuf.message import Message

from proto.pb import rpc_pb2, rpc_pb2_grpc
from tests.etcd.binaries import current
from tests.etcd.server import EtcdServer
from tests.store.both import Answer, Client, comparable, new_state, refused
from tests.store.running import RunningStore

GET, ACTIVATE, DEACTIVATE = rpc_pb2.AlarmRequest.GET, rpc_pb2.AlarmRequest.ACTIVATE, rpc_pb2.AlarmRequest.DEACTIVATE
NONE, NOSPACE, CORRUPT = rpc_pb2.NONE, rpc_pb2.NOSPACE, rpc_pb2.CORRUPT
DATA = (
    rpc_pb2.PutRequest(key=b"a"),
    rpc_pb2.RangeRequest(key=b"a"),
    rpc_pb2.DeleteRangeRequest(key=b"a"),
    rpc_pb2.TxnRequest(success=[rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=b"b"))]),
    rpc_pb2.TxnRequest(success=[rpc_pb2.RequestOp(request_range=rpc_pb2.RangeRequest(key=b"b"))]),
    rpc_pb2.LeaseGrantRequest(ID=7, TTL=1000),
    rpc_pb2.LeaseRevokeRequest(ID=7),
)


def answers_of(endpoint: str) -> list[Answer]:
    client = Client(endpoint)
    maintenance = rpc_pb2_grpc.MaintenanceStub(client.channel)
    answers: list[Answer] = []

    def ask(method: Callable[..., Message], request: Message) -> None:
        try:
            answers.append(comparable(method(request, timeout=10)))
        except grpc.RpcError as error:
            answers.append(refused(error))

    for action, member_id, kind in (
        (GET, 0, NONE),
        (ACTIVATE, 0, NONE),
        (ACTIVATE, 5, NOSPACE),
        (ACTIVATE, 5, NOSPACE),
        (GET, 0, CORRUPT),
        (GET, 0, NONE),
        (DEACTIVATE, 6, NOSPACE),
        (DEACTIVATE, 5, NOSPACE),
        (ACTIVATE, 5, CORRUPT),
        (DEACTIVATE, 5, CORRUPT),
    ):
        ask(maintenance.Alarm, rpc_pb2.AlarmRequest(action=action, memberID=member_id, alarm=kind))
        answers.extend(comparable(client.ask(request)) for request in DATA)
        status = maintenance.Status(rpc_pb2.StatusRequest(), timeout=10)
        answers.append(rpc_pb2.StatusResponse(errors=status.errors))
    client.close()
    return answers


def test_alarms_are_answered_as_by_etcd() -> None:
    with EtcdServer(current()) as etcd, RunningStore() as store:
        assert answers_of(store.endpoint) == answers_of(etcd.endpoint)


def test_an_alarm_of_unknown_type_is_listed_by_its_number() -> None:
    """etcd 3.5.30 crashes on one."""
    state = new_state()
    unknown = rpc_pb2.AlarmRequest.FromString(b"\x18\x06").alarm
    state.alarm(rpc_pb2.AlarmRequest(action=ACTIVATE, memberID=5, alarm=unknown))
    assert state.alarms.texts() == ["memberID:5 alarm:6 "]
