"""The knobs of sharing watches; see `knobs` for what is made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from proxy.config.describing import KIB, MIB, Kind, knob


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """Sharing watches: how long, how much, and for whom."""

    linger_s: Annotated[
        float,
        knob(
            "Keep the upstream watch of a range open so long after its last client left. Longer: fewer watches opened "
            "at etcd when clients come and go; shorter: etcd is rid of the watch sooner.",
            Kind.SECONDS,
            ge=0,
        ),
    ] = 0.5
    history_linger_s: Annotated[
        float,
        knob(
            "Keep the recent events of a range so long after its upstream watch was closed: a client that comes back "
            "meanwhile goes on from there. 0: not at all.",
            Kind.SECONDS,
            ge=0,
        ),
    ] = 30.0
    parked_max: Annotated[
        int,
        knob(
            "Ranges whose recent events are kept without an upstream watch; one more, and the oldest goes.",
            Kind.COUNT,
            ge=0,
            advanced=True,
        ),
    ] = 10_000
    watch_progress_notify_interval_s: Annotated[
        float,
        knob(
            "Send progress at least this often to quiet watches that asked for progress_notify. They get it at "
            "etcd's own interval in any case; this can only make it more frequent.",
            Kind.SECONDS,
            gt=0,
            from_etcd=True,
        ),
    ] = 600.0
    history_bytes_total_max: Annotated[
        int,
        knob(
            "Memory for recent events of all ranges together. From it watches that start in the past or fell "
            "behind are served without asking etcd; the oldest events go first.",
            Kind.BYTES,
            ge=0,
        ),
    ] = 256 * MIB
    history_bytes_max: Annotated[
        int,
        knob(
            "Memory for recent events of one range. More: deeper starts in the past without a watch of their own "
            "at etcd.",
            Kind.BYTES,
            ge=0,
            advanced=True,
        ),
    ] = 16 * MIB
    history_revisions_max: Annotated[
        int,
        knob(
            "Revisions remembered of one range; bounds what many small events cost beside their bytes.",
            Kind.COUNT,
            ge=1,
            advanced=True,
        ),
    ] = 20_000
    history_age_s: Annotated[
        float,
        knob(
            "How long events are remembered; frees the memory of ranges that were busy once.",
            Kind.SECONDS,
            ge=0,
            advanced=True,
        ),
    ] = 300.0
    lagging_age_s_max: Annotated[
        float,
        knob(
            "End the stream of a client that has been behind without a break for longer. 0: never; a slow client "
            "costs nobody but itself.",
            Kind.SECONDS,
            ge=0,
        ),
    ] = 0.0
    watches_max: Annotated[
        int, knob("Watches of all clients; more are refused. A watch costs about 0.5 KiB.", Kind.COUNT, ge=1)
    ] = 10_000_000
    watches_per_session_max: Annotated[
        int, knob("Watches on one stream; more are refused.", Kind.COUNT, ge=1, advanced=True)
    ] = 100_000
    queue_max: Annotated[
        int,
        knob("Requests of one stream that wait for etcd; one more ends the stream.", Kind.COUNT, ge=1, advanced=True),
    ] = 100_000
    trunks_max: Annotated[
        int,
        knob(
            "Different ranges watched at etcd; a watch that would need one more is refused.",
            Kind.COUNT,
            ge=1,
            advanced=True,
        ),
    ] = 1_000_000
    backfills_max: Annotated[
        int,
        knob(
            "Private catch-up watches open at etcd at once; watches that need one more wait. More: faster after "
            "many deep starts; each is a stream at etcd.",
            Kind.COUNT,
            ge=1,
            advanced=True,
        ),
    ] = 100
    backfill_bytes_max: Annotated[
        int,
        knob(
            "What a shared catch-up watch may hold for its slower watches before these get one of their own.",
            Kind.BYTES,
            ge=0,
            advanced=True,
        ),
    ] = 4 * MIB
    backfill_share_revisions: Annotated[
        int,
        knob(
            "A watch shares a catch-up watch that is at most so many revisions behind what it needs.",
            Kind.COUNT,
            ge=0,
            advanced=True,
        ),
    ] = 10_000
    trunk_catch_up_revisions: Annotated[
        int,
        knob(
            "The first watch of a range takes the shared upstream watch back so many revisions at most; older "
            "starts get a catch-up watch, so that later watches need not wait.",
            Kind.COUNT,
            ge=0,
            advanced=True,
        ),
    ] = 1000
    replay_bytes_max: Annotated[
        int,
        knob(
            "Size of the responses joined for a client that catches up. More: fewer, larger messages.",
            Kind.BYTES,
            ge=1,
            advanced=True,
        ),
    ] = MIB
    fragment_run_bytes_max: Annotated[
        int,
        knob(
            "Size of what a watch with fragment that catches up is sent as one response, in fragments; more is another "
            "response. A client that reads slowly has so much in memory.",
            Kind.BYTES,
            ge=1,
            advanced=True,
        ),
    ] = 12 * MIB
    replay_turn_bytes_max: Annotated[
        int,
        knob(
            "What all clients that catch up are given before live events have their turn again.",
            Kind.BYTES,
            ge=1,
            advanced=True,
        ),
    ] = 8 * MIB
    response_bytes_max: Annotated[
        int,
        knob(
            "Responses joined of several revisions stay below; a default gRPC client takes 4 MiB.",
            Kind.BYTES,
            ge=1,
            advanced=True,
        ),
    ] = 4 * MIB - 16 * KIB
    fragment_bytes: Annotated[
        int,
        knob(
            "From this size on a response is split for watches that asked for fragments, as etcd does.",
            Kind.BYTES,
            ge=1,
            advanced=True,
        ),
    ] = 2 * MIB
    bookmark_s: Annotated[
        float,
        knob(
            "Ask etcd this often how far quiet ranges are, so that no break resumes from a revision compacted "
            "meanwhile.",
            Kind.SECONDS,
            gt=0,
            advanced=True,
        ),
    ] = 30.0
    progress_interval_s: Annotated[
        float,
        knob(
            "Ask etcd for progress at most so often; clients that ask meanwhile share the next request.",
            Kind.SECONDS,
            ge=0,
            advanced=True,
        ),
    ] = 0.03
    progress_retry_s: Annotated[
        float,
        knob(
            "While a client waits for progress, ask etcd again after this: etcd drops requests that it cannot answer.",
            Kind.SECONDS,
            gt=0,
            advanced=True,
        ),
    ] = 0.1
    progress_retry_s_max: Annotated[
        float,
        knob(
            "The longest pause between such requests; they double from the first one.",
            Kind.SECONDS,
            gt=0,
            advanced=True,
        ),
    ] = 1.0
