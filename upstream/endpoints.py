"""The addresses of the upstream etcds, and when to retry one.

Endpoints are written as etcd's own tools take them (`--endpoints`): a list separated by commas, each a URL or just
`host:port`. Whether TLS is used follows clientv3's rules (client/v3/internal/endpoint): `https://` and `unixs://`
always, `http://` never, and `unix://` or an endpoint without a scheme exactly when certificates are configured. The
scheme `http+unix://`, never with TLS, is the proxy's own: for the hub of --workers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from upstream.errors import BadEndpoint
from upstream.settings import BACKOFF_FIRST_S, BACKOFF_MAX_S

_SECURE_OF_SCHEME: Final = {"https": True, "unixs": True, "http": False, "unix": None, "http+unix": False}
_HOST: Final = re.compile(r"(?!.*\.\.)[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_.])?")
_ADDRESS_6: Final = re.compile(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?")
_TO_DO: Final = "write host:port, http://host:port, https://host:port or unix:///path"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address of an upstream etcd."""

    # As configured; shown in logs and errors.
    text: str
    # Name or address without brackets; "localhost" for a unix socket.
    host: str
    # 0 for a unix socket.
    port: int
    # Path of the unix socket; "" for TCP.
    path: str
    # True or False by the scheme; None where the scheme does not decide: TLS exactly when it is configured.
    secure: bool | None

    @property
    def authority(self) -> bytes:
        """The value of `:authority` for calls to this endpoint."""
        if self.path:
            return b"localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}".encode("ascii")

    def uses_tls(self, configured: bool) -> bool:
        """Whether to speak TLS, given whether certificates are configured."""
        return configured if self.secure is None else self.secure


def parse_endpoints(text: str | Sequence[str]) -> list[Endpoint]:
    """Parse a list of endpoints, separated by commas or given as a sequence; duplicates are dropped.

    Raises BadEndpoint, which names the endpoint and the problem. An empty one is an error: a variable in its place may
    be unset.
    """
    parts = [part.strip() for part in (text.split(",") if isinstance(text, str) else text)]
    if not any(parts):
        raise BadEndpoint("endpoints", "the list is empty", _TO_DO)
    if not all(parts):
        raise BadEndpoint(f"endpoints {','.join(parts)!r}", "one of them is empty", "give it, or remove its comma")
    endpoints = [parse_endpoint(part) for part in parts]
    unique: dict[tuple[object, ...], Endpoint] = {}
    for endpoint in endpoints:
        unique.setdefault((endpoint.host, endpoint.port, endpoint.path, endpoint.secure), endpoint)
    return list(unique.values())


def parse_endpoint(text: str) -> Endpoint:
    """Parse one endpoint. Raises BadEndpoint."""
    is_path = text.lower().startswith(("unix:", "unixs:", "http+unix:"))
    # A password may be in front of the @.
    where = f"endpoint {text if is_path else re.sub('[^/]*@', '***@', text)!r}"
    if re.search(r"[\s;]", text) and not is_path:
        raise BadEndpoint(where, "it contains a space or a semicolon", "separate endpoints by commas")
    if wrong := re.match(r"(https?)(:/?|//?)(?=[^:/]+:\d+$)", text):
        raise BadEndpoint(where, "'://' is missing", f"write {wrong[1]}://{text[wrong.end() :]}")
    scheme, mark, rest = text.partition("://")
    if not mark:
        secure, rest = None, text
        if text.startswith(("unix:", "unixs:")):
            scheme, _, rest = text.partition(":")
            return _unix(text, scheme, rest)
    elif scheme.lower() in ("unix", "unixs", "http+unix"):
        return _unix(text, scheme.lower(), rest)
    elif scheme.lower() in _SECURE_OF_SCHEME:
        secure = _SECURE_OF_SCHEME[scheme.lower()]
    else:
        raise BadEndpoint(where, f"the scheme {scheme!r} is unknown", _TO_DO)
    rest, _, extra = rest.partition("/")
    if extra or "?" in rest or "#" in rest:
        raise BadEndpoint(where, "there is a path after the port", _TO_DO)
    if "@" in rest:
        raise BadEndpoint(where, "it contains a user name", "use --user instead")
    host, port = _host_and_port(rest, where, scheme + mark if mark else "")
    return Endpoint(text, host, port, "", secure)


def _unix(text: str, scheme: str, path: str) -> Endpoint:
    if not path:
        raise BadEndpoint(f"endpoint {text!r}", "the path of the socket is missing", _TO_DO)
    return Endpoint(text, "localhost", 0, path, _SECURE_OF_SCHEME[scheme])


def _host_and_port(text: str, where: str, scheme: str) -> tuple[str, int]:
    if text.startswith("["):
        host, bracket, tail = text[1:].partition("]")
        good = bool(bracket) and _ADDRESS_6.fullmatch(host) is not None and (not tail or tail.startswith(":"))
        colon, port = tail[:1], tail[1:]
    else:
        host, colon, port = text.partition(":")
        if ":" in port:
            raise BadEndpoint(where, "an IPv6 address needs brackets", "write [address]:port")
        good = _HOST.fullmatch(host) is not None
    if not good:
        raise BadEndpoint(where, f"{host!r} is not a host name or address" if host else "the host is missing", _TO_DO)
    if not colon:
        # As for etcd's clients: Go's net.Dial has no default port ("missing port in address").
        raise BadEndpoint(where, "the port is missing", f"write {scheme}{text}:2379, or the port that it listens on")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        raise BadEndpoint(where, f"{port!r} is not a port", "give a port from 1 to 65535")
    return host, int(port)


class Backoff:
    """How long to wait before an endpoint is retried: not at all the first time, then doubling, with jitter.

    A success alone does not reset the delay: an endpoint that accepts connections and drops them at once would be
    hammered. The endpoint must have worked for as long as the longest delay.
    """

    def __init__(
        self,
        first_s: float = BACKOFF_FIRST_S,
        max_s: float = BACKOFF_MAX_S,
        jitter: Callable[[], float] = lambda: int.from_bytes(os.urandom(4)) / 2**32,
    ) -> None:
        self._first_s = first_s
        self._max_s = max_s
        # Returns a number in [0, 1).
        self._jitter = jitter
        # The delay after the next failure, before jitter; 0 = at once.
        self._delay_s = 0.0
        # When the endpoint began to work; None while it does not.
        self._success_at: float | None = None

    def succeeded(self, now: float) -> None:
        """Record that the endpoint works."""
        if self._success_at is None:
            self._success_at = now

    def failed(self, now: float) -> float:
        """Record a failure. Return the seconds to wait before the next attempt."""
        if self._success_at is not None and now - self._success_at >= self._max_s:
            self._delay_s = 0.0
        self._success_at = None
        delay_s = self._delay_s
        self._delay_s = min(max(2 * delay_s, self._first_s), self._max_s)
        # Between half of the delay and all of it, so that many proxies that lose one etcd do not return in step.
        return delay_s * (0.5 + 0.5 * self._jitter())
