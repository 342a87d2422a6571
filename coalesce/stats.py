"""Counters and gauges of a core, as plain attributes that the metrics endpoint reads; there are no callbacks."""

from __future__ import annotations

from dataclasses import dataclass, field

LIMITS_REFUSED = ("watches_max", "watches_per_session_max", "trunks_max", "queue_max", "lagging_age_s_max")
"""Limits at which a create is refused or a session is ended, by their names in CoreLimits."""

LIMITS_EVICTED = (
    "history_bytes_max",
    "history_revisions_max",
    "history_bytes_total_max",
    "history_age_s",
    "history_linger_s",
    "parked_max",
)
"""Limits at which a batch of a history is evicted."""


@dataclass(slots=True)
class CoverStats:
    """Counters of one configured cover, over all upstream watches that it has had."""

    # When it was first used, in the time of the core.
    since: float = 0.0
    # Events that etcd sent for it, and their bytes; and those of keys that no client watches.
    events: int = 0
    bytes: int = 0
    unwanted_events: int = 0
    unwanted_bytes: int = 0
    # Times etcd refused it. While it does, the ranges have upstream watches of their own; `problem` says why.
    refused: int = 0
    problem: str = ""


@dataclass(slots=True)
class Stats:
    """Counters and gauges of one core. `invariants.check` compares the gauges with a recount."""

    # Gauges: current numbers.
    sessions: int = 0
    watches: int = 0
    trunks: int = 0
    # Histories kept without an upstream watch.
    parked: int = 0
    backfills: int = 0
    # Watches that are behind their source, or have none: their session is stalled, or they are being replayed.
    lagging: int = 0
    # Watches that wait for a backfill because backfills_max are open.
    queued: int = 0
    # Memory of the queued requests of all sessions, in bytes.
    line_bytes: int = 0
    # Ids of watches that a compaction cancelled and that their clients have not cancelled yet.
    ids_kept: int = 0
    # Memory of all histories, backfills' windows included, in bytes.
    history_bytes: int = 0
    history_batches: int = 0
    # Age of the oldest bookmark of a trunk in seconds, when the bookmarks were last looked at.
    bookmark_age_s: float = 0.0

    # Counters of joins, by how the watch was served.
    joins_live: int = 0
    joins_future: int = 0
    joins_history: int = 0
    joins_backfill: int = 0

    # Counters of clients' requests and their answers.
    creates: int = 0
    refused: int = 0
    cancels: int = 0
    compacted: int = 0
    progress_requests: int = 0
    progress_answers: int = 0
    progress_notifies: int = 0
    sessions_ended: int = 0

    # Counters of deliveries: payloads times watches, and events times watches.
    delivered: int = 0
    delivered_events: int = 0
    # Payloads joined from history for lagging watches, payloads returned by the shell, and sessions stalled.
    replays: int = 0
    returned: int = 0
    stalls: int = 0

    # Counters of requests to etcd.
    upstreams_opened: int = 0
    reads: int = 0
    checks: int = 0
    progress_asked: int = 0
    upgrades: int = 0
    # Parked trunks that were reopened.
    resumed: int = 0
    # Watches moved between trunks and covers.
    moved: int = 0
    # Batches received from upstream, and their events.
    batches: int = 0
    batch_events: int = 0

    # Refusals and ends of sessions, by the limit that was reached; batches evicted, by the limit that was exceeded.
    refused_at: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LIMITS_REFUSED, 0))
    evicted_at: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LIMITS_EVICTED, 0))

    # By prefix.
    covers: dict[bytes, CoverStats] = field(default_factory=dict)
