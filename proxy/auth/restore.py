"""Whether the store has gone back: it was restored from a snapshot, and what was heard above that is true no more.

A `created` or a serializable read may be older than what is known, from a member that lags behind. A linearizable read
that began after something was known cannot. So every linearizable answer that comes, whatever was asked for, is held
against what was known when it was asked for. And since nobody may ask anything after a break, one read is made for the
watches that are open; with auth on by the right of whoever may: the first who is answered decides for all.

A store that has grown past what was known since it was restored is recognised by `upstream/watching/lineage.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple, Protocol

from proto.scan import Header

ANY_KEY = b"\x00"
"""The key of the reads that are about no key in particular."""

LOOKED_AT = 1000
"""Of so many open watches the tokens are looked at, and of these so many tried at a time."""
TRIED_AT_ONCE = 8


class AuthScope(NamedTuple):
    """By whose right a read is made: a token, and a range that its user may read."""

    token: bytes | None = None
    key: bytes = ANY_KEY
    range_end: bytes = b""


class ReadBaseline(NamedTuple):
    """What was known when a read began: the newest revision, and how often the store had gone back."""

    known: int
    epoch: int


class AuthorizedRange(Protocol):
    """An open upstream watch, as far as it matters here: its range, and who may read that."""

    @property
    def key(self) -> bytes: ...

    @property
    def range_end(self) -> bytes: ...

    def tokens(self) -> Iterator[bytes | None]: ...


class RestoreDetector:
    """Holds what is read against what was known."""

    __slots__ = ("_epoch", "_newest_read", "_tried", "unproven")

    def __init__(self) -> None:
        # Nothing linearizable has been read since the last connection.
        self.unproven = False
        # The highest revision that a read found.
        self._newest_read = 0
        # Times that the store went back: what began in another time says nothing about this one.
        self._epoch = 0
        # Whose right has been tried since the last connection.
        self._tried: set[bytes | None] = set()

    def begin(self, known: int) -> ReadBaseline:
        """A read begins; `known` is the newest revision that the watches have seen."""
        return ReadBaseline(max(self._newest_read, known), self._epoch)

    def is_stale(self, begun: ReadBaseline) -> bool:
        """Whether the store has gone back since this read began: then its answer may be of either history."""
        return begun.epoch != self._epoch

    def answered(self, begun: ReadBaseline, header: Header, linearizable: bool) -> bool:
        """Take the answer to a read; True: the store went back."""
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
        """The store is known to be another one: what was read before says nothing about this one."""
        self._epoch += 1
        self._newest_read = header.revision

    def connected(self) -> None:
        """There is a new connection for the watches that are open: to whom, is not proven yet."""
        self.unproven = True
        self._tried.clear()

    def candidate_scopes(self, own_token: bytes | None, watches: Iterable[AuthorizedRange]) -> list[AuthScope]:
        """Return by whose rights to read now, so that it is proven; none when it is.

        Each token is tried once, with a range that it was good for; `own_token` is that of the proxy's own user.
        """
        return list(islice(self._untried(own_token, watches), TRIED_AT_ONCE)) if self.unproven else []

    def _untried(self, own: bytes | None, watches: Iterable[AuthorizedRange]) -> Iterator[AuthScope]:
        for watch in tuple(islice(watches, LOOKED_AT)):
            # Not `watch.token`: that is remembered as the one that the watch was registered with.
            for token in (own, *islice(watch.tokens(), 1)) if own is not None else islice(watch.tokens(), 1):
                if token not in self._tried:
                    self._tried.add(token)
                    yield AuthScope(token, watch.key, watch.range_end)
