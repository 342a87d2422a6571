"""grpc.health.v1, over a listener that serves nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]  # the package has no type stubs

from proto.framing import Status
from proxy.admin.health import CHECK, LIST, WATCH, Health
from proxy.listening.listener import Listener
from tests.e2e.raw_client import HOST, RawClient
from tests.waiting import until_async

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@asynccontextmanager
async def health_and_client() -> AsyncIterator[tuple[Health, RawClient]]:
    """Yield a health service whose upstream is reachable, and a client."""
    health = Health()
    health.set_upstream(True)
    listener = Listener()
    listener.routes.update(dict.fromkeys((CHECK, LIST, WATCH), health.open))
    await listener.start(HOST, 0)
    async with await RawClient.connect(listener.port) as client:
        yield health, client
    await listener.stop()


async def check(client: RawClient, service: str = "") -> int:
    """Call Check once."""
    call = await client.unary(CHECK.decode(), health_pb2.HealthCheckRequest(service=service).SerializeToString())
    assert call.status == Status.OK, call.text
    return int(health_pb2.HealthCheckResponse.FromString(call.messages[0]).status)


def status_of(message: bytes) -> int:
    """Decode one response."""
    return int(health_pb2.HealthCheckResponse.FromString(message).status)


async def test_check_reports_the_state() -> None:
    async with health_and_client() as (health, client):
        assert await check(client) == SERVING
        assert await check(client, "etcdserverpb.Watch") == SERVING
        health.set_upstream(False)
        assert health.reason == "etcd is not reachable"
        assert await check(client) == NOT_SERVING
        health.set_upstream(True)
        assert await check(client) == SERVING
        health.set_draining()
        assert health.reason == "draining"
        assert await check(client) == NOT_SERVING


async def test_an_unknown_service_is_not_found() -> None:
    async with health_and_client() as (_, client):
        request = health_pb2.HealthCheckRequest(service="nope").SerializeToString()
        call = await client.unary(CHECK.decode(), request)
        assert call.status == Status.NOT_FOUND


async def test_watch_reports_only_changes() -> None:
    async with health_and_client() as (health, client):
        call, unknown = client.call(WATCH.decode()), client.call(WATCH.decode())
        call.send(b"", end=True)
        unknown.send(health_pb2.HealthCheckRequest(service="nope").SerializeToString(), end=True)
        assert status_of(await call.next()) == SERVING
        assert status_of(await unknown.next()) == SERVICE_UNKNOWN
        health.set_upstream(True)
        health.set_upstream(False)
        health.set_upstream(False)
        assert status_of(await call.next()) == NOT_SERVING
        health.set_upstream(True)
        assert status_of(await call.next()) == SERVING
        assert not call.over
        call.cancel()
        unknown.cancel()
        await until_async(lambda: not health._watchers, "the watches to be forgotten")
        assert len(call.messages) == 3


async def test_watches_end_at_a_drain() -> None:
    async with health_and_client() as (health, client):
        call = client.call(WATCH.decode())
        call.send(b"", end=True)
        await call.next()
        health.set_draining()
        health.leave_all()
        assert status_of(await call.next()) == NOT_SERVING
        assert (await call.end())[0] == Status.UNAVAILABLE


async def test_all_services_are_listed_as_serving() -> None:
    async with health_and_client() as (_, client):
        call = await client.unary(LIST.decode(), b"")
        statuses = health_pb2.HealthListResponse.FromString(call.messages[0]).statuses
        assert {statuses[name].status for name in ("", "etcdserverpb.Watch")} == {SERVING}


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", Status.INTERNAL),
        (b"\0\0\0\0\x02\x0a\xff", Status.INTERNAL),
        (b"\0\x7f\xff\xff\xff", Status.RESOURCE_EXHAUSTED),
        (b"\2\0\0\0\0", Status.INTERNAL),
    ],
)
async def test_bad_health_requests_end_with_a_status(raw: bytes, status: Status) -> None:
    async with health_and_client() as (_, client):
        call = client.call(CHECK.decode())
        call.send_raw(raw, end=True)
        assert (await call.end())[0] == status


async def test_a_missing_request_times_out() -> None:
    async with health_and_client() as (_, client):
        call = client.call(CHECK.decode(), [("grpc-timeout", "50m")])
        assert (await call.end())[0] == Status.DEADLINE_EXCEEDED
        assert (await client.call(CHECK.decode(), end=True).end())[0] == Status.INTERNAL


def test_the_health_service_loads_no_grpc() -> None:
    code = "import sys, proxy.admin.health; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
