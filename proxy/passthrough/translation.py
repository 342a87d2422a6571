"""
What becomes of the messages of calls that are not passed on as they are.

A flag that changes what clients see of etcd (`--namespace`, `--advertise-client-url`) is a set of rules: which calls
are translated, in which directions, and how. All other calls pass frame by frame, and so does a direction that no rule
changes. Fields that are unknown here stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import Message

from proxy.passthrough.rewriting import Changes, Rewriting


@dataclass(frozen=True, slots=True)
class Translation:
    """What becomes of the messages of one call; None: they pass as they are."""

    request: type[Message]
    response: type[Message]
    outward: Changes | None
    inward: Changes | None

    def to_etcd(self, message: bytes) -> bytes:
        """Return a request as etcd shall get it. Raises DecodeError."""
        return message if self.outward is None else _whole(Rewriting(self.request, self.outward, message))

    def to_client(self, message: bytes) -> bytes:
        """Return an answer as the client shall get it. Raises DecodeError."""
        return message if self.inward is None else _whole(Rewriting(self.response, self.inward, message))


def _whole(rewriting: Rewriting) -> bytes:
    while not rewriting.step():
        pass
    return b"".join(rewriting.pieces)


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
