"""
Whether a store is the one it was: the same history, or one that was restored from a snapshot, or another store.

A restored cluster has the ids of the old one (they are hashes of its peer URLs), its term may be the same, and once
it has been written to often enough, its revision is no lower. But its log has begun anew. Each revision is one entry of
the log, so within one history the log has grown at least as much as the revision between any two looks at any two
members, however far these lag. A restored store has a snapshot full of revisions that its log knows nothing of. What
can hide that is as many entries without a revision (leases granted, requests refused) as the snapshot has revisions.

Sources: etcd server/etcdserver/api/v3rpc/maintenance.go (Status), etcdutl snapshot restore.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from proto.scan import Header


class RaftPosition(NamedTuple):
    """Where a member says it is, in an answer to Maintenance.Status."""

    header: Header
    # The index of an entry of the log that was applied before the header's revision was read.
    applied: int
    # The index of the newest entry known to be committed, read shortly before the revision was.
    committed: int


def is_suspect(before: RaftPosition, now: RaftPosition) -> bool:
    """
    Whether `now` may be of another history than `before`.

    Under load it may look like that for an instant, as an answer is not read at one instant. It is certain when it
    still holds with a `committed` from a later answer.
    """
    if now.header.cluster_id != before.header.cluster_id:
        return True
    if not before.applied or not now.committed:
        # A server that is no etcd may have no log, or not tell.
        return False
    # At the same revision a member that lags may have any index; one that is below says nothing.
    written = now.header.revision - before.header.revision
    return written > 0 and written > now.committed - before.applied


def described(known: RaftPosition, now: RaftPosition) -> dict[str, int]:
    """Return what a log says of a store that is not the one it was."""
    return {
        "known_revision": known.header.revision,
        "known_index": known.applied,
        "revision": now.header.revision,
        "index": now.committed,
    }


class HistoryVerdict(Enum):
    """What is thought of a store."""

    SAME = "it is the one it was, as far as one can tell"
    SUSPECT = "it may be another one: look where it is once more"
    OTHER = "it is another one"
    UNKNOWN = "it may be another one, and does not say more: it is not to be used"


class HistoryTracker:
    """The history that is watched: where it was when it was last seen to be the one it had been."""

    __slots__ = ("known",)

    def __init__(self) -> None:
        # None = nothing to go by.
        self.known: RaftPosition | None = None

    def seen(self, now: RaftPosition | None) -> HistoryVerdict:
        """Take where a store is that was just asked; None = it does not say. SUSPECT wants `seen_again`."""
        if now is None:
            return HistoryVerdict.SAME
        if self.known is not None and is_suspect(self.known, now):
            return HistoryVerdict.SUSPECT
        self._take(now)
        return HistoryVerdict.SAME

    def seen_again(self, now: RaftPosition, later: RaftPosition | None) -> HistoryVerdict:
        """Take where a suspect is a moment later; None = it does not say."""
        if later is None:
            return HistoryVerdict.UNKNOWN
        if self.known is not None and is_suspect(self.known, now._replace(committed=later.committed)):
            self.known = now
            return HistoryVerdict.OTHER
        self._take(now)
        return HistoryVerdict.SAME

    def went_back(self, now: RaftPosition | None) -> None:
        """It was found out otherwise that the store is another one; `now`: where it was when it was connected to."""
        self.known = now

    def wants_a_look(self, connected: RaftPosition | None, newest_revision: int) -> bool:
        """
        Whether to ask where the store is once more: when it was connected to it was no further than it had been, which
        tells nothing, and since then (`newest_revision`) it has gone on.
        """
        known = self.known
        if known is None or connected is None or connected is known:
            return False
        return newest_revision > known.header.revision

    def _take(self, now: RaftPosition) -> None:
        if self.known is None or now.header.revision > self.known.header.revision:
            self.known = now
