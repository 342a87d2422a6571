"""Every bound and time of the core, with unit and reason; docs/evidence/limits.md is generated from them."""

from __future__ import annotations

from dataclasses import dataclass

_KIB = 1024
_MIB = 1024 * _KIB


@dataclass(slots=True, frozen=True)
class CoreLimits:
    """The settings of one Coalescer."""

    # Prefixes below which all ranges share one upstream watch, in the clients' keys; b"" is all keys.
    covers: tuple[bytes, ...] = ()
    # Upstream is another proxy, which may refuse a watch at a limit of its own. etcd has none.
    upstream_has_limits: bool = False

    # How long a trunk without watches is kept. Operators, and etcd's own tests, expect watches gone within a second.
    linger_s: float = 0.5
    # How long the history of such a trunk is kept after that, without an upstream watch: most clients reconnect within
    # this time after a restart. The bounds of histories apply to it as well.
    history_linger_s: float = 30.0
    # Maximum histories kept without an upstream watch; a further one replaces the oldest. Each costs about 2 KiB in
    # addition to its events.
    parked_max: int = 10_000

    # Maximum memory of the history of one trunk (of one range). A single batch larger than this is not kept. The index
    # of a cover adds at most an eighth.
    history_bytes_max: int = 16 * _MIB
    # Maximum memory of all histories together. The oldest batch of all is evicted first. The indexes of covers add at
    # most an eighth.
    history_bytes_total_max: int = 256 * _MIB
    # Maximum batches in the history of one trunk: bounds the overhead of small events.
    history_revisions_max: int = 20_000
    # How long a batch is kept: frees the memory of ranges that are no longer busy. Five minutes is Kubernetes'
    # compaction interval: older starts are mostly compacted anyway.
    history_age_s: float = 300.0

    # Maximum size of one response to a lagging watch, and of what one session gets before the next one's turn.
    replay_bytes_max: int = 1 * _MIB
    # Maximum bytes that all sessions together get in one turn of replaying, so that many of them do not delay live
    # events.
    replay_turn_bytes_max: int = 8 * _MIB
    # Maximum events examined for one response to a lagging watch, and for one session before the next one's turn:
    # filters may drop all of them, so bytes alone do not bound the work. About one millisecond.
    replay_events_max: int = 3_000
    # Maximum events examined for all sessions together between two timers: about three milliseconds.
    replay_turn_events_max: int = 6_000
    # Maximum size of a response with several revisions: gRPC clients accept 4 MiB by default, less the envelope.
    response_bytes_max: int = 4 * _MIB - 16 * _KIB
    # Size from which a response is split for watches with fragment: etcd's --max-request-bytes (1.5 MiB) + 512 KiB.
    fragment_bytes: int = 2 * _MIB

    # Maximum size of a catch-up response to a watch with fragment: etcd sends up to 1000 revisions in one run of
    # fragments. A run that reaches this size ends between two revisions; the rest is another run. One run per slow
    # session is held in memory.
    fragment_run_bytes_max: int = 12 * _MIB

    # Maximum watches of one session; further ones are refused. A watch costs about 0.5 KiB.
    watches_per_session_max: int = 100_000
    # Maximum watches of all sessions; further ones are refused.
    watches_max: int = 10_000_000
    # Maximum trunks; a create that needs a further one is refused, and a session whose watch would need one because
    # etcd has refused its cover is ended. Each is a watch at etcd and an object here.
    trunks_max: int = 1_000_000
    # Maximum queued requests of one session (a create waits for etcd); a further one ends the session.
    queue_max: int = 100_000
    # Maximum memory of the queued requests of one session; once reached, the shell reads no more requests until
    # TakeRequests, so that flow control slows the client down. About two thousand small requests.
    line_bytes_max: int = 1 * _MIB
    # Maximum watches that are created, decided, ended, taken from the queue for backfills or moved from a backfill to
    # their trunk in one step, and ranges that are closed; the rest follows at the next timer, which is due at once.
    # About five milliseconds.
    step_watches_max: int = 200

    # Maximum open backfills; watches that need a further one are queued. Each is a separate stream at etcd.
    backfills_max: int = 100
    # Maximum memory that a backfill holds for its slower watches before it is paused, or they leave it.
    backfill_bytes_max: int = 4 * _MIB
    # A watch shares a backfill that is at most this many revisions behind its start: ten of etcd's catch-up responses.
    backfill_share_revisions: int = 10_000
    # A trunk whose first watch starts in the past begins there if that is at most this many revisions ago, which is
    # what etcd sends in one catch-up response; with an older start, later watches would wait for the catch-up.
    trunk_catch_up_revisions: int = 1000

    # A trunk's bookmark is renewed at least this often, so that a break never resumes from an old, compacted revision.
    bookmark_s: float = 30.0
    # Minimum time between progress requests to etcd; requests of clients that arrive meanwhile share the next one. Each
    # request walks all waiting sessions, and locks etcd's watches. Clients ask every 100 ms (Kubernetes): a thousand of
    # them cost three requests in that time.
    progress_interval_s: float = 0.03
    # While a session waits for progress, etcd is asked again after this time: it drops requests it cannot answer.
    progress_retry_s: float = 0.1
    # Maximum pause between such requests; pauses double from progress_retry_s while no answer suffices.
    progress_retry_s_max: float = 1.0
    # Quiet watches that asked for progress_notify get progress at least this often, and at etcd's own interval
    # (--watch-progress-notify-interval) in any case.
    progress_notify_s: float = 600.0

    # A session that has been behind continuously for longer is ended; None = never. Age, not size: a false disconnect
    # under load is worse than a slow recovery.
    lagging_age_s_max: float | None = None

    @property
    def run_bytes_max(self) -> int:
        """The memory at which a run of fragments ends early; histories keep more, so no part of a run is evicted."""
        return min(self.fragment_run_bytes_max, min(self.history_bytes_max, self.history_bytes_total_max) * 3 // 4)
