"""Every setting of the proxy: name, default, unit, bounds, help, and the metrics of those that are limits.

A setting is declared once, below. The command line's options, the `WATCHMUX_*` variables, the configuration file, the
example in `configs/watchmux.toml`, the settings that SIGHUP applies and the limits in the metrics follow from the
declaration. Defaults are those of the class that takes the setting; `proxy/config/applied.py` passes the values on.
Units come last in the names (`linger_s`, `history_bytes_max`), and the syntax of a value follows from its type and its
unit. If 0 disables a limit, its text says so.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal

from coalesce.limits import CoreLimits
from proxy.config.describing import KIB, SettingDescription, ValueSyntax, kind_of, knob
from proxy.config.values import ENV_PREFIX
from proxy.listening.settings import ListenerSettings
from proxy.passthrough.settings import PassthroughSettings
from proxy.watch.settings import WatchSettings
from upstream.settings import UpstreamSettings

_CORE = CoreLimits()
_LISTENER = ListenerSettings()
_UPSTREAM = UpstreamSettings()
_WATCH = WatchSettings()


@dataclass(frozen=True, kw_only=True, slots=True)
class UpstreamTable:
    """Connections to etcd."""

    endpoints: list[str] = knob(
        [],
        "Client endpoints of all etcd members: HOST:PORT, http://HOST:PORT, https://HOST:PORT or unix:///PATH. "
        "When one member fails, the proxy switches to the next. Not set: start the bundled store and proxy it.",
        from_etcd=True,
        reloaded=True,
    )
    bundled_store: bool = knob(
        True,
        "Start the bundled store if no endpoint is configured. It is for trying out watchmux: it keeps its data in "
        "memory only. false: without an endpoint, refuse to start.",
    )
    watch_endpoints: list[str] = knob(
        [],
        "Endpoints of other watchmux proxies in front of the same etcd, from which this proxy takes its watches "
        "instead of from --endpoints. etcd then serves one watch per range for each of those proxies, however many "
        "proxies take their watches from them. Calls, reads and permission checks still go to --endpoints. Not set: "
        "watches come from --endpoints too.",
        reloaded=True,
    )
    discovery_srv: str = knob(
        "",
        "DNS domain whose SRV records (_etcd-client-ssl._tcp, _etcd-client._tcp) name the endpoints; looked up "
        "once at start. Takes precedence over --endpoints.",
        from_etcd=True,
    )
    discovery_srv_name: str = knob(
        "",
        "Suffix of the SRV service names to look up: _etcd-client-ssl-NAME._tcp.",
        from_etcd=True,
    )
    insecure_discovery: bool = knob(
        False,
        "Accept endpoints without TLS from --discovery-srv.",
        from_etcd=True,
    )
    cacert: str = knob(
        "",
        "CA bundle (PEM) to verify etcd's certificates with.",
        ValueSyntax.FILE,
        from_etcd=True,
    )
    cert: str = knob(
        "",
        "Client certificate (PEM) to present to etcd. If auth is enabled in etcd, the certificate must have no CN: "
        "etcd would take the CN as the user of every call that passes through.",
        ValueSyntax.FILE,
        from_etcd=True,
    )
    key: str = knob(
        "",
        "Private key (PEM) of --cert.",
        ValueSyntax.FILE,
        from_etcd=True,
    )
    user: str = knob(
        "",
        "etcd user that owns the shared upstream watches when auth is enabled, so that they do not depend on the "
        "clients' tokens. It must be allowed to read everything that clients watch. Each client is still checked "
        "with its own token, and no client call is ever made as this user.",
    )
    password: str = knob(
        "",
        "Password of --user. Prefer WATCHMUX_PASSWORD or the configuration file: every user of the machine can "
        "read command lines.",
    )
    insecure_skip_tls_verify: bool = knob(
        False,
        "Do not verify etcd's certificates. For tests only.",
        from_etcd=True,
    )
    namespace: str = knob(
        "",
        "Prefix the keys of all clients with this at etcd: KV, Watch, Lease, Lock and Election calls see only the "
        "keys below it. Other services (Maintenance, Auth, Cluster) pass through unchanged; HTTP/1 is refused.",
        from_etcd=True,
    )
    dial_keepalive_time_s: float = knob(
        _UPSTREAM.connection.keepalive_s,
        "Send an HTTP/2 PING to etcd after this time without data on a connection. A shorter time detects a dead "
        "host sooner, but etcd closes connections that ping more often than every 5 s. 0 disables it.",
        from_etcd=True,
        ge=0,
    )
    dial_keepalive_timeout_s: float = knob(
        _UPSTREAM.connection.keepalive_timeout_s,
        "Close a connection to etcd if a PING is not answered within this time.",
        from_etcd=True,
        gt=0,
    )
    connections_per_endpoint_max: int = knob(
        _UPSTREAM.connections_per_endpoint_max,
        "Maximum connections to one member, for calls and for watches each. The proxy opens another one only when "
        "etcd (or a load balancer in front of it) limits the streams of a connection and all of them are in use.",
        ge=1,
        used="upstream_connections",
        reached="upstream_streams_waiting",
    )
    call_wait_s: float = knob(
        PassthroughSettings().call_wait_s,
        "How long to hold calls while no etcd is reachable, as etcd's own client does; calls of clientv3 at most "
        "for a third of the time left until their deadline. After that they fail, and clientv3 tries its next "
        "endpoint: with several proxies, use a shorter time. 0: fail at once.",
        ge=0,
        reloaded=True,
    )
    share_reads: bool = knob(
        PassthroughSettings().share_reads,
        "Answer identical Range calls (same request, same token) that are in flight at the same time by one call to "
        "etcd that begins after all of them have arrived. Nothing is cached: linearizable reads stay linearizable.",
        reloaded=True,
    )
    shared_reads_bytes_max: int = knob(
        PassthroughSettings().shared_reads_bytes_max,
        "Maximum total size of the answers that Range calls share, each kept until the slowest of its clients has read "
        "it. Calls beyond it are passed through one by one.",
        ge=0,
        reloaded=True,
        used="shared_reads_bytes",
        reached="range_calls_not_shared_total",
    )
    max_request_bytes: int = knob(
        1536 * KIB,
        "The value of etcd's own --max-request-bytes. Watch requests (with --namespace: all requests) larger than "
        "this plus 512 KiB are refused before they use memory in the proxy, as etcd refuses them.",
        ge=1,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ListenerTable:
    """Client connections."""

    listen_addr: str = knob(
        "127.0.0.1:23790",
        "Address to listen on for clients: HOST:PORT, :PORT (all interfaces) or unix:///PATH. Port 0: any free "
        "port; the log shows it.",
        ValueSyntax.ADDRESS,
        from_etcd=True,
    )
    workers: int = knob(
        1,
        "Number of processes that serve clients; 0: one for each core. With more than one, a further process (the hub) "
        "holds the upstream watches, and the kernel distributes the client connections over the workers. Each adds at "
        "most 30 MiB of memory.",
        ge=0,
        le=1024,
    )
    advertise_client_url: str = knob(
        "",
        "URL to advertise to clients: http://HOST:PORT, https://HOST:PORT or HOST:PORT. MemberList returns it as "
        "the client URL of every member, so that clients that take their endpoints from the cluster (AutoSync, "
        "etcdctl --cluster) stay on the proxy; the log and the status show it too. Not set: MemberList "
        "returns etcd's own list.",
        ValueSyntax.CLIENT_URL,
        from_etcd=True,
    )
    cert_file: str = knob(
        "",
        "Server certificate (PEM, with its chain); enables TLS for clients.",
        ValueSyntax.FILE,
        from_etcd=True,
    )
    key_file: str = knob(
        "",
        "Private key (PEM) of --cert-file.",
        ValueSyntax.FILE,
        from_etcd=True,
    )
    trusted_ca_file: str = knob(
        "",
        "CA bundle (PEM); clients must present a certificate signed by one of these CAs.",
        ValueSyntax.FILE,
        from_etcd=True,
    )
    tls_min_version: Literal["TLS1.2", "TLS1.3"] = knob(
        "TLS1.2",
        "Minimum TLS version for clients. HTTP/2 requires TLS 1.2.",
        from_etcd=True,
    )
    max_concurrent_streams: int = knob(
        _LISTENER.http2.max_streams,
        "Maximum concurrent streams (calls and watches) on one client connection; the client queues further ones. "
        "etcd has no limit by default; this one bounds the cost of one client.",
        from_etcd=True,
        ge=1,
        le=2**32 - 1,
        reloaded=True,
        used="connection_streams",
        reached="refusals_total",
    )
    grpc_keepalive_min_time_s: float = knob(
        _LISTENER.keepalive_min_s,
        "Close connections whose client pings more often than this (GOAWAY too_many_pings), as etcd does. 0 "
        "disables the check, except for floods.",
        from_etcd=True,
        ge=0,
        reloaded=True,
    )
    grpc_keepalive_interval_s: float = knob(
        _LISTENER.keepalive_interval_s,
        "Send an HTTP/2 PING to a client after this time without data from it. 0 disables it.",
        from_etcd=True,
        ge=0,
        reloaded=True,
    )
    grpc_keepalive_timeout_s: float = knob(
        _LISTENER.keepalive_timeout_s,
        "Close a client connection if the proxy's PING is not answered within this time.",
        from_etcd=True,
        gt=0,
        reloaded=True,
    )
    connections_max: int = knob(
        _LISTENER.connections_max,
        "Maximum concurrent client connections; further ones get GOAWAY and are closed. Lowered at start to what "
        "the limit of open files allows.",
        ge=1,
        reloaded=True,
        used="connections",
        reached="refusals_total",
    )
    sessions_per_connection_max: int = knob(
        _WATCH.sessions_per_connection_max,
        "Maximum watch streams on one client connection; further ones are refused with RESOURCE_EXHAUSTED.",
        ge=1,
        reloaded=True,
        used="connection_sessions",
        reached="refusals_total",
    )
    requests_waiting_bytes_max: int = knob(
        _WATCH.requests_waiting_bytes_max,
        "Maximum total size of pending watch requests (incomplete, or waiting for etcd) of all clients. Above it, "
        "the stream with the most pending bytes ends with RESOURCE_EXHAUSTED.",
        ge=1,
        reloaded=True,
        used="requests_waiting_bytes",
        reached="refusals_total",
    )
    drain_s: float = knob(
        10.0,
        "Grace period for open calls after SIGTERM or SIGINT; watches end with UNAVAILABLE during its first half, "
        "so that clients reconnect elsewhere. A second signal stops the proxy at once.",
        ge=0,
        reloaded=True,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchTable:
    """Watch sharing: history, limits and progress."""

    cover: list[str] = knob(
        [],
        "Serve all watches of keys and ranges with this prefix from one upstream watch of the prefix; may be repeated. "
        "For many clients that each watch keys of their own. With --namespace the prefix is that of the clients' keys. "
        'An empty prefix covers all keys; in the file: cover = ["/services/"]. If etcd has auth enabled, --user must '
        "be allowed to read the prefix.",
        ValueSyntax.PREFIXES,
        reloaded=True,
    )
    linger_s: float = knob(
        _CORE.linger_s,
        "How long to keep the upstream watch of a range after its last client watch has ended. Longer: fewer watch "
        "creations at etcd when clients come and go. Shorter: fewer idle watches at etcd.",
        ge=0,
        reloaded=True,
    )
    history_linger_s: float = knob(
        _CORE.history_linger_s,
        "How long to keep the recent events of a range after its upstream watch was closed; a client that returns "
        "within this time continues from them. 0 disables it.",
        ge=0,
        reloaded=True,
        used="parked",
        reached="evictions_total",
    )
    watch_progress_notify_interval_s: float = knob(
        _CORE.progress_notify_s,
        "Maximum interval of progress notifications for idle watches that requested progress_notify. They always "
        "get them at etcd's own interval; this setting can only make them more frequent.",
        gt=0,
        from_etcd=True,
    )
    history_bytes_total_max: int = knob(
        _CORE.history_bytes_total_max,
        "Memory for the recent events of all ranges. Watches that start in the past or lag behind are served from "
        "it, without etcd; the oldest events are evicted first.",
        ge=0,
        reloaded=True,
        used="history_bytes",
        reached="evictions_total",
    )
    history_bytes_max: int = knob(
        _CORE.history_bytes_max,
        "Memory for the recent events of one range. More memory serves older start revisions without a separate "
        "watch at etcd.",
        ge=0,
        reloaded=True,
        used="history_bytes",
        reached="evictions_total",
    )
    history_revisions_max: int = knob(
        _CORE.history_revisions_max,
        "Maximum revisions kept for one range; bounds the overhead of many small events.",
        ge=1,
        reloaded=True,
        used="history_batches",
        reached="evictions_total",
    )
    history_age_s: float = knob(
        _CORE.history_age_s,
        "Maximum age of kept events; frees the memory of ranges that are no longer busy.",
        ge=0,
        reloaded=True,
        used="history_batches",
        reached="evictions_total",
    )
    lagging_age_s_max: float = knob(
        0.0,
        "End the stream of a client that has lagged without interruption for longer than this. 0: never (a slow "
        "client does not affect others).",
        ge=0,
        reloaded=True,
        used="lagging_s",
        reached="refusals_total",
    )
    watches_max: int = knob(
        _CORE.watches_max,
        "Maximum watches of all clients; further ones are refused. A watch costs about 0.5 KiB.",
        ge=1,
        reloaded=True,
        used="watches",
        reached="refusals_total",
    )
    watches_per_session_max: int = knob(
        _CORE.watches_per_session_max,
        "Maximum watches on one stream; further ones are refused.",
        ge=1,
        reloaded=True,
        used="watches",
        reached="refusals_total",
    )
    trunks_max: int = knob(
        _CORE.trunks_max,
        "Maximum distinct ranges watched at etcd; a watch that needs another one is refused.",
        ge=1,
        reloaded=True,
        used="trunks",
        reached="refusals_total",
    )
    backfills_max: int = knob(
        _CORE.backfills_max,
        "Maximum concurrent catch-up watches (backfills) at etcd; watches that need another one wait. More: "
        "clients with old start revisions catch up faster, at the cost of one stream at etcd each.",
        ge=1,
        used="backfills",
        reached="queued",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LogTable:
    """Logging (keys and values of clients are never logged)."""

    log_level: Literal["debug", "info", "warn", "error", "fatal"] = knob(
        "info",
        "Minimum log level.",
        reloaded=True,
    )
    log_format: Literal["auto", "console", "json"] = knob(
        "auto",
        "Log format. console: human-readable; json: one object per line; auto: console on a terminal, otherwise json.",
        reloaded=True,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdminTable:
    """Monitoring of the proxy itself."""

    metrics_addr: str = knob(
        "",
        "Address of the plain-text HTTP server for the status page, /metrics and health checks (/livez, /readyz, "
        "/health). Port 0: any free port; the log shows it. Not set: disabled.",
        ValueSyntax.METRICS_ADDRESS,
        from_etcd=True,
    )
    probe_interval_s: float = knob(
        5.0,
        "Interval of the self-probe: a watch that the proxy requests from itself and refuses. After three "
        "unanswered probes, /livez and grpc.health.v1 report that the proxy hangs. 0 disables it.",
        ge=0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """All settings, by table of the configuration file."""

    upstream: UpstreamTable = field(default_factory=UpstreamTable)
    listener: ListenerTable = field(default_factory=ListenerTable)
    watch: WatchTable = field(default_factory=WatchTable)
    log: LogTable = field(default_factory=LogTable)
    admin: AdminTable = field(default_factory=AdminTable)


@dataclass(frozen=True)
class Knob:
    """One setting, for the command line, the file and the documentation."""

    table: str
    key: str
    flag: str
    env: str
    kind: ValueSyntax
    default: Any
    type: Any
    about: SettingDescription

    @property
    def path(self) -> str:
        """Its name in the file: `table.key`."""
        return f"{self.table}.{self.key}"

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values of a setting of kind CHOICE; empty for other kinds."""
        return typing.get_args(self.type) if self.kind is ValueSyntax.CHOICE else ()

    def of(self, settings: Settings) -> Any:
        """Return its value in `settings`."""
        return getattr(getattr(settings, self.table), self.key)


def tables() -> dict[str, type]:
    """Return the tables of the configuration file, in its order."""
    return typing.get_type_hints(Settings)


@cache
def knobs() -> tuple[Knob, ...]:
    """Return every setting, in the order of the file."""
    return tuple(_walk())


def _walk() -> Iterator[Knob]:
    for table, struct in tables().items():
        types, defaults = typing.get_type_hints(struct), struct()
        for one in fields(struct):
            about: SettingDescription = one.metadata["about"]
            kind = about.kind or kind_of(one.name, types[one.name])
            # `lagging_age_s_max` becomes --lagging-age-max: a duration flag accepts any unit.
            name = re.sub(r"_s(?=_|$)", "", one.name) if kind is ValueSyntax.SECONDS else one.name
            yield Knob(
                table=table,
                key=one.name,
                flag="--" + name.replace("_", "-"),
                env=ENV_PREFIX + name.upper(),
                kind=kind,
                default=getattr(defaults, one.name),
                type=types[one.name],
                about=about,
            )


def reloaded() -> frozenset[str]:
    """Return the settings that a running proxy applies on SIGHUP, as `table.key`."""
    return frozenset(knob.path for knob in knobs() if knob.about.reloaded)


def limits(settings: Settings) -> dict[str, float]:
    """Return the settings that are limits, by key; 0 means no limit."""
    return {knob.key: knob.of(settings) for knob in knobs() if knob.about.reached}
