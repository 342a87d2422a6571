"""The description of a setting, attached to its field: help text, syntax, bounds, and what depends on it."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

KIB = 1024


class ValueSyntax(Enum):
    """The syntax of a setting's value in a flag and in the file."""

    TEXT = "text"
    FILE = "file"
    ADDRESS = "HOST:PORT"
    METRICS_ADDRESS = "HOST:PORT or URL"
    CLIENT_URL = "URL or HOST:PORT"
    ENDPOINTS = "comma-separated"
    PREFIXES = "prefix"
    SWITCH = "switch"
    COUNT = "number"
    BYTES = "size"
    SECONDS = "duration"
    CHOICE = "choice"


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingDescription:
    """The description of a setting."""

    text: str
    """The help."""

    kind: ValueSyntax | None
    """None: it follows from the field's name and type."""

    bounds: Mapping[str, float]
    """`ge`, `gt` and `le`."""

    from_etcd: bool
    """`etcd grpc-proxy start` has a flag of this name."""

    reloaded: bool
    """SIGHUP applies it to the running proxy."""

    used: str
    """For a limit: the field of a snapshot that shows what it limits; "" for other settings."""

    reached: str
    """For a limit: the field of a snapshot that grows, or is not 0, when the limit is reached."""


def knob(
    default: object,
    text: str,
    kind: ValueSyntax | None = None,
    *,
    from_etcd: bool = False,
    reloaded: bool = False,
    used: str = "",
    reached: str = "",
    **bounds: float,
) -> Any:
    """Declare a setting: the field of a dataclass with its default and description (see `SettingDescription`)."""
    about = SettingDescription(
        text=text, kind=kind, bounds=bounds, from_etcd=from_etcd, reloaded=reloaded, used=used, reached=reached
    )
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"about": about})
    return field(default=default, metadata={"about": about})


def kind_of(name: str, hint: Any) -> ValueSyntax:
    """Return the syntax of a setting that does not name it: numbers have their unit in their name."""
    if typing.get_origin(hint) is Literal:
        return ValueSyntax.CHOICE
    if hint is float:
        return ValueSyntax.SECONDS
    if hint is int:
        return ValueSyntax.BYTES if "bytes" in name.split("_") else ValueSyntax.COUNT
    return {bool: ValueSyntax.SWITCH, str: ValueSyntax.TEXT}.get(hint, ValueSyntax.ENDPOINTS)
