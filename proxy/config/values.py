"""Parsing of setting values: durations, sizes, addresses, URLs, files.

Flags and environment variables use `--linger=500ms` and `--history-bytes-max=64MiB`, as etcd does; the configuration
file uses `linger_s = 0.5`, with the unit in the name. Both yield the same numbers and the same one-line errors, which
state the problem and the expected form.
"""

from __future__ import annotations

import re
import socket
from typing import NamedTuple

ENV_PREFIX = "WATCHMUX_"
"""Prefix of the environment variables."""

_DURATION_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h|d)")
SECONDS_MAX = 2**63 // 10**9
"""The longest duration that Go's flags take, 292 years; timers fail at longer ones."""
COUNT_MAX = 2**63 - 1
"""The largest number and size."""
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_SIZE_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")


class BadValue(ValueError):
    """An invalid value; the text states the problem and the expected form, without naming the setting."""


class Address(NamedTuple):
    """An address to listen on or connect to: host name or IP address (without brackets) and port, or a unix socket."""

    host: str
    """Empty: listen on all interfaces."""

    port: int
    path: str = ""
    """Path of the unix socket; if set, host and port are unused."""

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}" if self.path.startswith("/") else f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_duration_s(text: str) -> float:
    """Parse a Go duration (`1m30s`, `500ms`, `0`); return seconds.

    As in Go's flags, only 0 needs no unit (time.ParseDuration). Raises BadValue.
    """
    plain = text.strip()
    parts = list(_DURATION_PART.finditer(plain))
    if plain == "0":
        return 0.0
    if _NUMBER.fullmatch(plain):
        raise BadValue(f"{shortened(text)} has no unit; write it like 500ms, 10s or 1m30s")
    if not parts or "".join(part.group(0) for part in parts) != plain:
        raise BadValue(f"{text!r} is not a duration; write it like 500ms, 10s or 1m30s")
    seconds = sum(float(part.group(1)) * _DURATION_UNITS_S[part.group(2)] for part in parts)
    if seconds > SECONDS_MAX:
        raise BadValue(f"{shortened(text)} is too long; the maximum is 292 years ({SECONDS_MAX}s)")
    return seconds


def parse_size_bytes(text: str) -> int:
    """Parse a size (`64MiB`, `64M`, `1500000`; always powers of 1024); return bytes.

    Raises BadValue.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise BadValue(f"{text!r} is not a size; write it like 1500000, 512KiB or 64MiB")
    number, unit = match.groups()
    size = float(number) * 1024 ** _SIZE_POWERS[(unit or "").lower().removesuffix("i")]
    if size > COUNT_MAX:
        raise BadValue(f"{shortened(text)} is too large; the maximum is {COUNT_MAX} bytes")
    return int(size)


def shortened(value: object) -> str:
    """Show a value in a message; of a very long one only the beginning."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}..."


def show_duration(seconds: float) -> str:
    """Format seconds as flags accept them: 0.1 -> `100ms`, 7200 -> `2h`."""
    for unit, scale in (("h", 3600), ("m", 60), ("s", 1)):
        if seconds >= scale and seconds % scale == 0:
            return f"{int(seconds // scale)}{unit}"
    return "0s" if seconds == 0 else f"{seconds * 1000:g}ms" if seconds < 1 else f"{seconds:g}s"


def show_size(size: int) -> str:
    """Format bytes as flags accept them: 1048576 -> `1MiB`; a number that is not a multiple of 1 KiB stays plain."""
    for unit, power in (("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if size >= 1024**power and size % 1024**power == 0:
            return f"{size // 1024**power}{unit}"
    return str(size)


def parse_address(text: str, *, listening: bool = False) -> Address:
    """Parse `HOST:PORT`, `[IPv6]:PORT` or, if `listening`, `:PORT` (all interfaces).

    Port 0 (any free port) is accepted only if `listening`. Raises BadValue.
    """
    plain = text.strip()
    if "," in plain:
        raise BadValue(f"{text!r} is a list; give one address")
    host, colon, port_text = plain.rpartition(":")
    if not colon or plain.endswith("]"):
        form = f":{plain} or HOST:{plain}" if listening and plain.isdecimal() else "HOST:PORT, like 127.0.0.1:2379"
        raise BadValue(f"{text!r} has no port; write {form}")
    if not (port_text.isascii() and port_text.isdigit()) or int(port_text) > 65535:
        raise BadValue(f"{port_text!r} in {text!r} is not a port; it is a number from 0 to 65535")
    port = int(port_text)
    if port == 0 and not listening:
        raise BadValue(f"{text!r} has port 0, which cannot be connected to")
    if host.startswith("[") and host.endswith("]"):
        try:
            socket.inet_pton(socket.AF_INET6, host[1:-1].split("%")[0])
        except OSError:
            raise BadValue(f"{host!r} in {text!r} is not an IPv6 address") from None
        return Address(host[1:-1], port)
    if host == "" and listening:
        return Address("0.0.0.0", port)  # all interfaces, as etcd reads ":port"
    if ":" in host:
        raise BadValue(f"{text!r} is ambiguous; write an IPv6 address in brackets, like [::1]:2379")
    _check_host(host, text)
    return Address(host, port)


def parse_listen_address(text: str) -> Address:
    """Parse a listen address for clients: as `parse_address`, or a unix socket in the syntax of etcd's clients.

    That is `unix:///absolute`, `unix://relative` or `unix:path`; `unixs` means TLS. `:PORT` means all interfaces in
    both address families, as in Go. Raises BadValue.
    """
    plain = text.strip()
    scheme, colon, rest = plain.partition(":")
    if scheme.lower() in ("http", "https") and rest.startswith("//"):
        tls = "set --cert-file and --key-file for TLS" if scheme.lower() == "https" else "TLS needs --cert-file"
        raise BadValue(f"{text!r}: remove {scheme}://; write {rest[2:].rstrip('/')}, and {tls}")
    if colon and scheme.lower() in ("unix", "unixs"):
        path = rest.removeprefix("//")
        if not path or path.endswith("/"):
            raise BadValue(f"{text!r} has no socket path; write unix:///run/watchmux.sock")
        return Address("", 0, path)
    address = parse_address(text, listening=True)
    return address._replace(host="") if plain.startswith(":") else address


def _check_host(host: str, text: str) -> None:
    if re.fullmatch(r"[\d.]+", host):
        try:
            socket.inet_pton(socket.AF_INET, host)
        except OSError:
            raise BadValue(f"{host!r} in {text!r} is not an IPv4 address") from None
    elif not _HOST_NAME.fullmatch(host):
        raise BadValue(f"{host!r} in {text!r} is not a host name")


def parse_metrics_address(text: str) -> Address:
    """Parse the metrics address: `HOST:PORT` or, as in etcd's flag, `http://HOST:PORT`.

    Raises BadValue; https is refused, because metrics are served in plain text.
    """
    if "://" not in text:
        return parse_address(text, listening=True)
    scheme, _, rest = text.strip().partition("://")
    if scheme.lower() == "https":
        raise BadValue(f"{text!r}: metrics are served in plain text; use http:// and a private address")
    if scheme.lower() != "http":
        raise BadValue(f"{text!r}: unknown scheme {scheme!r}; use http://HOST:PORT")
    place = rest.rstrip("/")
    if re.search(r"[/?#]", place):
        raise BadValue(f"{text!r}: remove the path; /metrics, /health and /v1/status are added")
    return parse_address(place, listening=True)


def client_url(text: str, *, secure: bool = False) -> str:
    """Parse an advertised URL: `http://HOST:PORT`, `https://HOST:PORT` or `HOST:PORT`; "" is returned as it is.

    Returns it with a scheme, as in etcd's member list; the default is https if `secure`. Raises BadValue.
    """
    if not text:
        return ""
    scheme, separator, rest = text.strip().partition("://")
    if not separator:
        scheme, rest = "https" if secure else "http", scheme
    elif scheme.lower() not in ("http", "https"):
        raise BadValue(f"{text!r}: unknown scheme {scheme!r}; use http://HOST:PORT or https://HOST:PORT")
    place, _, path = rest.partition("/")
    if path:
        raise BadValue(f"{text!r}: remove everything after the port; clients accept only HOST:PORT")
    return f"{scheme.lower()}://{parse_address(place)}"


def check_readable(path: str) -> None:
    """Check that a file exists and is readable. Raises BadValue."""
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise BadValue(f"cannot read {path!r}: {(error.strerror or str(error)).lower()}") from None
