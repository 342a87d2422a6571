"""The upstream's own numbers: its /metrics page, summed by name.

All numbers about the upstream in the demo and the measurement come from the upstream's own metrics, none from the
proxy.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from proxy.measuring.load.target import ConnectionFiles
from upstream.errors import BadTls

FETCH_LIMIT_S = 5.0


class NoMetrics(Exception):
    """A metrics page could not be read; the text is one line."""


class ServingCost(msgspec.Struct, frozen=True, kw_only=True):
    """The cost of serving watches, by the upstream's own metrics. None: not among its metrics."""

    watchers: int
    watch_streams: int
    slow_watchers: int
    events_sent: int
    """Events sent to watchers since the upstream's start."""
    bytes_sent: int
    """Bytes sent to gRPC clients since the upstream's start."""
    cpu_s: float | None
    memory_bytes: int | None
    ranges: int = 0
    """Range calls served since the upstream's start."""
    calls: int | None = None
    """gRPC calls started since the upstream's start."""


def cost_of(samples: Mapping[str, float]) -> ServingCost:
    """Extract the numbers from a metrics page. Raises NoMetrics for a page that is not etcd's."""
    try:
        return ServingCost(
            watchers=int(samples["etcd_debugging_mvcc_watcher_total"]),
            watch_streams=int(samples["etcd_debugging_mvcc_watch_stream_total"]),
            slow_watchers=int(samples.get("etcd_debugging_mvcc_slow_watcher_total", 0)),
            events_sent=int(samples.get("etcd_debugging_mvcc_events_total", 0)),
            bytes_sent=int(samples.get("etcd_network_client_grpc_sent_bytes_total", 0)),
            ranges=int(samples.get("etcd_mvcc_range_total", 0)),
            cpu_s=samples.get("process_cpu_seconds_total"),
            memory_bytes=int(samples["process_resident_memory_bytes"])
            if "process_resident_memory_bytes" in samples
            else None,
            calls=int(samples["grpc_server_started_total"]) if "grpc_server_started_total" in samples else None,
        )
    except KeyError as missing:
        raise NoMetrics(f"the metrics have no {missing.args[0]}: they are not from etcd") from None


def open_session(url: str, access: ConnectionFiles) -> aiohttp.ClientSession:
    """Open an HTTP session for `url` with TLS and a user (HTTP basic auth), where they are given. Raises NoMetrics."""
    connector = None
    if url.startswith("https://"):
        try:
            connector = aiohttp.TCPConnector(ssl=access.http_context())
        except BadTls as error:
            raise NoMetrics(str(error)) from None
    headers = {}
    if access.user:
        pair = base64.b64encode(f"{access.user}:{access.password}".encode())
        headers["Authorization"] = f"Basic {pair.decode()}"
    timeout = aiohttp.ClientTimeout(total=FETCH_LIMIT_S)
    return aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers)


def http_reason(error: Exception) -> str:
    """Describe in a few words why an HTTP request failed."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"its certificate is not trusted ({error.certificate_error}); check the address and --cacert"
    if isinstance(error, aiohttp.ClientConnectorSSLError):
        return "TLS failed; check the address, --cacert, --cert and --key"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "the name cannot be resolved; check the spelling"
    if isinstance(error, aiohttp.ClientResponseError):
        return "it does not speak HTTP/1"
    inner = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(inner, TimeoutError):
        return "no answer in time"
    if isinstance(inner, OSError) and inner.errno is not None and inner.errno > 0:
        return os.strerror(inner.errno).lower()
    return str(inner) or type(inner).__name__


class MetricsReading(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of a metrics page."""

    sums: dict[str, float]
    """The sum of the samples of each name."""
    server_ids: frozenset[str] = frozenset()
    """etcd: its member id; the proxy: that of the member that carries its upstream watches. In hexadecimal."""
    peer_ids: frozenset[str] = frozenset()
    """The other members of its cluster."""


SERVER_ID = frozenset({"etcd_server_id", "watchmux_upstream_server"})
PEER_SENT = "etcd_network_peer_sent_bytes_total"


class MetricsPage:
    """One metrics page, fetched as often as needed over one connection."""

    def __init__(self, url: str, access: ConnectionFiles | None = None) -> None:
        self.url = url if url.endswith("/metrics") else url.rstrip("/") + "/metrics"
        self._access = access or ConnectionFiles()
        self._session: aiohttp.ClientSession | None = None

    def session(self) -> aiohttp.ClientSession:
        """Return its HTTP session, which `close` closes. Raises NoMetrics."""
        if self._session is None:
            self._session = open_session(self.url, self._access)
        return self._session

    async def samples(self) -> dict[str, float]:
        """Fetch the page and return the sum of the samples of each name. Raises NoMetrics."""
        return (await self.read()).sums

    async def read(self) -> MetricsReading:
        """Fetch the page. Raises NoMetrics."""
        try:
            async with self.session().get(self.url) as answer:
                if answer.status != 200:
                    raise NoMetrics(f"{self.url} answered {answer.status} {answer.reason}")
                text = await answer.text()
        except (aiohttp.ClientError, OSError, UnicodeDecodeError) as error:
            raise NoMetrics(f"cannot read {self.url}: {http_reason(error)}") from None
        return parse_page(text, self.url)

    async def cost(self) -> ServingCost:
        """Fetch the cost of serving watches. Raises NoMetrics."""
        return cost_of(await self.samples())

    async def close(self) -> None:
        """Close the connection."""
        if self._session is not None:
            await self._session.close()


def parse_page(text: str, origin: str) -> MetricsReading:
    """Parse a metrics page. Raises NoMetrics."""
    sums: dict[str, float] = {}
    server_ids, peer_ids = set(), set()
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
                if sample.name in SERVER_ID:
                    server_ids.add(sample.labels.get("server_id", ""))
                elif sample.name == PEER_SENT:
                    peer_ids.add(sample.labels.get("To", ""))
    except ValueError as error:
        raise NoMetrics(f"{origin} is not a metrics page: {error}") from None
    # A member's id becomes a label only once it has sent something; "0" is a peer that is still unknown.
    return MetricsReading(sums=sums, server_ids=frozenset(server_ids - {""}), peer_ids=frozenset(peer_ids - {"", "0"}))
