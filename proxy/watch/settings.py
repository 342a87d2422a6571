"""The limits of the Watch service, each with its unit and its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class WatchSettings:
    """Limits of the Watch service."""

    request_bytes_max: int = 2 * 1024 * 1024
    """Size of one WatchRequest; etcd's own bound is --max-request-bytes (1.5 MiB) + 512 KiB."""

    sessions_per_connection_max: int = 10_000
    """Watch streams on one connection; further ones are refused RESOURCE_EXHAUSTED."""

    requests_waiting_bytes_max: int = 256 * 1024 * 1024
    """Bytes of requests waiting on all watch streams: for their turn, for their last bytes, or for etcd. Reading from a
    stream stops long before that (the core's `line_bytes_max`); at this bound a stream with at least its share of the
    bytes ends RESOURCE_EXHAUSTED."""
