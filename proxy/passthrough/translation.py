"""The rules for calls whose messages are translated.

A flag that changes what clients see of etcd (`--namespace`, `--advertise-client-url`) is a set of rules: which calls
are translated, in which directions, and how. All other calls are forwarded frame by frame, and so is a direction that
no rule changes. Unknown fields are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import Message

from proxy.passthrough.rewriting import Changes, Rewriting


@dataclass(frozen=True, slots=True)
class Translation:
    """The changes of one call's messages, towards etcd (`outward`) and the client (`inward`); None: unchanged."""

    request: type[Message]
    response: type[Message]
    outward: Changes | None
    inward: Changes | None

    def to_etcd(self, message: bytes) -> bytes:
        """Return a request translated for etcd. Raises DecodeError."""
        return message if self.outward is None else _whole(Rewriting(self.request, self.outward, message))

    def to_client(self, message: bytes) -> bytes:
        """Return a response translated for the client. Raises DecodeError."""
        return message if self.inward is None else _whole(Rewriting(self.response, self.inward, message))


def _whole(rewriting: Rewriting) -> bytes:
    while not rewriting.step():
        pass
    return b"".join(rewriting.pieces)


@dataclass(frozen=True, slots=True)
class TranslationRules:
    """The translations of one flag, by the calls' paths."""

    flag: str
    """The flag's name, for error texts."""

    translations: Mapping[bytes, Translation]
    services: tuple[bytes, ...] = ()
    """Services of which only the calls listed in this class are forwarded: calls added by a later etcd are refused."""

    untouched: frozenset[bytes] = frozenset()
    """Calls of these services that are forwarded untranslated."""
