"""Every setting of the proxy: name, default, unit, flag, trade-off.

The command line's options, the `WATCHMUX_*` variables, the configuration file and the commented example in
`configs/watchmux.toml` are all generated from the structs below. A new limit also needs a field in the settings class
that takes it, a metric and a test: see ARCHITECTURE.md, "Where to change what". Units come last in the names
(`linger_s`, `history_bytes_max`). If 0 disables a limit, its text says so.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Annotated, Any, Literal

from proxy.config.describing import KIB, MIB, About, Kind, knob
from proxy.config.values import ENV_PREFIX
from proxy.config.watch import WatchTable


@dataclass(frozen=True, kw_only=True, slots=True)
class UpstreamTable:
    """Connections to etcd."""

    endpoints: Annotated[
        list[str],
        knob(
            "Client endpoints of all etcd members: HOST:PORT, http://HOST:PORT, https://HOST:PORT or unix:///PATH. "
            "When one member fails, the proxy switches to the next. Empty: start the bundled store and proxy it.",
            Kind.ENDPOINTS,
            from_etcd=True,
        ),
    ] = field(default_factory=list)
    discovery_srv: Annotated[
        str,
        knob(
            "DNS domain whose SRV records (_etcd-client-ssl._tcp, _etcd-client._tcp) name the endpoints; looked up "
            "once at start. Takes precedence over --endpoints.",
            Kind.TEXT,
            from_etcd=True,
        ),
    ] = ""
    discovery_srv_name: Annotated[
        str,
        knob("Suffix of the SRV service names to look up: _etcd-client-ssl-NAME._tcp.", Kind.TEXT, from_etcd=True),
    ] = ""
    insecure_discovery: Annotated[
        bool, knob("Accept endpoints without TLS from --discovery-srv.", Kind.SWITCH, from_etcd=True)
    ] = False
    cacert: Annotated[str, knob("CA bundle (PEM) to verify etcd's certificates with.", Kind.FILE, from_etcd=True)] = ""
    cert: Annotated[
        str,
        knob(
            "Client certificate (PEM) to present to etcd. If auth is enabled in etcd, the certificate must have no "
            "CN: etcd would take the CN as the user of every call that passes through.",
            Kind.FILE,
            from_etcd=True,
        ),
    ] = ""
    key: Annotated[str, knob("Private key (PEM) of --cert.", Kind.FILE, from_etcd=True)] = ""
    user: Annotated[
        str,
        knob(
            "etcd user that owns the shared upstream watches when auth is enabled, so that they do not depend on the "
            "clients' tokens. It must be allowed to read everything that clients watch. Each client is still checked "
            "with its own token, and no client call is ever made as this user.",
            Kind.TEXT,
        ),
    ] = ""
    password: Annotated[
        str,
        knob(
            "Password of --user. Prefer WATCHMUX_PASSWORD or the configuration file: every user of the machine can "
            "read command lines.",
            Kind.TEXT,
        ),
    ] = ""
    insecure_skip_tls_verify: Annotated[
        bool,
        knob("Do not verify etcd's certificates. For tests only.", Kind.SWITCH, from_etcd=True),
    ] = False
    namespace: Annotated[
        str,
        knob(
            "Prefix the keys of all clients with this at etcd: KV, Watch, Lease, Lock and Election calls see only the "
            "keys below it. Other services (Maintenance, Auth, Cluster) pass through unchanged; HTTP/1 is refused.",
            Kind.TEXT,
            from_etcd=True,
        ),
    ] = ""
    dial_keepalive_time_s: Annotated[
        float,
        knob(
            "Send an HTTP/2 PING to etcd after this time without data on a connection. A shorter time detects a dead "
            "host sooner, but etcd closes connections that ping more often than every 5 s. 0 disables it.",
            Kind.SECONDS,
            from_etcd=True,
            ge=0,
        ),
    ] = 10.0
    dial_keepalive_timeout_s: Annotated[
        float,
        knob(
            "Close a connection to etcd if a PING is not answered within this time.",
            Kind.SECONDS,
            from_etcd=True,
            gt=0,
        ),
    ] = 5.0
    connect_timeout_s: Annotated[
        float,
        knob(
            "Timeout for connecting to a member (DNS, TCP and TLS together); then the next member is tried.",
            Kind.SECONDS,
            gt=0,
            advanced=True,
        ),
    ] = 5.0
    connections_per_endpoint_max: Annotated[
        int,
        knob(
            "Maximum connections to one member, for calls and for watches each. The proxy opens another one only when "
            "etcd (or a load balancer in front of it) limits the streams of a connection and all of them are in use.",
            Kind.COUNT,
            ge=1,
            advanced=True,
        ),
    ] = 100
    call_wait_s: Annotated[
        float,
        knob(
            "How long to hold calls while no etcd is reachable, as etcd's own client does; calls of clientv3 at most "
            "for a third of the time left until their deadline. After that they fail, and clientv3 tries its next "
            "endpoint: with several proxies, use a shorter time. 0: fail at once.",
            Kind.SECONDS,
            ge=0,
        ),
    ] = 5.0
    watch_message_bytes_max: Annotated[
        int,
        knob(
            "Maximum size of one revision of an upstream watch, buffered until all its fragments have arrived: the "
            "events of one transaction or one range deletion within a range. A larger revision ends its watch.",
            Kind.BYTES,
            ge=1,
            advanced=True,
        ),
    ] = 512 * MIB
    max_request_bytes: Annotated[
        int,
        knob(
            "The value of etcd's own --max-request-bytes. Watch requests (with --namespace: all requests) larger than "
            "this plus 512 KiB are refused before they use memory in the proxy, as etcd refuses them.",
            Kind.BYTES,
            ge=1,
            advanced=True,
        ),
    ] = 1536 * KIB


@dataclass(frozen=True, kw_only=True, slots=True)
class ListenerTable:
    """Client connections."""

    listen_addr: Annotated[
        str,
        knob(
            "Address to listen on for clients: HOST:PORT, :PORT (all interfaces) or unix:///PATH. Port 0: any free "
            "port; the log shows it.",
            Kind.ADDRESS,
            from_etcd=True,
        ),
    ] = "127.0.0.1:23790"
    advertise_client_url: Annotated[
        str,
        knob(
            "URL to advertise to clients: http://HOST:PORT, https://HOST:PORT or HOST:PORT. MemberList returns it as "
            "the client URL of every member, so that clients that take their endpoints from the cluster (AutoSync, "
            "etcdctl --cluster) stay on the proxy; the log and the status show it too. Empty: MemberList returns "
            "etcd's own list.",
            Kind.CLIENT_URL,
            from_etcd=True,
        ),
    ] = ""
    cert_file: Annotated[
        str, knob("Server certificate (PEM, with its chain); enables TLS for clients.", Kind.FILE, from_etcd=True)
    ] = ""
    key_file: Annotated[str, knob("Private key (PEM) of --cert-file.", Kind.FILE, from_etcd=True)] = ""
    trusted_ca_file: Annotated[
        str,
        knob(
            "CA bundle (PEM); clients must present a certificate signed by one of these CAs.", Kind.FILE, from_etcd=True
        ),
    ] = ""
    tls_min_version: Annotated[
        Literal["TLS1.2", "TLS1.3"],
        knob("Minimum TLS version for clients. HTTP/2 requires TLS 1.2.", Kind.CHOICE, from_etcd=True, advanced=True),
    ] = "TLS1.2"
    max_concurrent_streams: Annotated[
        int,
        knob(
            "Maximum concurrent streams (calls and watches) on one client connection; the client queues further ones. "
            "etcd has no limit by default; this one bounds the cost of one client.",
            Kind.COUNT,
            from_etcd=True,
            ge=1,
            le=2**32 - 1,
        ),
    ] = 100_000
    grpc_keepalive_min_time_s: Annotated[
        float,
        knob(
            "Close connections whose client pings more often than this (GOAWAY too_many_pings), as etcd does. 0 "
            "disables the check, except for floods.",
            Kind.SECONDS,
            from_etcd=True,
            ge=0,
        ),
    ] = 5.0
    grpc_keepalive_interval_s: Annotated[
        float,
        knob(
            "Send an HTTP/2 PING to a client after this time without data from it. 0 disables it.",
            Kind.SECONDS,
            from_etcd=True,
            ge=0,
        ),
    ] = 7200.0
    grpc_keepalive_timeout_s: Annotated[
        float,
        knob(
            "Close a client connection if the proxy's PING is not answered within this time.",
            Kind.SECONDS,
            from_etcd=True,
            gt=0,
        ),
    ] = 20.0
    connections_max: Annotated[
        int,
        knob(
            "Maximum concurrent client connections; further ones get GOAWAY and are closed. Lowered at start to what "
            "the limit of open files allows.",
            Kind.COUNT,
            ge=1,
        ),
    ] = 20_000
    sessions_per_connection_max: Annotated[
        int,
        knob(
            "Maximum watch streams on one client connection; further ones are refused with RESOURCE_EXHAUSTED.",
            Kind.COUNT,
            ge=1,
            advanced=True,
        ),
    ] = 10_000
    requests_waiting_bytes_max: Annotated[
        int,
        knob(
            "Maximum total size of pending watch requests (incomplete, or waiting for etcd) of all clients. Above it, "
            "the stream with the most pending bytes ends with RESOURCE_EXHAUSTED.",
            Kind.BYTES,
            ge=1,
            advanced=True,
        ),
    ] = 256 * 1024 * 1024
    drain_s: Annotated[
        float,
        knob(
            "Grace period for open calls after SIGTERM or SIGINT; watches end with UNAVAILABLE during its first "
            "half, so that clients reconnect elsewhere. A second signal stops the proxy at once.",
            Kind.SECONDS,
            ge=0,
        ),
    ] = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LogTable:
    """Logging (keys and values of clients are never logged)."""

    log_level: Annotated[
        Literal["debug", "info", "warn", "error", "fatal"], knob("Minimum log level.", Kind.CHOICE)
    ] = "info"
    log_format: Annotated[
        Literal["auto", "console", "json"],
        knob(
            "Log format. console: human-readable; json: one object per line; auto: console on a terminal, otherwise "
            "json.",
            Kind.CHOICE,
        ),
    ] = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdminTable:
    """Monitoring of the proxy itself."""

    metrics_addr: Annotated[
        str,
        knob(
            "Address of the plain-text HTTP server for the status page, /metrics and health checks (/livez, /readyz, "
            "/health). Port 0: any free port; the log shows it. Empty: disabled.",
            Kind.METRICS_ADDRESS,
            from_etcd=True,
        ),
    ] = ""
    probe_interval_s: Annotated[
        float,
        knob(
            "Interval of the self-probe: a watch through the proxy itself, without an upstream watch. After three "
            "unanswered probes, /livez and grpc.health.v1 report that the proxy hangs. 0 disables it.",
            Kind.SECONDS,
            ge=0,
        ),
    ] = 5.0


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
    """The description of one setting, for the command line, the file and the documentation."""

    table: str
    key: str
    flag: str
    env: str
    kind: Kind
    default: Any
    type: Any
    text: str
    from_etcd: bool
    advanced: bool

    @property
    def path(self) -> str:
        """Its name in the file: `table.key`."""
        return f"{self.table}.{self.key}"

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values of a setting of kind CHOICE; empty for other kinds."""
        return typing.get_args(typing.get_args(self.type)[0]) if self.kind is Kind.CHOICE else ()


def tables() -> dict[str, type]:
    """Return the tables of the configuration file, in its order."""
    return typing.get_type_hints(Settings)


@cache
def knobs() -> tuple[Knob, ...]:
    """Return every setting, in the order of the file."""
    return tuple(_walk())


def _walk() -> Iterator[Knob]:
    for table, struct in tables().items():
        annotated = typing.get_type_hints(struct, include_extras=True)
        for one in fields(struct):
            meta = typing.get_args(annotated[one.name])[1]
            about: About = (meta.extra or {})["about"]
            # `progress_retry_s_max` becomes --progress-retry-max: a duration flag accepts any unit.
            name = re.sub(r"_s(?=_|$)", "", one.name) if about.kind is Kind.SECONDS else one.name
            yield Knob(
                table=table,
                key=one.name,
                flag="--" + name.replace("_", "-"),
                env=ENV_PREFIX + name.upper(),
                kind=about.kind,
                default=[] if about.kind is Kind.ENDPOINTS else one.default,
                type=annotated[one.name],
                text=meta.description or "",
                from_etcd=about.from_etcd,
                advanced=about.advanced,
            )
