"""Counters and gauges of a core, as plain attributes: whoever serves metrics reads them, nobody is called."""

from __future__ import annotations

from dataclasses import dataclass, field

LIMITS_REFUSED = ("watches_max", "watches_per_session_max", "trunks_max", "queue_max", "lagging_age_s_max")
"""Limits at which something is refused or ended, by their names in Limits."""

LIMITS_EVICTED = (
    "history_bytes_max",
    "history_revisions_max",
    "history_bytes_total_max",
    "history_age_s",
    "history_linger_s",
    "parked_max",
)
"""Limits at which a batch of a history is given up."""


@dataclass(slots=True)
class Stats:
    """What a core has done, and what it holds. Gauges are checked against a recount by `check()`."""

    # Gauges: how many there are now.
    sessions: int = 0
    watches: int = 0
    trunks: int = 0
    # Histories that are kept without an upstream watch.
    parked: int = 0
    backfills: int = 0
    # Watches that are behind their source, or wait for one: their session stalled, or they are being replayed.
    lagging: int = 0
    # Watches that wait for a backfill because backfills_max are open.
    queued: int = 0
    # Memory of the requests that wait in line, of all sessions, in bytes.
    line_bytes: int = 0
    # Ids of watches that a compaction cancelled and whose clients have not cancelled them yet.
    ids_kept: int = 0
    # Memory of all histories, backfills' windows included, in bytes.
    history_bytes: int = 0
    history_batches: int = 0

    # Counters of joins, by how they were served.
    joins_live: int = 0
    joins_future: int = 0
    joins_history: int = 0
    joins_backfill: int = 0

    # Counters of what clients asked and were told.
    creates: int = 0
    refused: int = 0
    cancels: int = 0
    compacted: int = 0
    progress_requests: int = 0
    progress_answers: int = 0
    progress_notifies: int = 0
    sessions_ended: int = 0

    # Counters of what went to clients: payloads times watches, and the same for events.
    delivered: int = 0
    delivered_events: int = 0
    # Payloads joined from history for lagging watches, handed back by the shell, and sessions stalled.
    replays: int = 0
    returned: int = 0
    stalls: int = 0

    # Counters of what was asked of etcd.
    upstreams_opened: int = 0
    reads: int = 0
    checks: int = 0
    progress_asked: int = 0
    upgrades: int = 0
    # Trunks opened again from a history that had been kept.
    resumed: int = 0
    # Batches that came from upstream, and their events.
    batches: int = 0
    batch_events: int = 0

    # Refusals and ends of sessions, by the limit that was reached; batches evicted, by the limit that did it.
    refused_at: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LIMITS_REFUSED, 0))
    evicted_at: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LIMITS_EVICTED, 0))
