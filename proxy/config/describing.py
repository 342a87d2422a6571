"""How a knob is described beside its field: its text, how it is written, whether etcd has the same flag, its bounds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

KIB = 1024
MIB = 1024 * KIB


class Kind(Enum):
    """How a knob is written in a flag and in the file."""

    TEXT = "text"
    FILE = "file"
    ADDRESS = "HOST:PORT"
    METRICS_ADDRESS = "HOST:PORT or URL"
    CLIENT_URL = "URL or HOST:PORT"
    ENDPOINTS = "comma-separated"
    SWITCH = "switch"
    COUNT = "number"
    BYTES = "size"
    SECONDS = "duration"
    CHOICE = "choice"


@dataclass(frozen=True)
class About:
    kind: Kind
    from_etcd: bool
    advanced: bool


def knob(
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
    extra = {"about": About(kind, from_etcd, advanced)}
    constraints: dict[str, Any] = dict(bounds)
    import msgspec  # by those who read knobs; whoever has settings from another process does not

    return msgspec.Meta(description=text, extra=extra, **constraints)
