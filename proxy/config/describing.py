"""Metadata of a setting, attached to its field: help text, kind of value, whether etcd has the same flag, bounds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

KIB = 1024
MIB = 1024 * KIB


class Kind(Enum):
    """The syntax of a setting's value in a flag and in the file."""

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
    """Describe a field: `from_etcd` if etcd grpc-proxy has the same flag, `advanced` if --help omits it.

    `bounds` are msgspec's ge, gt and le.
    """
    extra = {"about": About(kind, from_etcd, advanced)}
    constraints: dict[str, Any] = dict(bounds)
    import msgspec  # only to read settings; a process that receives them from another one does not need it

    return msgspec.Meta(description=text, extra=extra, **constraints)
