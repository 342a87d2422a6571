"""Every knob of the proxy: name, default, unit, flag, and what it trades for what. One place, read by all others.

The command line's options, the `WATCHMUX_*` variables, the configuration file and the commented example in
`configs/watchmux.toml` are all made from the structs below, so a knob is added by adding one field. Units stand last
in the names (`linger_s`, `history_bytes_max`). A number that limits nothing when 0 says so in its text.
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
from proxy.config.watch import Watch


@dataclass(frozen=True, kw_only=True, slots=True)
class UpstreamTable:
    """The etcd in front of which the proxy stands."""

    endpoints: Annotated[
        list[str],
        knob(
            "The etcd members, as HOST:PORT, http://HOST:PORT, https://HOST:PORT or unix:///PATH. Name all of them: "
            "the proxy moves on to the next when one fails. Without any, the bundled store is started and fronted.",
            Kind.ENDPOINTS,
            from_etcd=True,
        ),
    ] = field(default_factory=list)
    discovery_srv: Annotated[
        str,
        knob(
            "Find the members by the SRV records of this domain (_etcd-client-ssl._tcp, _etcd-client._tcp), once at "
            "the start; goes before --endpoints.",
            Kind.TEXT,
            from_etcd=True,
        ),
    ] = ""
    discovery_srv_name: Annotated[
        str,
        knob("Append this to the services looked up: _etcd-client-ssl-NAME._tcp.", Kind.TEXT, from_etcd=True),
    ] = ""
    insecure_discovery: Annotated[
        bool, knob("Take members without TLS from --discovery-srv as well.", Kind.SWITCH, from_etcd=True)
    ] = False
    cacert: Annotated[
        str, knob("CA bundle (PEM) that etcd's certificates are verified with.", Kind.FILE, from_etcd=True)
    ] = ""
    cert: Annotated[
        str,
        knob(
            "Certificate (PEM) to show to etcd. With etcd's auth on it must have no CN: etcd would take the CN as the "
            "user of every call that passes through.",
            Kind.FILE,
            from_etcd=True,
        ),
    ] = ""
    key: Annotated[str, knob("Private key (PEM) of --cert.", Kind.FILE, from_etcd=True)] = ""
    user: Annotated[
        str,
        knob(
            "A user of etcd in whose name shared watches are kept up when auth is on, so that they do not depend on "
            "the tokens of clients. It must be allowed to read what clients watch. Each client is still checked "
            "with its own token, and no call of a client is ever made in this name.",
            Kind.TEXT,
        ),
    ] = ""
    password: Annotated[
        str,
        knob(
            "The password of --user. Better given as WATCHMUX_PASSWORD or in the file: command lines can be read by "
            "everybody on the machine.",
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
            "Prefix the keys of all clients with this at etcd: their KV, Watch, Lease, Lock, Election calls see what "
            "is below it, nothing else. Other services (Maintenance, Auth, Cluster) pass untouched; HTTP/1 is refused.",
            Kind.TEXT,
            from_etcd=True,
        ),
    ] = ""
    dial_keepalive_time_s: Annotated[
        float,
        knob(
            "Ping etcd on a connection that was silent for so long; notices a dead host sooner when shorter, but etcd "
            "drops clients that ping more often than every 5 s. 0: never.",
            Kind.SECONDS,
            from_etcd=True,
            ge=0,
        ),
    ] = 10.0
    dial_keepalive_timeout_s: Annotated[
        float,
        knob(
            "Give a connection to etcd up when a ping stays unanswered for so long.",
            Kind.SECONDS,
            from_etcd=True,
            gt=0,
        ),
    ] = 5.0
    connect_timeout_s: Annotated[
        float,
        knob(
            "Give up connecting to a member (name, TCP and TLS together) after so long and try the next one.",
            Kind.SECONDS,
            gt=0,
            advanced=True,
        ),
    ] = 5.0
    connections_per_endpoint_max: Annotated[
        int,
        knob(
            "Connections to one member, for calls and for watches each. Another one is opened only when etcd (or what "
            "stands in front of it) limits the streams of a connection and these are used up.",
            Kind.COUNT,
            ge=1,
            advanced=True,
        ),
    ] = 100
    call_wait_s: Annotated[
        float,
        knob(
            "Hold calls for so long while no etcd can be reached, as etcd's own client does; those of clientv3 at most "
            "for a third of the time until their deadline. Then they are refused, and clientv3 tries its next "
            "endpoint: with several proxies a shorter time is better. 0: refuse at once.",
            Kind.SECONDS,
            ge=0,
        ),
    ] = 5.0
    watch_message_bytes_max: Annotated[
        int,
        knob(
            "How much of one revision is held for a watch until all of it has come from etcd: the events that one "
            "transaction or one range deletion has in a range. A larger one ends its watch.",
            Kind.BYTES,
            ge=1,
            advanced=True,
        ),
    ] = 512 * MIB
    max_request_bytes: Annotated[
        int,
        knob(
            "What etcd's own --max-request-bytes is set to. Watch requests, and under --namespace all requests, that "
            "are larger than this and 512 KiB are refused before they take memory here, as etcd refuses them.",
            Kind.BYTES,
            ge=1,
            advanced=True,
        ),
    ] = 1536 * KIB


@dataclass(frozen=True, kw_only=True, slots=True)
class ListenerTable:
    """Where clients connect."""

    listen_addr: Annotated[
        str,
        knob(
            "Where clients connect: HOST:PORT, :PORT for all interfaces, or unix:///PATH. Port 0: any free one, named "
            "in the log.",
            Kind.ADDRESS,
            from_etcd=True,
        ),
    ] = "127.0.0.1:23790"
    advertise_client_url: Annotated[
        str,
        knob(
            "Where clients shall connect: http://HOST:PORT, https://HOST:PORT or HOST:PORT. MemberList then shows it "
            "as the client URL of every member, so that clients which take their endpoints from the cluster "
            "(AutoSync, etcdctl --cluster) stay with the proxy; log and status show it too. Empty: etcd's own list.",
            Kind.CLIENT_URL,
            from_etcd=True,
        ),
    ] = ""
    cert_file: Annotated[
        str, knob("Serve TLS with this certificate (PEM, with its chain).", Kind.FILE, from_etcd=True)
    ] = ""
    key_file: Annotated[str, knob("Private key (PEM) of --cert-file.", Kind.FILE, from_etcd=True)] = ""
    trusted_ca_file: Annotated[
        str, knob("Ask clients for a certificate signed by this CA bundle (PEM).", Kind.FILE, from_etcd=True)
    ] = ""
    tls_min_version: Annotated[
        Literal["TLS1.2", "TLS1.3"],
        knob("Serve no older TLS than this. HTTP/2 wants 1.2 at least.", Kind.CHOICE, from_etcd=True, advanced=True),
    ] = "TLS1.2"
    max_concurrent_streams: Annotated[
        int,
        knob(
            "Streams (calls and watches) one connection may have open; more wait in the client. etcd's default is "
            "no limit; ours bounds what one client can cost.",
            Kind.COUNT,
            from_etcd=True,
            ge=1,
            le=2**32 - 1,
        ),
    ] = 100_000
    grpc_keepalive_min_time_s: Annotated[
        float,
        knob(
            "Send a client away (too_many_pings) that pings more often, as etcd does. 0: only floods are cut off.",
            Kind.SECONDS,
            from_etcd=True,
            ge=0,
        ),
    ] = 5.0
    grpc_keepalive_interval_s: Annotated[
        float,
        knob(
            "Ping a client that was silent for so long. 0: never.",
            Kind.SECONDS,
            from_etcd=True,
            ge=0,
        ),
    ] = 7200.0
    grpc_keepalive_timeout_s: Annotated[
        float,
        knob(
            "Close a client's connection when our ping stays unanswered for so long.",
            Kind.SECONDS,
            from_etcd=True,
            gt=0,
        ),
    ] = 20.0
    connections_max: Annotated[
        int,
        knob(
            "Client connections at a time; one more is told so and closed. Lowered at the start to what the limit of "
            "open files leaves.",
            Kind.COUNT,
            ge=1,
        ),
    ] = 20_000
    sessions_per_connection_max: Annotated[
        int,
        knob(
            "Watch streams on one connection; one more is refused with RESOURCE_EXHAUSTED.",
            Kind.COUNT,
            ge=1,
            advanced=True,
        ),
    ] = 10_000
    requests_waiting_bytes_max: Annotated[
        int,
        knob(
            "Watch requests of all clients that wait, for etcd or for their end; beyond it the stream with most of "
            "them ends with RESOURCE_EXHAUSTED.",
            Kind.BYTES,
            ge=1,
            advanced=True,
        ),
    ] = 256 * 1024 * 1024
    drain_s: Annotated[
        float,
        knob(
            "After SIGTERM or SIGINT, give open calls so long to end; watches are told to go elsewhere. A second "
            "signal ends at once.",
            Kind.SECONDS,
            ge=0,
        ),
    ] = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LogTable:
    """What is logged. Keys and values of clients never are."""

    log_level: Annotated[
        Literal["debug", "info", "warn", "error", "fatal"], knob("The least grave messages to log.", Kind.CHOICE)
    ] = "info"
    log_format: Annotated[
        Literal["auto", "console", "json"],
        knob("console: for people; json: one object a line; auto: console on a terminal, else json.", Kind.CHOICE),
    ] = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdminTable:
    """Watching the proxy itself."""

    metrics_addr: Annotated[
        str,
        knob(
            "Serve the status page, /metrics and health (/livez, /readyz, /health) here, in plain text. Port 0: any "
            "free one, named in the log. Empty: nowhere.",
            Kind.METRICS_ADDRESS,
            from_etcd=True,
        ),
    ] = ""
    probe_interval_s: Annotated[
        float,
        knob(
            "Watch through the proxy itself so often, without any upstream watch; after three times without an answer "
            "/livez and grpc.health.v1 say that it hangs. 0: never.",
            Kind.SECONDS,
            ge=0,
        ),
    ] = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """All knobs, by table of the configuration file."""

    upstream: UpstreamTable = field(default_factory=UpstreamTable)
    listener: ListenerTable = field(default_factory=ListenerTable)
    watch: Watch = field(default_factory=Watch)
    log: LogTable = field(default_factory=LogTable)
    admin: AdminTable = field(default_factory=AdminTable)


@dataclass(frozen=True)
class Knob:
    """One knob, as every reader of the settings needs it."""

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
        """What a knob of kind CHOICE may be; empty for the others."""
        return typing.get_args(typing.get_args(self.type)[0]) if self.kind is Kind.CHOICE else ()


def tables() -> dict[str, type]:
    """Return the tables of the configuration file, in its order."""
    return typing.get_type_hints(Settings)


@cache
def knobs() -> tuple[Knob, ...]:
    """Return every knob, in the order of the file."""
    return tuple(_walk())


def _walk() -> Iterator[Knob]:
    for table, struct in tables().items():
        annotated = typing.get_type_hints(struct, include_extras=True)
        for one in fields(struct):
            meta = typing.get_args(annotated[one.name])[1]
            about: About = (meta.extra or {})["about"]
            # `progress_retry_s_max` is --progress-retry-max: a duration's flag takes any unit.
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
