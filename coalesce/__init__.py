"""The core: merges the watches of many sessions into one upstream watch per range.

Pure and synchronous: no I/O, no clock, no randomness, no tasks, no logging. Of gRPC it knows only the message prefix
and a few status codes. A `Coalescer` is driven by its caller: inputs in, effects returned, time as an argument. `core`
documents the protocol; `guarantees` holds the checkers of what the core promises.

Its modules, from the bottom up; each imports and calls only modules before it:

- values: `limits`, `stats`, `timers`, `ahead`, `place`, `pending`, `inputs`, `ranges`, `suggesting`, `batch`, `history`
- state: `model` (sessions, watches, sources), `cover`, `listing` (of groups), `effects`, `state`,
  `fanout` (batches to watches)
- progress: `waiting`, `progress_requests`, `notifying`, `progress`
- placement: `placement` (places and backfills), `replay`, `runs` (of fragments)
- life of watches: `revision_reads`, `trunk`, `moving` (to and from covers), `ending` (cancellation), `losing`,
  `joining` (admission)
- interface: `core` has one method for each input; `invariants` and `report` only read
"""

from coalesce.batch import Payload
from coalesce.core import Coalescer
from coalesce.effects import (
    CheckPermission,
    CloseUpstream,
    Deliver,
    Effect,
    EndSession,
    OpenUpstream,
    PauseUpstream,
    ReadRevision,
    RequestProgress,
    ResumeUpstream,
    Send,
    TakeRequests,
)
from coalesce.inputs import CreateRefusal, CreateRequest, Granted, Identity, UpstreamLost
from coalesce.limits import CoreLimits
from coalesce.model import PendingCreate, PendingRead, Session, Upstream, Watch
from coalesce.stats import Stats

__all__ = [
    "CheckPermission",
    "CloseUpstream",
    "Coalescer",
    "CoreLimits",
    "CreateRefusal",
    "CreateRequest",
    "Deliver",
    "Effect",
    "EndSession",
    "Granted",
    "Identity",
    "OpenUpstream",
    "PauseUpstream",
    "Payload",
    "PendingCreate",
    "PendingRead",
    "ReadRevision",
    "RequestProgress",
    "ResumeUpstream",
    "Send",
    "Session",
    "Stats",
    "TakeRequests",
    "Upstream",
    "UpstreamLost",
    "Watch",
]
