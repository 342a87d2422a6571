"""Alarms, which an operator raises to stop writes, and disarms.

etcd also raises them by itself, when its quota is used up or its data differ between members. This store has no quota
and no other members, so only clients raise alarms here. They survive a restart. Source: etcd
server/etcdserver/api/v3alarm and apply/{capped,corrupt}.go.
"""

from __future__ import annotations

from collections.abc import Iterable

from proto.pb import rpc_pb2
from upstream.store import errors
from upstream.store.errors import StoreError

_Type = rpc_pb2.AlarmType
Alarm = tuple[int, "rpc_pb2.AlarmType.ValueType"]
"""(member id as given in the request, alarm type)"""


class Alarms:
    """The raised alarms."""

    def __init__(self) -> None:
        self._raised: dict[Alarm, None] = {}

    def __bool__(self) -> bool:
        return bool(self._raised)

    def answer(self, request: rpc_pb2.AlarmRequest) -> list[Alarm]:
        """Raise, disarm or list alarms; return the alarms concerned."""
        alarm = (request.memberID, request.alarm)
        if request.action == rpc_pb2.AlarmRequest.GET:
            return [one for one in self._raised if request.alarm in (_Type.NONE, one[1])]
        if request.alarm == _Type.NONE:
            return []
        if request.action == rpc_pb2.AlarmRequest.ACTIVATE:
            self._raised[alarm] = None
            return [alarm]
        if alarm not in self._raised:
            return []
        del self._raised[alarm]
        return [alarm]

    def all(self) -> list[Alarm]:
        """Return the raised alarms."""
        return list(self._raised)

    def load(self, alarms: Iterable[Alarm]) -> None:
        """Restore alarms that `all` returned."""
        self._raised = dict.fromkeys(alarms)

    def is_raised(self, kind: rpc_pb2.AlarmType.ValueType) -> bool:
        """Return whether any member has this alarm."""
        return any(raised == kind for _, raised in self._raised)

    def check(self, *, grows: bool = False) -> None:
        """Refuse every write under CORRUPT, and writes that let data grow under NOSPACE. Raises StoreError."""
        if not self._raised:
            return
        if self.is_raised(_Type.CORRUPT):
            raise StoreError(errors.CORRUPT)
        if grows and self.is_raised(_Type.NOSPACE):
            raise StoreError(errors.NO_SPACE)

    def texts(self) -> list[str]:
        """Return the alarms as Maintenance.Status lists them."""
        return [
            (f"memberID:{member_id} " if member_id else "") + f"alarm:{_name(kind)} "
            for member_id, kind in self._raised
        ]


def _name(kind: rpc_pb2.AlarmType.ValueType) -> str:
    """Return an alarm type's name as Go prints it, a number for an unknown type: clients may raise those too."""
    return _Type.Name(kind) if kind in _Type.values() else str(kind)
