"""The interface between the store and durability: changes to record, and the stored data to start from.

The state passes every change to a `JournalRecorder`; the pure parts need no other knowledge of durability. The class
itself discards everything (a store in memory); its subclass in journal.py writes a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from upstream.store.alarms import Alarm
from upstream.store.index import RevisionRecord
from upstream.store.mvcc import Changes


class StoreDataError(Exception):
    """The data directory cannot be used; the text has the file, the problem and the remedy."""


class JournalRecorder:
    """Receives the store's changes. This one discards them: a store in memory."""

    def changed(self, changes: Changes) -> None:
        """Record the changes of one revision."""

    def compacted(self, revision: int) -> None:
        """Record that the store was compacted at a revision."""

    def dropped(self, records: Iterable[RevisionRecord]) -> None:
        """Record that compaction has removed records. Need not be durable: the removal can be repeated."""

    def granted(self, lease_id: int, ttl_s: int) -> None:
        """Record a new lease."""

    def revoked(self, lease_id: int) -> None:
        """Record that a lease was revoked."""

    def auth_changed(self, rows: dict[str, bytes]) -> None:
        """Record the whole auth store: users, roles and state."""

    def alarms_changed(self, alarms: list[Alarm]) -> None:
        """Record all raised alarms."""

    def commit(self) -> None:
        """Make everything recorded so far durable. Raises StoreDataError when that fails."""

    def close(self) -> None:
        """Close files."""


@dataclass(slots=True)
class Stored:
    """The contents of a store's file."""

    cluster_id: int
    member_id: int
    revision: int
    compact_revision: int
    # In order of (mod_revision, sub_revision).
    records: list[RevisionRecord]
    # (lease id, TTL in seconds)
    leases: list[tuple[int, int]]
    # As Auth.rows returns it.
    auth: dict[str, bytes]
    alarms: list[Alarm]
