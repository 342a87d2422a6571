"""Values that the shell passes to the core, besides decoded responses: requests, identities, answers to effects.

Plain values without behaviour. They are separate from the core's logic so that each caller (the engine, the simulator,
a test) can create them without knowing how it works.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from proto.scan import Header

# watch_id of answers that belong to no watch: refusals and progress for a whole session (clientv3.InvalidWatchID).
NO_WATCH_ID = -1


@dataclass(slots=True, frozen=True)
class Identity:
    """The identity of a session, from the metadata of its stream."""

    # The auth token that the client sent; None if it sent none.
    token: bytes | None = None
    # The client sent `hasleader: true`: without a leader its session ends instead of waiting.
    has_leader: bool = False


class CreateRequest(NamedTuple):
    """A WatchCreateRequest as received, except that "now" is None here, where the wire has 0."""

    # b"" means b"\x00", the smallest key; the core replaces it.
    key: bytes
    # b"" = the single key; b"\x00" = every key >= key; else the first key that is not watched.
    range_end: bytes = b""
    # The first revision wanted; None = now; a negative one is refused, as etcd does.
    start_revision: int | None = None
    # 0 = the core assigns one.
    watch_id: int = 0
    progress_notify: bool = False
    no_put: bool = False
    no_delete: bool = False
    prev_kv: bool = False
    fragment: bool = False


@dataclass(slots=True, frozen=True)
class Granted:
    """A permission check that passed and also read the store's revision.

    `header` is a read of "now" for the create: the call that returned it was linearizable and began after
    CheckPermission was carried out. An answer of an earlier probe does not qualify: pass None, or the bare Header
    (which then only updates the newest revision known).
    """

    header: Header


@dataclass(slots=True, frozen=True)
class CreateRefusal:
    """A permission check that failed; `text` is the cancel_reason that the client gets, verbatim."""

    text: str


@dataclass(slots=True, frozen=True)
class UpstreamLost:
    """Why an upstream watch has ended and is not resumed: a gRPC status code and its text."""

    status: int
    text: str
