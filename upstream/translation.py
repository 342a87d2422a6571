"""
What becomes of the messages of calls that are not passed on as they are.

A flag that changes what clients see of etcd (`--namespace`, `--advertise-client-url`) is a set of rules: which calls
are translated, in which directions, and how. All other calls pass frame by frame, and so does a direction that no rule
changes. Fields that are unknown here stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

Change = Callable[[Any], None]
"""Changes a message, which is of the type that stands beside it, in place."""


@dataclass(frozen=True, slots=True)
class Translation:
    """What becomes of the messages of one call; None: they pass as they are."""

    request: type[Message]
    response: type[Message]
    outward: Change | None
    inward: Change | None

    def to_etcd(self, message: bytes) -> bytes:
        """Return a request as etcd shall get it. Raises DecodeError."""
        return message if self.outward is None else _changed(self.request, self.outward, message)

    def to_client(self, message: bytes) -> bytes:
        """Return an answer as the client shall get it. Raises DecodeError."""
        return message if self.inward is None else _changed(self.response, self.inward, message)


def _changed(kind: type[Message], change: Change, message: bytes) -> bytes:
    parsed = kind.FromString(message)
    change(parsed)
    return parsed.SerializeToString()


@dataclass(frozen=True, slots=True)
class Rules:
    """What one flag makes of calls, by their paths."""

    flag: str
    """For people, in errors."""

    translations: Mapping[bytes, Translation]
    services: tuple[bytes, ...] = ()
    """Services whose calls pass only if they are named here: what a later etcd adds to them is refused."""

    untouched: frozenset[bytes] = frozenset()
    """Calls of theirs that pass as they are."""
