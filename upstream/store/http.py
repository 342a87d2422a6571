"""The HTTP side: /health, /version and /metrics, on their own address (etcd's --listen-metrics-urls).

gRPC owns the client port, so unlike in etcd these paths are not served there. Metrics have etcd's names, so that tools
made for etcd work on them.
"""

from __future__ import annotations

from collections.abc import Iterator

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from proto.pb import rpc_pb2
from upstream.store.calls import Traffic
from upstream.store.maintenance_service import VERSION
from upstream.store.state import StoreState

CLUSTER_VERSION = VERSION.rpartition(".")[0] + ".0"


class StoreCollector(Collector):
    """Reads the store's counters on each scrape, so that the store itself pays nothing for metrics."""

    def __init__(self, state: StoreState, traffic: Traffic) -> None:
        self._state = state
        self._traffic = traffic

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        yield from self._gauges()
        yield from self._counters()
        version = GaugeMetricFamily("etcd_server_version", "The etcd release whose behaviour the store follows.")
        version.add_sample("etcd_server_version", {"server_version": VERSION}, 1)
        yield version
        server = GaugeMetricFamily("etcd_server_id", "The store's member id in hexadecimal; the value is always 1.")
        server.add_sample("etcd_server_id", {"server_id": f"{self._state.identity.member_id:x}"}, 1)
        yield server

    def _gauges(self) -> Iterator[Metric]:
        mvcc, watchable = self._state.mvcc, self._state.watchable
        values: dict[str, tuple[str, float]] = {
            "etcd_server_has_leader": ("1: a single member always leads.", 1),
            "etcd_server_is_leader": ("1: a single member always leads.", 1),
            "etcd_debugging_mvcc_watcher_total": ("Watchers.", watchable.stats.watchers),
            "etcd_debugging_mvcc_watch_stream_total": ("Watch streams.", watchable.stats.streams),
            "etcd_debugging_mvcc_slow_watcher_total": ("Unsynced and victim watchers.", watchable.slow_watchers),
            "etcd_debugging_mvcc_pending_events_total": ("Events queued.", watchable.stats.pending_events),
            "etcd_debugging_mvcc_current_revision": ("The newest revision.", mvcc.revision),
            "etcd_debugging_mvcc_compact_revision": ("The compact revision.", mvcc.compact_revision),
            "etcd_debugging_mvcc_keys_total": ("Keys with a history, deleted ones included.", len(mvcc.index)),
            "etcd_mvcc_db_total_size_in_bytes": ("Size of all records, approximately.", mvcc.size_bytes),
            "etcd_mvcc_db_total_size_in_use_in_bytes": ("Size of all records, approximately.", mvcc.size_bytes),
        }
        for name, (text, value) in values.items():
            yield GaugeMetricFamily(name, text, value)

    def _counters(self) -> Iterator[Metric]:
        stats = self._state.stats
        values: dict[str, tuple[str, float]] = {
            "etcd_debugging_mvcc_events_total": ("Events sent to watch streams.", self._state.watchable.stats.events),
            "etcd_mvcc_range_total": ("Range calls.", stats.ranges),
            "etcd_mvcc_put_total": ("Keys put.", stats.puts),
            "etcd_mvcc_delete_total": ("Keys deleted.", stats.deletes),
            "etcd_mvcc_txn_total": ("Txn calls.", stats.txns),
            "etcd_debugging_lease_granted_total": ("Leases granted.", stats.leases_granted),
            "etcd_debugging_lease_revoked_total": ("Leases revoked or expired.", stats.leases_revoked),
            "etcd_debugging_lease_renewed_total": ("Leases renewed.", stats.leases_renewed),
            "etcd_network_client_grpc_sent_bytes_total": ("Bytes to clients.", self._traffic.sent),
            "etcd_network_client_grpc_received_bytes_total": ("Bytes from clients.", self._traffic.received),
        }
        for name, (text, value) in values.items():
            yield CounterMetricFamily(name, text, value)


def make_application(state: StoreState, traffic: Traffic) -> web.Application:
    """Make the HTTP application; the caller runs it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StoreCollector(state, traffic))
    ProcessCollector(registry=registry)

    async def health(_request: web.Request) -> web.Response:
        for kind in (rpc_pb2.AlarmType.NOSPACE, rpc_pb2.AlarmType.CORRUPT):
            if state.alarms.is_raised(kind):
                reason = f"ALARM {rpc_pb2.AlarmType.Name(kind)}"
                return web.json_response({"health": "false", "reason": reason}, status=503)
        return web.json_response({"health": "true", "reason": ""})

    async def version(_request: web.Request) -> web.Response:
        return web.json_response({"etcdserver": VERSION, "etcdcluster": CLUSTER_VERSION})

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    application = web.Application()
    application.router.add_get("/health", health)
    application.router.add_get("/version", version)
    application.router.add_get("/metrics", metrics)
    return application
