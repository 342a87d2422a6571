"""The upstream's own numbers: its /metrics page, summed by name.

All numbers about the upstream in the demo and the measurement come from the upstream's own metrics, none from the
proxy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

FETCH_LIMIT_S = 5.0


class NoMetrics(Exception):
    """A metrics page could not be read; the text is one line."""


class Cost(msgspec.Struct, frozen=True, kw_only=True):
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


def cost_of(samples: Mapping[str, float]) -> Cost:
    """Extract the numbers from a metrics page. Raises NoMetrics for a page that is not etcd's."""
    try:
        return Cost(
            watchers=int(samples["etcd_debugging_mvcc_watcher_total"]),
            watch_streams=int(samples["etcd_debugging_mvcc_watch_stream_total"]),
            slow_watchers=int(samples.get("etcd_debugging_mvcc_slow_watcher_total", 0)),
            events_sent=int(samples.get("etcd_debugging_mvcc_events_total", 0)),
            bytes_sent=int(samples.get("etcd_network_client_grpc_sent_bytes_total", 0)),
            cpu_s=samples.get("process_cpu_seconds_total"),
            memory_bytes=int(samples["process_resident_memory_bytes"])
            if "process_resident_memory_bytes" in samples
            else None,
        )
    except KeyError as missing:
        raise NoMetrics(f"the metrics have no {missing.args[0]}: they are not from etcd") from None


def http_reason(error: Exception) -> str:
    """Describe in a few words why an HTTP request failed."""
    inner = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(inner, TimeoutError):
        return "no answer in time"
    if isinstance(inner, OSError) and inner.errno is not None and inner.errno > 0:
        return os.strerror(inner.errno).lower()
    return str(inner) or type(inner).__name__


class MetricsPage:
    """One metrics page, fetched as often as needed over one connection."""

    def __init__(self, url: str) -> None:
        self.url = url if url.endswith("/metrics") else url.rstrip("/") + "/metrics"
        self._session: aiohttp.ClientSession | None = None

    async def samples(self) -> dict[str, float]:
        """Fetch the page and return the sum of the samples of each name. Raises NoMetrics."""
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=FETCH_LIMIT_S))
        try:
            async with self._session.get(self.url) as answer:
                if answer.status != 200:
                    raise NoMetrics(f"{self.url} answered {answer.status} {answer.reason}")
                text = await answer.text()
        except (aiohttp.ClientError, OSError, UnicodeDecodeError) as error:
            raise NoMetrics(f"cannot read {self.url}: {http_reason(error)}") from None
        return sum_samples(text, self.url)

    async def cost(self) -> Cost:
        """Fetch the cost of serving watches. Raises NoMetrics."""
        return cost_of(await self.samples())

    async def close(self) -> None:
        """Close the connection."""
        if self._session is not None:
            await self._session.close()


def sum_samples(text: str, origin: str) -> dict[str, float]:
    """Parse a metrics page into the sum of the samples of each name. Raises NoMetrics."""
    sums: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    except ValueError as error:
        raise NoMetrics(f"{origin} is not a metrics page: {error}") from None
    return sums
