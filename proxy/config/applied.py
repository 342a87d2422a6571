"""The settings as each part of the proxy takes them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Final

from coalesce.limits import CoreLimits
from proxy.config.knobs import Settings
from proxy.listening.settings import ListenerSettings
from proxy.passthrough.settings import PassthroughSettings
from proxy.watch.settings import WatchSettings
from upstream.credentials import Credentials
from upstream.settings import HUB_BATCH_INTERVAL_S, ConnectionSettings, UpstreamSettings

REQUEST_OVERHEAD_BYTES: Final = 512 * 1024
"""What etcd accepts beyond --max-request-bytes (server/embed/config.go, grpcOverheadBytes)."""


def request_bytes_max(settings: Settings) -> int:
    """Return the size of a request that etcd accepts; it also splits responses into fragments from this size on."""
    return settings.upstream.max_request_bytes + REQUEST_OVERHEAD_BYTES


def core_limits(settings: Settings) -> CoreLimits:
    """Return the core's limits; they have the settings' names, except for five."""
    values = {field.name: getattr(settings.watch, field.name) for field in fields(settings.watch)}
    return CoreLimits(
        progress_notify_s=values.pop("watch_progress_notify_interval_s"),
        lagging_age_s_max=values.pop("lagging_age_s_max") or None,
        covers=tuple(prefix.encode() for prefix in values.pop("cover")),
        fragment_bytes=request_bytes_max(settings),
        upstream_has_limits=bool(settings.upstream.watch_endpoints),
        **values,
    )


def listener_settings(settings: Settings) -> ListenerSettings:
    """Return the listener's settings."""
    listener = settings.listener
    return ListenerSettings(
        http2=replace(ListenerSettings().http2, max_streams=listener.max_concurrent_streams),
        connections_max=listener.connections_max,
        keepalive_min_s=listener.grpc_keepalive_min_time_s or None,
        keepalive_interval_s=listener.grpc_keepalive_interval_s or None,
        keepalive_timeout_s=listener.grpc_keepalive_timeout_s,
    )


def upstream_settings(settings: Settings, is_hub: bool = False) -> UpstreamSettings:
    """Return the upstream side's settings; `is_hub`: of the hub of `--workers`."""
    upstream = settings.upstream
    return UpstreamSettings(
        connection=ConnectionSettings(
            keepalive_s=upstream.dial_keepalive_time_s,
            keepalive_timeout_s=upstream.dial_keepalive_timeout_s,
            batch_interval_s=HUB_BATCH_INTERVAL_S if is_hub else 0.0,
        ),
        connections_per_endpoint_max=upstream.connections_per_endpoint_max,
    )


def credentials(settings: Settings) -> Credentials | None:
    """Return the etcd user that owns the trunks; None if each trunk uses a client's token."""
    upstream = settings.upstream
    return Credentials(upstream.user, upstream.password) if upstream.user else None


def watch_settings(settings: Settings) -> WatchSettings:
    """Return the Watch service's settings."""
    return WatchSettings(
        request_bytes_max=request_bytes_max(settings),
        sessions_per_connection_max=settings.listener.sessions_per_connection_max,
        requests_waiting_bytes_max=settings.listener.requests_waiting_bytes_max,
    )


def passthrough_settings(settings: Settings) -> PassthroughSettings:
    """Return the settings of pass-through."""
    return PassthroughSettings(
        call_wait_s=settings.upstream.call_wait_s,
        share_reads=settings.upstream.share_reads,
        shared_reads_bytes_max=settings.upstream.shared_reads_bytes_max,
        translated_request_bytes_max=request_bytes_max(settings),
    )
