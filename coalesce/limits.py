"""Every bound and time of the core, each with its unit and its reason. ARCHITECTURE.md repeats the table."""

from __future__ import annotations

from dataclasses import dataclass

_KIB = 1024
_MIB = 1024 * _KIB


@dataclass(slots=True, frozen=True)
class CoreLimits:
    """The settings of one Coalescer."""

    # How long a trunk without watches is kept. Operators, and etcd's own tests, expect watches gone within a second.
    linger_s: float = 0.5
    # How long its history is kept after that, without an upstream watch: clients come back within this time after most
    # restarts of theirs. The bounds of histories hold for it as well.
    history_linger_s: float = 30.0
    # Histories kept so; one more, and the one kept longest goes. Each costs about 2 KiB beside its events.
    parked_max: int = 10_000

    # History of one trunk: memory per range. A batch that is larger on its own is not kept at all.
    history_bytes_max: int = 16 * _MIB
    # History of all trunks together: memory of the process. The oldest batch of all goes first.
    history_bytes_total_max: int = 256 * _MIB
    # Batches of one trunk's history: bounds what small events cost beside their bytes.
    history_revisions_max: int = 20_000
    # How long a batch is kept: memory of ranges that were busy once. Five minutes is Kubernetes' compaction interval:
    # older starts are mostly compacted anyway.
    history_age_s: float = 300.0

    # Size of a response joined for a lagging watch, and of what one session is given before others have their turn.
    replay_bytes_max: int = 1 * _MIB
    # What all sessions together are given in one turn of replaying, so that a herd does not hold up live events.
    replay_turn_bytes_max: int = 8 * _MIB
    # Events looked at for one response of a lagging watch, and for one session before others have their turn: filters
    # may leave nothing of them, so bytes alone do not bound the work. About one millisecond.
    replay_events_max: int = 3_000
    # What all sessions together may have looked at between two rings of the timer: about three milliseconds.
    replay_turn_events_max: int = 6_000
    # A response of several revisions stays below: a default gRPC client takes 4 MiB, with room for the envelope.
    response_bytes_max: int = 4 * _MIB - 16 * _KIB
    # From here on a response is split for watches with fragment: etcd's --max-request-bytes (1.5 MiB) + 512 KiB.
    fragment_bytes: int = 2 * _MIB

    # A catch-up response for a watch with fragment: etcd sends it in one run of fragments, of up to 1000 revisions. A
    # run this large ends between two revisions, and the rest is another one. Who reads slowly has one in memory.
    fragment_run_bytes_max: int = 12 * _MIB

    # Watches of one session; more are refused. A watch costs about 0.5 KiB.
    watches_per_session_max: int = 100_000
    # Watches of all sessions; more are refused.
    watches_max: int = 10_000_000
    # Trunks; a create that would need one more is refused. Each is a watch at etcd and an object here.
    trunks_max: int = 1_000_000
    # Requests of one session that wait in order (a create waits for etcd); one more ends the session.
    queue_max: int = 100_000
    # Memory of the requests of one session that wait; from here on the shell hands in no more of them (TakeRequests
    # says when to go on), so that a client is held up by its windows. Some two thousand small ones.
    line_bytes_max: int = 1 * _MIB
    # Watches that begin, end or are decided about in one step, and ranges that are given up; what is beyond comes with
    # the next ring of the timer, which is due at once. Some five milliseconds.
    step_watches_max: int = 200

    # Backfills open at once; watches that need one more wait in line. Each is a stream of its own at etcd.
    backfills_max: int = 100
    # What a backfill may hold for its slower sharers before it is paused, or they leave it.
    backfill_bytes_max: int = 4 * _MIB
    # A watch shares a backfill that is at most so many revisions behind its need: ten of etcd's catch-up responses.
    backfill_share_revisions: int = 10_000
    # A trunk whose first watch starts in the past begins there itself if that is at most so many revisions ago, what
    # etcd sends in one catch-up response; older, and later watches would wait behind the catch-up.
    trunk_catch_up_revisions: int = 1000

    # A trunk's bookmark is renewed at least this often, so that a break never resumes from an old, compacted revision.
    bookmark_s: float = 30.0
    # Progress is asked for at most so often: who comes meanwhile shares the next request. Each walks all sessions that
    # wait, and locks etcd's watches. Clients ask every 100 ms (Kubernetes): a thousand of them make three of it.
    progress_interval_s: float = 0.03
    # While somebody waits for progress, upstream is asked again after this: etcd drops requests it cannot answer.
    progress_retry_s: float = 0.1
    # The longest pause between such requests; they double from progress_retry_s while nothing comes of them.
    progress_retry_s_max: float = 1.0
    # Quiet watches that asked for progress_notify get progress at least this often, and at etcd's own interval
    # (--watch-progress-notify-interval) in any case.
    progress_notify_s: float = 600.0

    # A session that has been behind without a break for longer is ended; None = never. Age, not size: a false
    # disconnect under load is worse than a slow recovery.
    lagging_age_s_max: float | None = None
