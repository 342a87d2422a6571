"""What the shell hands to the core, beside bytes it has scanned: requests, identities, answers to effects.

Plain values without behaviour. They are apart from the machine so that whoever speaks to the core (the engine, the
simulator, a test) can make them without knowing how it works.
"""

from __future__ import annotations

from dataclasses import dataclass

from proto.scan import Header

# watch_id of answers that belong to no watch: refusals and progress for a whole session (clientv3.InvalidWatchID).
NO_WATCH_ID = -1


@dataclass(slots=True, frozen=True)
class Identity:
    """Who a session is, from the metadata of its stream."""

    # The auth token the client sent, None when it sent none.
    token: bytes | None = None
    # The client sent `hasleader: true`: without a leader its session ends instead of waiting.
    has_leader: bool = False


@dataclass(slots=True, frozen=True)
class CreateRequest:
    """A WatchCreateRequest as it came; only "now" is None here, where the wire has 0."""

    # b"" means b"\x00", the smallest key; the core makes it so.
    key: bytes
    # b"" = the single key; b"\x00" = every key >= key; else the first key that is not watched.
    range_end: bytes = b""
    # The first revision wanted; None = now; negative is refused as etcd does.
    start_revision: int | None = None
    # 0 = the core chooses.
    watch_id: int = 0
    progress_notify: bool = False
    no_put: bool = False
    no_delete: bool = False
    prev_kv: bool = False
    fragment: bool = False


@dataclass(slots=True, frozen=True)
class Granted:
    """A permission check that passed and, by the way, read the store's revision.

    `header` is a read of "now" for the create that asked: the call that brought it was linearizable and began after
    CheckPermission was carried out. An answer from a shared or an earlier probe is no such thing: hand in None, or the
    bare Header (which then only tells the newest revision known).
    """

    header: Header


@dataclass(slots=True, frozen=True)
class CreateRefusal:
    """A permission check that did not pass; `text` is the cancel_reason the client gets, word for word."""

    text: str


@dataclass(slots=True, frozen=True)
class UpstreamLost:
    """Why an upstream watch is over for good: a gRPC status code and its text."""

    status: int
    text: str
