"""Calls that never end by themselves, such as keep-alive streams: a drain ends them, so that it need not wait for them.

Their clients open them again elsewhere, as they do with a watch. clientv3 does that after half a second.
"""

from __future__ import annotations

from typing import Final

from proto.framing import Status
from proto.http2 import StreamState
from proxy.listening.calls import CallRefusal
from proxy.listening.connection import ServerConnection
from proxy.passthrough.relay import Relay

KEEP_ALIVE: Final = b"/etcdserverpb.Lease/LeaseKeepAlive"
OBSERVE: Final = b"/v3electionpb.Election/Observe"


def end_endless(connection: ServerConnection, text: str) -> None:
    """End the calls of a connection that have no end of their own, with UNAVAILABLE and `text`."""
    for stream in tuple(connection.h2.streams.values()):
        call = stream.owner
        if not isinstance(call, Relay):
            continue
        path = next((value for name, value in call.headers if name == b":path"), b"")
        # Python's etcd3 opens a stream for each keep-alive and half-closes it: that one ends with its answer.
        if path == OBSERVE or (path == KEEP_ALIVE and stream.state is StreamState.OPEN):
            call.cut_short(CallRefusal(200, Status.UNAVAILABLE, text))
