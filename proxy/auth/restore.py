"""Detects that the store's revision went backwards: it was restored from a snapshot, and later revisions are invalid.

A `created` response or a serializable read may be older than the known revision, since it may come from a member that
lags. A linearizable read cannot be older than a revision known before it began. So each linearizable answer, to any
query, is compared with the revision known when its read began. Since there may be no queries after a connection
breaks, one read is made for the open watches. With auth on it needs a token with permission: tokens are tried, and the
first one that is answered decides for all.

A restored store that has since grown past the known revision is recognised by `upstream/watching/lineage.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple, Protocol

from proto.scan import Header

ANY_KEY = b"\x00"
"""The key for reads that are not about a particular key."""

LOOKED_AT = 1000
"""Maximum number of open watches whose tokens are considered."""

TRIED_AT_ONCE = 8
"""Maximum number of those tokens tried at a time."""


class AuthScope(NamedTuple):
    """The credentials of a read: a token, and a range that its user may read."""

    token: bytes | None = None
    key: bytes = ANY_KEY
    range_end: bytes = b""


class ReadBaseline(NamedTuple):
    """State when a read began: the newest known revision, and how often the store's revision had gone backwards."""

    known: int
    epoch: int


class AuthorizedRange(Protocol):
    """The part of an open upstream watch needed here: its range, and the tokens that may read it."""

    @property
    def key(self) -> bytes: ...

    @property
    def range_end(self) -> bytes: ...

    def tokens(self) -> Iterator[bytes | None]: ...


class RestoreDetector:
    """Compares the revision of each read with the revision known before."""

    def __init__(self) -> None:
        # There was no linearizable read since the last connection.
        self.unproven = False
        # The highest revision that a read found.
        self._newest_read = 0
        # Times that the revision went backwards: a read from an earlier epoch proves nothing about this one.
        self._epoch = 0
        # Tokens tried since the last connection.
        self._tried: set[bytes | None] = set()

    def begin(self, known: int) -> ReadBaseline:
        """A read begins; `known` is the newest revision that the watches have seen."""
        return ReadBaseline(max(self._newest_read, known), self._epoch)

    def is_stale(self, begun: ReadBaseline) -> bool:
        """Whether the store was restored after this read began: its answer may come from either history."""
        return begun.epoch != self._epoch

    def answered(self, begun: ReadBaseline, header: Header, linearizable: bool) -> bool:
        """Process the answer to a read; True if the store's revision went backwards."""
        if self.is_stale(begun):
            return False
        if linearizable:
            self.unproven = False
            self._tried.clear()
            if header.revision < begun.known:
                self.other_history(header)
                return True
        self._newest_read = max(self._newest_read, header.revision)
        return False

    def other_history(self, header: Header) -> None:
        """The store has been replaced: earlier reads prove nothing about the new one."""
        self._epoch += 1
        self._newest_read = header.revision

    def connected(self) -> None:
        """There is a new connection for the open watches; which store it leads to is not proven yet."""
        self.unproven = True
        self._tried.clear()

    def candidate_scopes(self, own_token: bytes | None, watches: Iterable[AuthorizedRange]) -> list[AuthScope]:
        """Return the scopes to read with now to prove which store this is; none once it is proven.

        Each token is tried once, with a range that it was permitted; `own_token` is that of the proxy's own user.
        """
        return list(islice(self._untried(own_token, watches), TRIED_AT_ONCE)) if self.unproven else []

    def _untried(self, own: bytes | None, watches: Iterable[AuthorizedRange]) -> Iterator[AuthScope]:
        for watch in tuple(islice(watches, LOOKED_AT)):
            # Not `watch.token`, which is the token that the watch was registered with. A cover has no clients' tokens;
            # while auth is off, a read without a token is answered.
            first = next(watch.tokens(), None)
            for token in (first,) if own is None else (own, first):
                if token not in self._tried:
                    self._tried.add(token)
                    yield AuthScope(token, watch.key, watch.range_end)
