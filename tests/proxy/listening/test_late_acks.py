"""A Go client's bandwidth pings that follow each other are acknowledged late; everything else is not."""

from __future__ import annotations

import time

import pytest

from proto.http2.frames import BANDWIDTH_PING, ping, window_update
from proxy.listening import late_acks
from tests.e2e.raw_client import RawClient
from tests.proxy.listening.echo import ECHO, rig_of
from tests.waiting import until_async


def answer(client: RawClient, payload: bytes) -> None:
    """Send what grpc-go sends after a read of DATA."""
    assert client.transport is not None
    client.transport.write(window_update(0, 100) + ping(payload))


async def test_bandwidth_pings_are_acknowledged_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_acks, "LATE_ACK_S_MAX", 0.1)
    async with rig_of() as rig, await rig.connect() as quick, await rig.connect() as slow:
        call = quick.call(ECHO)
        # A WINDOW_UPDATE would have the acknowledgement sent.
        call.taking = False
        await until_async(lambda: len(rig.handlers) == 1 and len(rig.listener.connections) == 2, "both connections")
        for connection in rig.listener.connections:
            # As small as grpc-go's: these clients open theirs wide.
            connection.h2.send_window = 65_535
        for client in (quick, slow):
            answer(client, BANDWIDTH_PING)
            await until_async(lambda: len(client.pings) == 1, "the first acknowledgement")  # noqa: B023  # called at once
        began = time.monotonic()
        for client in (quick, slow):
            answer(client, BANDWIDTH_PING)
        await until_async(lambda: len(rig.listener.late._since) == 2, "the pings")
        call.send(b"an event")
        assert await call.next() == b"an event"
        answer(quick, b"liveness")
        await until_async(lambda: quick.pings[1:] == [b"liveness"], "the keep-alive's acknowledgement")
        for client in (quick, slow):
            await until_async(lambda: client.pings[-1] == BANDWIDTH_PING, "the late one")  # noqa: B023  # called at once
        assert time.monotonic() - began >= 0.1
        assert [len(client.pings) for client in (quick, slow)] == [3, 2]
        assert rig.listener.late._timer is None
