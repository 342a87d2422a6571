"""Every knob of the proxy: name, default, unit, flag, and what it trades for what. One place, read by all others.

The command line's options, the `WATCHMUX_*` variables, the configuration file and the commented example in
`configs/watchmux.toml` are all made from the structs below, so a knob is added by adding one field. Units stand last in
the names (`linger_s`, `history_bytes_max`). A number that limits nothing when 0 says so in its text.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal

import msgspec

ENV_PREFIX = "WATCHMUX_"
KIB = 1024
MIB = 1024 * KIB


class Kind(Enum):
    """How a knob is written in a flag and in the file."""

    TEXT = "text"
    FILE = "file"
    ADDRESS = "HOST:PORT"
    METRICS_ADDRESS = "HOST:PORT or URL"
    ENDPOINTS = "comma-separated"
    SWITCH = "switch"
    COUNT = "number"
    BYTES = "size"
    SECONDS = "duration"
    CHOICE = "choice"


class _About(msgspec.Struct, frozen=True):
    kind: Kind
    from_etcd: bool
    advanced: bool


def _knob(
    text: str,
    kind: Kind,
    *,
    from_etcd: bool = False,
    advanced: bool = False,
    **bounds: float,
) -> Any:
    """Describe a field: `from_etcd` if etcd grpc-proxy has the same flag, `advanced` if it is left out of --help.

    `bounds` are msgspec's ge, gt and le.
    """
    extra = {"about": _About(kind, from_etcd, advanced)}
    constraints: dict[str, Any] = dict(bounds)
    return msgspec.Meta(description=text, extra=extra, **constraints)


class Upstream(msgspec.Struct, kw_only=True, frozen=True):
    """The etcd in front of which the proxy stands."""

    endpoints: Annotated[
        list[str],
        _knob(
            "The etcd members, as HOST:PORT, http://HOST:PORT or https://HOST:PORT. Name all of them: the proxy moves "
            "on to the next when one fails. Without any, the bundled store is started and fronted.",
            Kind.ENDPOINTS,
            from_etcd=True,
        ),
    ] = msgspec.field(default_factory=list)
    cacert: Annotated[
        str, _knob("CA bundle (PEM) that etcd's certificates are verified with.", Kind.FILE, from_etcd=True)
    ] = ""
    cert: Annotated[
        str,
        _knob(
            "Certificate (PEM) to show to etcd. With etcd's auth on it must have no CN: etcd would take the CN as the "
            "user of every call that passes through.",
            Kind.FILE,
            from_etcd=True,
        ),
    ] = ""
    key: Annotated[str, _knob("Private key (PEM) of --cert.", Kind.FILE, from_etcd=True)] = ""
    insecure_skip_tls_verify: Annotated[
        bool,
        _knob("Do not verify etcd's certificates. For tests only.", Kind.SWITCH, from_etcd=True),
    ] = False
    dial_keepalive_time_s: Annotated[
        float,
        _knob(
            "Ping etcd on a connection that was silent for so long; notices a dead host sooner when shorter, but etcd "
            "drops clients that ping more often than every 5 s. 0: never.",
            Kind.SECONDS,
            from_etcd=True,
            ge=0,
        ),
    ] = 10.0
    dial_keepalive_timeout_s: Annotated[
        float,
        _knob(
            "Give a connection to etcd up when a ping stays unanswered for so long.",
            Kind.SECONDS,
            from_etcd=True,
            gt=0,
        ),
    ] = 20.0


class Listener(msgspec.Struct, kw_only=True, frozen=True):
    """Where clients connect."""

    listen_addr: Annotated[
        str,
        _knob("Where clients connect. Port 0: any free one, named in the log.", Kind.ADDRESS, from_etcd=True),
    ] = "127.0.0.1:23790"
    advertise_client_url: Annotated[
        str,
        _knob(
            "The address clients should use, where it differs from --listen-addr; shown in the log and in the status.",
            Kind.TEXT,
            from_etcd=True,
        ),
    ] = ""
    cert_file: Annotated[
        str, _knob("Serve TLS with this certificate (PEM, with its chain).", Kind.FILE, from_etcd=True)
    ] = ""
    key_file: Annotated[str, _knob("Private key (PEM) of --cert-file.", Kind.FILE, from_etcd=True)] = ""
    trusted_ca_file: Annotated[
        str, _knob("Ask clients for a certificate signed by this CA bundle (PEM).", Kind.FILE, from_etcd=True)
    ] = ""
    max_concurrent_streams: Annotated[
        int,
        _knob(
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
        _knob(
            "A client that pings more often than this is sent away (GOAWAY, too_many_pings). 0: never.",
            Kind.SECONDS,
            from_etcd=True,
            ge=0,
        ),
    ] = 5.0
    grpc_keepalive_interval_s: Annotated[
        float,
        _knob(
            "Ping a client that was silent for so long. 0: never.",
            Kind.SECONDS,
            from_etcd=True,
            ge=0,
        ),
    ] = 7200.0
    grpc_keepalive_timeout_s: Annotated[
        float,
        _knob(
            "Close a client's connection when our ping stays unanswered for so long.",
            Kind.SECONDS,
            from_etcd=True,
            gt=0,
        ),
    ] = 20.0
    drain_s: Annotated[
        float,
        _knob(
            "After SIGTERM or SIGINT, give open calls so long to end; watches are told to go elsewhere. A second "
            "signal ends at once.",
            Kind.SECONDS,
            ge=0,
        ),
    ] = 10.0


class Watch(msgspec.Struct, kw_only=True, frozen=True):
    """Sharing watches: how long, how much, and for whom."""

    linger_s: Annotated[
        float,
        _knob(
            "Keep the upstream watch of a range open so long after its last client left. Longer: a client that comes "
            "back finds its history; shorter: etcd is rid of the watch sooner.",
            Kind.SECONDS,
            ge=0,
        ),
    ] = 2.0
    watch_progress_notify_interval_s: Annotated[
        float,
        _knob(
            "Tell quiet watches that asked for progress_notify how far they are, this often.",
            Kind.SECONDS,
            from_etcd=True,
            gt=0,
        ),
    ] = 600.0


class Log(msgspec.Struct, kw_only=True, frozen=True):
    """What is logged. Keys and values of clients never are."""

    log_level: Annotated[
        Literal["debug", "info", "warn", "error"], _knob("The least grave messages to log.", Kind.CHOICE)
    ] = "info"
    log_format: Annotated[
        Literal["auto", "console", "json"],
        _knob("console: for people; json: one object a line; auto: console on a terminal, else json.", Kind.CHOICE),
    ] = "auto"


class Admin(msgspec.Struct, kw_only=True, frozen=True):
    """Watching the proxy itself."""

    metrics_addr: Annotated[
        str,
        _knob(
            "Serve /metrics, /health and /v1/status here, in plain text. Port 0: any free one, named in the log. "
            "Empty: nowhere.",
            Kind.METRICS_ADDRESS,
            from_etcd=True,
        ),
    ] = ""


class Settings(msgspec.Struct, kw_only=True, frozen=True):
    """All knobs, by table of the configuration file."""

    upstream: Upstream = msgspec.field(default_factory=Upstream)
    listener: Listener = msgspec.field(default_factory=Listener)
    watch: Watch = msgspec.field(default_factory=Watch)
    log: Log = msgspec.field(default_factory=Log)
    admin: Admin = msgspec.field(default_factory=Admin)


class Knob(msgspec.Struct, frozen=True):
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


def tables() -> dict[str, type[msgspec.Struct]]:
    """Return the tables of the configuration file, in its order."""
    return {field.name: field.type for field in msgspec.structs.fields(Settings)}


@cache
def knobs() -> tuple[Knob, ...]:
    """Return every knob, in the order of the file."""
    return tuple(_walk())


def _walk() -> Iterator[Knob]:
    for table, struct in tables().items():
        annotated = typing.get_type_hints(struct, include_extras=True)
        for field in msgspec.structs.fields(struct):
            meta = next(part for part in typing.get_args(annotated[field.name]) if isinstance(part, msgspec.Meta))
            about: _About = (meta.extra or {})["about"]
            name = field.name.removesuffix("_s") if about.kind is Kind.SECONDS else field.name
            yield Knob(
                table=table,
                key=field.name,
                flag="--" + name.replace("_", "-"),
                env=ENV_PREFIX + name.upper(),
                kind=about.kind,
                default=[] if about.kind is Kind.ENDPOINTS else field.default,
                type=annotated[field.name],
                text=meta.description or "",
                from_etcd=about.from_etcd,
                advanced=about.advanced,
            )
