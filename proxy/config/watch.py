"""The settings of watch sharing; see `proxy.config.knobs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from proxy.config.describing import KIB, MIB, Kind, knob


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchTable:
    """Watch sharing: history, limits and progress."""

    linger_s: Annotated[
        float,
        knob(
            "How long to keep the upstream watch of a range after its last client watch has ended. Longer: fewer "
            "watch creations at etcd when clients come and go. Shorter: fewer idle watches at etcd.",
            Kind.SECONDS,
            ge=0,
        ),
    ] = 0.5
    history_linger_s: Annotated[
        float,
        knob(
            "How long to keep the recent events of a range after its upstream watch was closed; a client that returns "
            "within this time continues from them. 0 disables it.",
            Kind.SECONDS,
            ge=0,
        ),
    ] = 30.0
    parked_max: Annotated[
        int,
        knob(
            "Maximum ranges whose recent events are kept without an upstream watch; beyond it, the oldest is dropped.",
            Kind.COUNT,
            ge=0,
            advanced=True,
        ),
    ] = 10_000
    watch_progress_notify_interval_s: Annotated[
        float,
        knob(
            "Maximum interval of progress notifications for idle watches that requested progress_notify. They always "
            "get them at etcd's own interval; this setting can only make them more frequent.",
            Kind.SECONDS,
            gt=0,
            from_etcd=True,
        ),
    ] = 600.0
    history_bytes_total_max: Annotated[
        int,
        knob(
            "Memory for the recent events of all ranges. Watches that start in the past or lag behind are served from "
            "it, without etcd; the oldest events are evicted first.",
            Kind.BYTES,
            ge=0,
        ),
    ] = 256 * MIB
    history_bytes_max: Annotated[
        int,
        knob(
            "Memory for the recent events of one range. More memory serves older start revisions without a separate "
            "watch at etcd.",
            Kind.BYTES,
            ge=0,
            advanced=True,
        ),
    ] = 16 * MIB
    history_revisions_max: Annotated[
        int,
        knob(
            "Maximum revisions kept for one range; bounds the overhead of many small events.",
            Kind.COUNT,
            ge=1,
            advanced=True,
        ),
    ] = 20_000
    history_age_s: Annotated[
        float,
        knob(
            "Maximum age of kept events; frees the memory of ranges that are no longer busy.",
            Kind.SECONDS,
            ge=0,
            advanced=True,
        ),
    ] = 300.0
    lagging_age_s_max: Annotated[
        float,
        knob(
            "End the stream of a client that has lagged without interruption for longer than this. 0: never (a slow "
            "client does not affect others).",
            Kind.SECONDS,
            ge=0,
        ),
    ] = 0.0
    watches_max: Annotated[
        int,
        knob(
            "Maximum watches of all clients; further ones are refused. A watch costs about 0.5 KiB.", Kind.COUNT, ge=1
        ),
    ] = 10_000_000
    watches_per_session_max: Annotated[
        int, knob("Maximum watches on one stream; further ones are refused.", Kind.COUNT, ge=1, advanced=True)
    ] = 100_000
    queue_max: Annotated[
        int,
        knob(
            "Maximum requests of one stream that wait for etcd; one more ends the stream.",
            Kind.COUNT,
            ge=1,
            advanced=True,
        ),
    ] = 100_000
    trunks_max: Annotated[
        int,
        knob(
            "Maximum distinct ranges watched at etcd; a watch that needs another one is refused.",
            Kind.COUNT,
            ge=1,
            advanced=True,
        ),
    ] = 1_000_000
    backfills_max: Annotated[
        int,
        knob(
            "Maximum concurrent catch-up watches (backfills) at etcd; watches that need another one wait. More: "
            "clients with old start revisions catch up faster, at the cost of one stream at etcd each.",
            Kind.COUNT,
            ge=1,
            advanced=True,
        ),
    ] = 100
    backfill_bytes_max: Annotated[
        int,
        knob(
            "Maximum size of responses that a shared backfill buffers for its slower watches; beyond it, these get a "
            "backfill of their own.",
            Kind.BYTES,
            ge=0,
            advanced=True,
        ),
    ] = 4 * MIB
    backfill_share_revisions: Annotated[
        int,
        knob(
            "A watch shares an existing backfill if that is at most this many revisions behind the revision the watch "
            "needs.",
            Kind.COUNT,
            ge=0,
            advanced=True,
        ),
    ] = 10_000
    trunk_catch_up_revisions: Annotated[
        int,
        knob(
            "The first watch of a range may start the shared upstream watch at most this many revisions in the past. "
            "Older starts use a backfill, so that later watches need not wait.",
            Kind.COUNT,
            ge=0,
            advanced=True,
        ),
    ] = 1000
    replay_bytes_max: Annotated[
        int,
        knob(
            "Maximum size of a response that joins several revisions for a client that catches up. More: fewer, "
            "larger messages.",
            Kind.BYTES,
            ge=1,
            advanced=True,
        ),
    ] = MIB
    fragment_run_bytes_max: Annotated[
        int,
        knob(
            "Maximum size of one response to a catching-up watch with fragment, sent in fragments; more data goes "
            "into further responses. A slow client may hold this much in memory.",
            Kind.BYTES,
            ge=1,
            advanced=True,
        ),
    ] = 12 * MIB
    replay_turn_bytes_max: Annotated[
        int,
        knob(
            "Maximum bytes replayed to all catching-up clients before live events are delivered again.",
            Kind.BYTES,
            ge=1,
            advanced=True,
        ),
    ] = 8 * MIB
    response_bytes_max: Annotated[
        int,
        knob(
            "Maximum size of a response that joins several revisions; a gRPC client accepts 4 MiB by default.",
            Kind.BYTES,
            ge=1,
            advanced=True,
        ),
    ] = 4 * MIB - 16 * KIB
    fragment_bytes: Annotated[
        int,
        knob(
            "Split responses of at least this size for watches that requested fragment, as etcd does.",
            Kind.BYTES,
            ge=1,
            advanced=True,
        ),
    ] = 2 * MIB
    bookmark_s: Annotated[
        float,
        knob(
            "Interval at which the proxy requests progress for idle ranges from etcd, so that it never resumes from a "
            "revision that has been compacted meanwhile.",
            Kind.SECONDS,
            gt=0,
            advanced=True,
        ),
    ] = 30.0
    progress_interval_s: Annotated[
        float,
        knob(
            "Minimum interval between progress requests to etcd; clients that request progress in between share the "
            "next request.",
            Kind.SECONDS,
            ge=0,
            advanced=True,
        ),
    ] = 0.03
    progress_retry_s: Annotated[
        float,
        knob(
            "Repeat a progress request after this time while a client waits for the answer: etcd drops requests that "
            "it cannot answer yet.",
            Kind.SECONDS,
            gt=0,
            advanced=True,
        ),
    ] = 0.1
    progress_retry_s_max: Annotated[
        float,
        knob(
            "Maximum interval between repeated progress requests; the interval doubles from --progress-retry.",
            Kind.SECONDS,
            gt=0,
            advanced=True,
        ),
    ] = 1.0
