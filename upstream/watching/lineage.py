"""Whether a store still has the same history, or was restored from a snapshot or replaced by another one.

A restored cluster has the ids of the old one (they are hashes of its peer URLs), its term may be the same, and after
enough writes its revision is not lower. But its log has started over. Each revision is one entry of the log, so within
one history the log grows at least as much as the revision between any two reads at any two members, however far these
lag. A restored store contains the revisions of the snapshot, which have no entries in its log. Only as many entries
without a revision (leases granted, requests refused) as the snapshot has revisions can hide that.

Sources: etcd server/etcdserver/api/v3rpc/maintenance.go (Status), etcdutl snapshot restore.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from proto.scan import Header


class RaftPosition(NamedTuple):
    """A member's position in the log, from an answer to Maintenance.Status."""

    header: Header
    # The index of a log entry that was applied before the header's revision was read.
    applied: int
    # The index of the newest entry known to be committed, read shortly before the revision was.
    committed: int


def is_suspect(before: RaftPosition, now: RaftPosition) -> bool:
    """Whether `now` may be of another history than `before`.

    Under load this may be a false positive, since the fields of an answer are not read at one instant. It is certain if
    it still holds with a `committed` from a later answer.
    """
    if now.header.cluster_id != before.header.cluster_id:
        return True
    if not before.applied or not now.committed:
        # A server that is not an etcd may have no log, or not report it.
        return False
    # At the same revision a lagging member may have any index; a lower revision proves nothing.
    written = now.header.revision - before.header.revision
    return written > 0 and written > now.committed - before.applied


def log_fields(known: RaftPosition, now: RaftPosition) -> dict[str, int]:
    """Return the log fields for a store whose history has changed."""
    return {
        "known_revision": known.header.revision,
        "known_index": known.applied,
        "revision": now.header.revision,
        "index": now.committed,
    }


class HistoryVerdict(Enum):
    """The result of a check of a store's history."""

    SAME = "the same history, as far as known"
    SUSPECT = "maybe another history: read the position once more"
    OTHER = "another history"
    UNKNOWN = "maybe another history, and the server does not answer: do not use it"


class HistoryTracker:
    """The watched history: its position when it was last found to be the same."""

    def __init__(self) -> None:
        # None: no position is known yet.
        self.known: RaftPosition | None = None

    def check(self, now: RaftPosition | None) -> HistoryVerdict:
        """Check a store's position, just read; None = the server did not answer. After SUSPECT call `check_again`."""
        if now is None:
            return HistoryVerdict.SAME
        if self.known is not None and is_suspect(self.known, now):
            return HistoryVerdict.SUSPECT
        self._take(now)
        return HistoryVerdict.SAME

    def check_again(self, now: RaftPosition, later: RaftPosition | None) -> HistoryVerdict:
        """Check a suspect's position, read a moment later; None = the server did not answer."""
        if later is None:
            return HistoryVerdict.UNKNOWN
        if self.known is not None and is_suspect(self.known, now._replace(committed=later.committed)):
            self.known = now
            return HistoryVerdict.OTHER
        self._take(now)
        return HistoryVerdict.SAME

    def went_back(self, now: RaftPosition | None) -> None:
        """Record that the history was found to be another one; `now`: the store's position, None = unknown."""
        self.known = now

    def is_check_due(self, connected: RaftPosition | None, newest_revision: int) -> bool:
        """Whether to read the store's position once more: when connected, its revision was not above the known one,
        which proves nothing, and it has passed that since (`newest_revision`).
        """
        known = self.known
        if known is None or connected is None or connected is known:
            return False
        return newest_revision > known.header.revision

    def _take(self, now: RaftPosition) -> None:
        if self.known is None or now.header.revision > self.known.header.revision:
            self.known = now
