"""The lessor: leases, their expiry, and the keys attached to them.

Pure: time is passed in (`now`, seconds, monotonic), and expired leases are only listed; revoking one is an ordinary
write, which the caller runs. The keys of a lease are derived from the changes that the store commits, so that a lease
can never contradict the records. Source: etcd server/lease/lessor.go.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from upstream.store import errors
from upstream.store.errors import StoreError
from upstream.store.index import RevisionRecord

NO_LEASE = 0
TTL_MAX_S = 9_000_000_000
"""etcd's MaxLeaseTTL."""

TTL_MIN_S = 2
"""A shorter TTL is raised to this: etcd's minimum is 1.5 election timeouts of 1 s, rounded up."""

REVOKES_PER_STEP_MAX = 500
"""Leases revoked per check: etcd revokes 1000 a second, checking twice a second."""

EXPIRY_CHECK_INTERVAL_S = 0.5
"""Interval of the check for expired leases, as in etcd."""


@dataclass(slots=True, eq=False)
class Lease:
    """One lease."""

    lease_id: int
    # Seconds, as granted.
    ttl_s: int
    # When it expires unless renewed, in the caller's clock.
    expires_at: float
    keys: set[bytes] = field(default_factory=set)

    def remaining_s(self, now: float) -> float:
        """Return the seconds left, negative once expired."""
        return self.expires_at - now


class Lessor:
    """All leases of the store."""

    def __init__(self, ttl_min_s: int = TTL_MIN_S) -> None:
        self.ttl_min_s = ttl_min_s
        self._leases: dict[int, Lease] = {}
        self._by_key: dict[bytes, Lease] = {}
        # (expires_at, lease id); outdated entries are corrected when they reach the front.
        self._expiries: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._leases)

    def exists(self, lease_id: int) -> bool:
        """Return whether a lease exists (it may have expired, but not been revoked yet)."""
        return lease_id in self._leases

    def grant(self, lease_id: int, ttl_s: int, now: float) -> Lease:
        """Grant a lease with the given id. Raises StoreError."""
        if lease_id == NO_LEASE:
            raise StoreError(errors.LEASE_NOT_FOUND)
        if ttl_s > TTL_MAX_S:
            raise StoreError(errors.LEASE_TTL_TOO_LARGE)
        if lease_id in self._leases:
            raise StoreError(errors.LEASE_EXISTS)
        ttl_s = max(ttl_s, self.ttl_min_s)
        lease = Lease(lease_id, ttl_s, now + ttl_s)
        self._leases[lease_id] = lease
        heapq.heappush(self._expiries, (lease.expires_at, lease_id))
        return lease

    def renew(self, lease_id: int, now: float) -> int:
        """Renew a lease; return its TTL in seconds. Raises StoreError when it does not exist or has expired."""
        lease = self.live(lease_id, now)
        lease.expires_at = now + lease.ttl_s
        return lease.ttl_s

    def live(self, lease_id: int, now: float) -> Lease:
        """Return a lease that has not expired. Raises StoreError."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.expires_at <= now:
            raise StoreError(errors.LEASE_NOT_FOUND)
        return lease

    def keys(self, lease_id: int) -> list[bytes]:
        """Return a lease's keys in order, which a revoke deletes. Raises StoreError for an unknown lease."""
        lease = self._leases.get(lease_id)
        if lease is None:
            raise StoreError(errors.LEASE_NOT_FOUND)
        return sorted(lease.keys)

    def keys_of(self, lease_id: int) -> list[bytes]:
        """Return a lease's keys in order; none for an unknown lease."""
        lease = self._leases.get(lease_id)
        return [] if lease is None else sorted(lease.keys)

    def drop(self, lease_id: int) -> None:
        """Remove a lease whose keys are deleted."""
        lease = self._leases.pop(lease_id)
        for key in lease.keys:
            del self._by_key[key]

    def leases(self) -> list[Lease]:
        """Return all leases, in order of expiry."""
        return sorted(self._leases.values(), key=lambda lease: lease.expires_at)

    def follow(self, changes: Iterable[RevisionRecord]) -> None:
        """Attach and detach keys according to a commit's changes."""
        for record in changes:
            before = self._by_key.get(record.key)
            if before is None and not record.lease:
                continue
            after = self._leases[record.lease] if record.lease else None
            if after is before:
                continue
            if before is not None:
                before.keys.discard(record.key)
                del self._by_key[record.key]
            if after is not None:
                after.keys.add(record.key)
                self._by_key[record.key] = after

    def expired(self, now: float) -> list[int]:
        """Return ids of expired leases, at most REVOKES_PER_STEP_MAX; they are returned again until dropped."""
        due: dict[int, None] = {}
        again: set[tuple[float, int]] = set()
        while self._expiries and self._expiries[0][0] <= now and len(due) < REVOKES_PER_STEP_MAX:
            _, lease_id = heapq.heappop(self._expiries)
            lease = self._leases.get(lease_id)
            if lease is None:
                continue
            if lease.expires_at <= now:
                due[lease_id] = None
            again.add((lease.expires_at, lease_id))
        for entry in again:
            heapq.heappush(self._expiries, entry)
        return list(due)
