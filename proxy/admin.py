"""The port for operators: /metrics for Prometheus, /health for probes, /v1/status for `watchmux status`.

Everything shown is a snapshot taken when somebody asks (proxy/snapshot.py). It is served from the same event loop
as the watches, so a proxy that hangs does not answer its probes. It is read-only and shows no key, value or
credential.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from proxy.config_values import Address
from proxy.snapshot import Snapshot, Source

if TYPE_CHECKING:
    from proxy.server import Proxy

GAUGES = {
    "connections": "Client connections open now.",
    "streams": "Client streams (calls and watches) open now.",
    "sessions": "Client watch streams open now.",
    "watches": "Client watches open now.",
    "trunks": "Shared upstream watches open now, one for each watched range.",
    "backfills": "Private upstream watches open now that catch up with the past for a client.",
    "lagging": "Client watches that are behind now: their client reads slowly or is catching up.",
    "queued": "Client watches that wait for a backfill now.",
    "history_bytes": "Bytes of recent events kept for replay.",
    "history_batches": "Responses of recent events kept for replay.",
}
"""Fields of a snapshot that are gauges, with what they mean."""

COUNTERS = {
    "connections_accepted_total": "Client connections accepted.",
    "connections_refused_total": "Client connections turned away at --connections-max.",
    "requests_total": "Client streams (calls and watches) opened.",
    "written_bytes_total": "Bytes written to clients.",
    "creates_total": "Watches that clients asked for.",
    "refused_total": "Watches that were refused.",
    "cancels_total": "Watches that clients cancelled.",
    "compacted_total": "Watches cancelled because what they needed was compacted.",
    "progress_requests_total": "Progress requests of clients.",
    "progress_answers_total": "Progress requests answered.",
    "sessions_ended_total": "Client watch streams ended by the proxy.",
    "stalls_total": "Times a client's watch stream could not take more.",
    "replays_total": "Responses joined from history for watches that were behind.",
    "batches_received_total": "Watch responses with events received from upstream.",
    "events_received_total": "Events received from upstream.",
    "messages_delivered_total": "Responses with events delivered to client watches.",
    "events_delivered_total": "Events delivered to client watches.",
    "delivered_bytes_total": "Bytes of responses with events delivered to client watches.",
    "upstream_opened_total": "Upstream watches opened.",
    "upstream_lost_total": "Upstream watches that ended for good.",
    "upstream_broken_total": "Times an upstream watch stream broke.",
    "upstream_reads_total": "Reads of the current revision and checks of permissions sent upstream.",
}
"""Fields of a snapshot that are counters, with what they mean."""


class SnapshotCollector(Collector):
    """Turns a snapshot into metric families at the moment of a scrape."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        snapshot = self._source.take()
        yield from families(snapshot)


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield the metric families of a snapshot."""
    for name, text in GAUGES.items():
        yield GaugeMetricFamily(f"watchmux_{name}", text, value=getattr(snapshot, name))
    for name, text in COUNTERS.items():
        yield CounterMetricFamily(f"watchmux_{name}", text, value=getattr(snapshot, name))
    joins = CounterMetricFamily(
        "watchmux_joins_total", "Watches that joined, by how they were served.", labels=["kind"]
    )
    for kind, count in snapshot.joins_total.items():
        joins.add_metric([kind], count)
    yield joins
    yield GaugeMetricFamily(
        "watchmux_upstream_reachable", "Whether an etcd answers (1) or none (0).", value=_reachable(snapshot)
    )


def _reachable(snapshot: Snapshot) -> int:
    return int(snapshot.serving or snapshot.reason == "draining")


class Admin:
    """The operators' HTTP server of one proxy."""

    def __init__(self, proxy: Proxy, listen: Address, proxy_address: str) -> None:
        self._source = Source(proxy, proxy_address)
        self._listen = listen
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(SnapshotCollector(self._source))
        ProcessCollector(registry=self._registry)
        self._runner: web.AppRunner | None = None

    @property
    def address(self) -> Address:
        """Where it serves. Only after `start`."""
        assert self._runner is not None
        return Address(self._listen.host, self._runner.addresses[0][1])

    async def start(self) -> None:
        """Serve. Raises OSError when it cannot listen."""
        application = web.Application()
        application.add_routes(
            [
                web.get("/metrics", self._metrics),
                web.get("/health", self._health),
                web.get("/v1/status", self._status),
            ]
        )
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._listen.host, self._listen.port).start()
        except OSError:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Close the server and its connections."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    async def _health(self, _request: web.Request) -> web.Response:
        """Answer as etcd's /health does, so that its probes can be kept."""
        snapshot = self._source.take()
        body = msgspec.json.encode({"health": str(snapshot.serving).lower(), "reason": snapshot.reason})
        return web.Response(body=body, status=200 if snapshot.serving else 503, content_type="application/json")

    async def _status(self, _request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self._source.take()), content_type="application/json")
