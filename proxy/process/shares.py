"""The settings of each process of `--workers`: what the hub and a worker have of the settings of the whole.

Limits on clients are divided, since clients are distributed evenly over the workers: each worker gets its share and a
margin. Memory is divided among all processes. Limits on ranges are not divided: clients of each worker may watch
every range. The hub's clients are the workers, whose limits are enough, so it has none of its own.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Final

from proxy.config.knobs import Settings
from proxy.listening.http1 import Http1Settings

MARGIN: Final = 1.2
"""Connections close unevenly, and some have more watches than others, so a worker may have more than its share."""

UNLIMITED: Final = 2**31 - 1


def count(workers: int) -> int:
    """Return the number of workers that --workers asks for: 0 is one for each core that this process may use."""
    return workers or len(os.sched_getaffinity(0))


def _part(limit: int, workers: int) -> int:
    return min(limit, math.ceil(limit / workers * MARGIN))


def worker_settings(settings: Settings, workers: int, hub: str) -> Settings:
    """Return the settings of each worker; `hub`: the endpoint of the hub."""
    listener, watch = settings.listener, settings.watch
    processes = workers + 1
    return replace(
        settings,
        upstream=replace(settings.upstream, watch_endpoints=[hub]),
        listener=replace(
            listener,
            workers=1,
            connections_max=_part(listener.connections_max, workers),
            requests_waiting_bytes_max=max(1, listener.requests_waiting_bytes_max // processes),
        ),
        watch=replace(
            watch,
            watches_max=_part(watch.watches_max, workers),
            history_bytes_total_max=watch.history_bytes_total_max // processes,
        ),
        admin=replace(settings.admin, metrics_addr=""),
    )


def hub_settings(settings: Settings, workers: int, path: str) -> Settings:
    """Return the settings of the hub, which listens at the unix socket `path`."""
    listener, watch = settings.listener, settings.watch
    processes = workers + 1
    return replace(
        settings,
        upstream=replace(settings.upstream, namespace=""),
        listener=replace(
            listener,
            workers=1,
            listen_addr=f"unix://{path}",
            advertise_client_url="",
            cert_file="",
            key_file="",
            trusted_ca_file="",
            max_concurrent_streams=UNLIMITED,
            sessions_per_connection_max=UNLIMITED,
            grpc_keepalive_min_time_s=0.0,
            connections_max=workers
            * (2 * settings.upstream.connections_per_endpoint_max + Http1Settings().hub_connections_max),
            requests_waiting_bytes_max=max(1, listener.requests_waiting_bytes_max // processes),
        ),
        watch=replace(
            watch,
            watches_max=UNLIMITED,
            watches_per_session_max=UNLIMITED,
            lagging_age_s_max=0.0,
            history_bytes_total_max=watch.history_bytes_total_max // processes,
        ),
    )
