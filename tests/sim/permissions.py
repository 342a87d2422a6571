"""Who may watch what in a simulated world: a few tokens, of which some expire and come back."""

from __future__ import annotations

from dataclasses import dataclass, field

PERMISSION_DENIED = "rpc error: code = PermissionDenied desc = etcdserver: permission denied"
INVALID_TOKEN = "rpc error: code = Unauthenticated desc = etcdserver: invalid auth token"
USER_EMPTY = "rpc error: code = InvalidArgument desc = etcdserver: user name is empty"

# These may watch everything while they are valid.
MIGHTY = (b"root", b"other")
# Of all clients; b"half" may watch the first half of the keys, b"bad" was never valid.
TOKENS = (*MIGHTY, *MIGHTY, b"half", b"bad", None)


@dataclass(slots=True)
class Permissions:
    """What etcd's auth store says."""

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
        if token == b"bad" or token in self.expired:
            return INVALID_TOKEN
        middle = self.keys[len(self.keys) // 2]
        inside = key < middle and (not range_end or b"\0" < range_end <= middle)
        return PERMISSION_DENIED if token == b"half" and not inside else ""

    def expire(self, token: bytes) -> None:
        """Make a token invalid."""
        self.expired.add(token)
        self.fickle.add(token)
