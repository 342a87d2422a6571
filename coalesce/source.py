"""Sources of events: an upstream watch, the history of its batches, and the watches that follow it.

There are two kinds of source. A trunk is the one that all watches of a range end up on; a backfill brings some of them
there. Both pass batches on in the same way, keep a window to replay from, and may have lagging watches; so a session
that stalls is handled the same way on either.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from coalesce.batch import Batch
from coalesce.fanout import Fanout
from coalesce.history import History

if TYPE_CHECKING:
    from coalesce.hub import CoreState
    from coalesce.session import Session, Watch


class Upstream:
    """A watch at etcd as the shell sees it. It is never reopened: a source that restarts uses a new one."""

    __slots__ = (
        "asked",
        "asked_at",
        "closed",
        "created",
        "fed",
        "is_backfill",
        "key",
        "prev_kv",
        "range_end",
        "said_token",
        "shell",
        "start_revision",
    )

    def __init__(self, owner: Source, start_revision: int | None, prev_kv: bool, is_backfill: bool) -> None:
        # The source it feeds; None after that source has ended.
        self.fed: Source | None = owner
        self.key = owner.key
        self.range_end = owner.range_end
        # None = now.
        self.start_revision = start_revision
        self.prev_kv = prev_kv
        # It needs a stream of its own, which can be paused.
        self.is_backfill = is_backfill
        # Etcd has answered `created`.
        self.created = False
        # It is not needed any more; later responses are ignored.
        self.closed = False
        # The last value of `token`, () if it was never read: a refusal by etcd applies to this token, even if the
        # sessions have changed since.
        self.said_token: tuple[bytes | None, ...] = ()
        # The number of the newest progress request that asked it; 0 = none.
        self.asked = 0
        # When that request was made, while its answer is outstanding.
        self.asked_at: float | None = None
        # Free for the shell.
        self.shell: object = None

    @property
    def owner(self) -> Source:
        """The source it feeds; must not be read after that source has ended."""
        assert self.fed is not None, "its source has ended"
        return self.fed

    def feed(self, owner: Source) -> None:
        """Switch to feeding another source."""
        self.fed = owner

    def leave(self, owner: Source) -> None:
        """Drop the reference to an ended source, to break the reference cycle."""
        if self.fed is owner:
            self.fed = None

    @property
    def token(self) -> bytes | None:
        """The token to register with: that of a live watch, or of a create that waits for the source."""
        token = next(self.tokens(), None)
        self.said_token = (token,)
        return token

    def tokens(self) -> Iterator[bytes | None]:
        """Walk the tokens that etcd has not refused for this range."""
        owner = self.fed
        if owner is None:
            return
        refused = owner.refused_tokens
        for session in owner.sessions():
            token = session.identity.token
            if token not in refused:
                yield token

    def __repr__(self) -> str:
        return f"Upstream({self.key!r}, {self.range_end!r}, start_revision={self.start_revision}, closed={self.closed})"


class Source:
    """Base of trunk and backfill. `next_revision` is the revision it delivers next; its bookmark is one below."""

    __slots__ = (
        "events",
        "fanout",
        "history",
        "hub",
        "key",
        "proof",
        "proven_at",
        "range_end",
        "refused_tokens",
        "upstream",
        "watches",
    )

    def __init__(self, hub: CoreState, key: bytes, range_end: bytes, start_revision: int, prev_kv: bool) -> None:
        self.hub = hub
        self.key = key
        self.range_end = range_end
        # Events received since it opened.
        self.events = 0
        self.fanout = Fanout(start_revision, hub.stats)
        self.history = History(hub.ledger, start_revision, prev_kv)
        # Of a trunk: all watches of the range, in any place. Of a backfill: those that come through it.
        self.watches: dict[Watch, None] = {}
        self.upstream: Upstream
        # The number of the newest progress request at the time when the bookmark was last proven.
        self.proof = 0
        # When the bookmark was last proven.
        self.proven_at = hub.now
        # Tokens that etcd has refused for this range.
        self.refused_tokens: set[bytes | None] = set()

    @property
    def next_revision(self) -> int:
        """The first revision that it has neither delivered nor proven empty."""
        return self.fanout.next_revision

    def open(self, start_revision: int | None, prev_kv: bool, is_backfill: bool) -> None:
        """Open an upstream watch for this source."""
        self.upstream = Upstream(self, start_revision, prev_kv, is_backfill)
        self.hub.open_upstream(self.upstream)

    def ingest(self, batch: Batch) -> None:
        """Deliver the new part of a batch, and keep it in the history."""
        hub = self.hub
        self.proof = hub.progress_serial
        self.proven_at = hub.now
        fanout = self.fanout
        part = batch if fanout.next_revision <= batch.first_revision else batch.since(fanout.next_revision)
        if part is None:
            return
        history = self.history
        fanout.deliver(part, hub.limits.fragment_bytes, history.has_prev_kv, hub.effects)
        history.append(part, hub.now)

    def advance(self, revision: int) -> None:
        """Record that everything through `revision` has been delivered."""
        self.proof = self.hub.progress_serial
        self.proven_at = self.hub.now
        if revision >= self.fanout.next_revision:
            self.fanout.advance(revision + 1)

    def serves(self, watch: Watch) -> bool:
        """Whether it can bring this watch the revisions it needs next, from its history or live."""
        return watch.next_revision >= self.history.floor

    def sessions(self) -> Iterator[Session]:
        """Walk the sessions that need this source; a session may appear more than once."""
        raise NotImplementedError
