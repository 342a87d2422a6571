"""
What the store tells whoever keeps its changes, and what it is given back at a start.

The state records every change here, and the pure parts know no more of durability than this: `Recorder` itself keeps
nothing, which is the store in memory; journal.py has the one that writes a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from upstream.store.alarms import Alarm
from upstream.store.index import Record
from upstream.store.mvcc import Changes


class StoreDataError(Exception):
    """The data directory cannot be used; the text says what is wrong, where, and what to do."""


class Recorder:
    """What the store tells whoever keeps its changes. This one keeps nothing: the store in memory."""

    def changed(self, changes: Changes) -> None:
        """Record the changes of one revision."""

    def compacted(self, revision: int) -> None:
        """Record that a compaction was decided."""

    def dropped(self, records: Iterable[Record]) -> None:
        """Record that compaction has removed records. Need not be durable: it can be done again."""

    def granted(self, lease_id: int, ttl_s: int) -> None:
        """Record a new lease."""

    def revoked(self, lease_id: int) -> None:
        """Record that a lease is gone."""

    def auth_changed(self, rows: dict[str, bytes]) -> None:
        """Record users, roles and the rest of the auth store, whole."""

    def alarms_changed(self, alarms: list[Alarm]) -> None:
        """Record the alarms that are raised, all of them."""

    def commit(self) -> None:
        """Make everything recorded so far durable. Raises StoreDataError when that fails."""

    def close(self) -> None:
        """Close files."""


@dataclass(slots=True)
class Stored:
    """What a file holds."""

    cluster_id: int
    member_id: int
    revision: int
    compact_revision: int
    # In order of (mod_revision, sub_revision).
    records: list[Record]
    # (lease id, TTL in seconds)
    leases: list[tuple[int, int]]
    # As Auth.rows returned it.
    auth: dict[str, bytes]
    alarms: list[Alarm]
