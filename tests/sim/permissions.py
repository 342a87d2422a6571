"""Permissions in a simulated world: a few tokens, some of which expire and become valid again."""

from __future__ import annotations

from dataclasses import dataclass, field

PERMISSION_DENIED = "rpc error: code = PermissionDenied desc = etcdserver: permission denied"
INVALID_TOKEN = "rpc error: code = Unauthenticated desc = etcdserver: invalid auth token"
USER_EMPTY = "rpc error: code = InvalidArgument desc = etcdserver: user name is empty"

# These may watch everything while they are valid.
MIGHTY = (b"root", b"other")
# The proxy's own user, who may watch everything.
OWN = b"own"
HALF = b"half"
# The tokens of all clients; HALF may watch the first half of the keys, b"bad" was never valid.
TOKENS = (*MIGHTY, *MIGHTY, HALF, b"bad", None)


@dataclass(slots=True)
class Permissions:
    """The state of etcd's auth store."""

    enabled: bool
    keys: tuple[bytes, ...]
    expired: set[bytes] = field(default_factory=set)
    # Tokens that have ever changed: their answers depend on when they were asked.
    fickle: set[bytes] = field(default_factory=set)

    def refusal(self, token: bytes | None, key: bytes, range_end: bytes) -> str:
        """Return why the range is refused to this token; "" if it is not."""
        if not self.enabled:
            return ""
        if token is None:
            return USER_EMPTY
        if self.is_invalid(token):
            return INVALID_TOKEN
        inside = key < self.middle and (not range_end or b"\0" < range_end <= self.middle)
        return PERMISSION_DENIED if token == HALF and not inside else ""

    @property
    def middle(self) -> bytes:
        """The first key that HALF may not watch."""
        return self.keys[len(self.keys) // 2]

    def is_invalid(self, token: bytes | None) -> bool:
        """Return whether etcd does not know this token (any more)."""
        return self.enabled and (token == b"bad" or token in self.expired)

    def expire(self, token: bytes) -> None:
        """Make a token invalid."""
        self.expired.add(token)
        self.fickle.add(token)
