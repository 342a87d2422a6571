"""The places of a watch."""

from __future__ import annotations

from enum import Enum


class Place(Enum):
    """Where a watch is; exactly one of these applies."""

    # In a group of its source: gets each batch as it arrives, if the batch does not begin below its position.
    IN_STEP = "in step"
    # In its source's heap: needs nothing before its position, which the source has not reached.
    AHEAD = "ahead"
    # In its session's `lagging`: has events to be replayed, or has lost its source and needs another one.
    LAGGING = "lagging"
    # Queued for a backfill.
    QUEUED = "queued"
    # Cancelled, or its session has ended.
    ENDED = "ended"
