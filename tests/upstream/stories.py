"""The language of the watch client's tests: watches, responses, and effects in a few words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proto.pb import kv_pb2, rpc_pb2
from proto.scan import WatchResponse, scan_watch_response
from upstream.watching.effects import (
    CloseStream,
    HeaderSeen,
    OpenStream,
    Progressed,
    TokenRefused,
    WatchEffect,
    WatchLost,
    WatchReceived,
    WriteMessage,
)
from upstream.watching.state import WatchState
from upstream.watching.stream import OpenedWatch, WatchStream


@dataclass(eq=False)
class Opened:
    """A watch as the proxy's engine would open it."""

    key: bytes = b"k"
    range_end: bytes = b""
    start_revision: int | None = None
    prev_kv: bool = False
    is_backfill: bool = False
    watchers: int = 1
    token: bytes | None = None

    def __repr__(self) -> str:
        return self.key.decode()


def answer(
    watch_id: int,
    header_revision: int,
    events: Sequence[int] = (),
    *,
    created: bool = False,
    canceled: bool = False,
    compact_revision: int = 0,
    cancel_reason: str = "",
    fragment: bool = False,
) -> WatchResponse:
    """Return a response as the scanner would; `events` are their revisions."""
    message = rpc_pb2.WatchResponse(
        header=rpc_pb2.ResponseHeader(cluster_id=7, member_id=8, revision=header_revision, raft_term=2),
        watch_id=watch_id,
        created=created,
        canceled=canceled,
        compact_revision=compact_revision,
        cancel_reason=cancel_reason,
        fragment=fragment,
        events=[kv_pb2.Event(kv=kv_pb2.KeyValue(key=b"k", mod_revision=revision)) for revision in events],
    )
    return scan_watch_response(message.SerializeToString())


def refusal(header_revision: int) -> WatchResponse:
    """Return etcd's answer to a create of an empty range."""
    reason = "mvcc: watcher range is empty"
    return answer(-1, header_revision, created=True, canceled=True, cancel_reason=reason)


def revisions(response: WatchResponse) -> list[int]:
    """Return the revisions of a response's events."""
    return [event.revision for event in response.events]


def request(message: bytes) -> str:
    """Return a WatchRequest in words."""
    decoded = rpc_pb2.WatchRequest.FromString(message)
    kind = decoded.WhichOneof("request_union")
    if kind == "create_request":
        create = decoded.create_request
        if create.key == create.range_end:
            return "probe"
        assert not create.fragment
        assert create.progress_notify
        return f"create {create.key.decode()} from {create.start_revision}" + (" prev_kv" if create.prev_kv else "")
    return f"cancel {decoded.cancel_request.watch_id}" if kind == "cancel_request" else "progress?"


def in_words(effects: Sequence[WatchEffect]) -> list[str]:
    """Return effects in words, one line each."""
    return [_in_words(effect) for effect in effects]


def _in_words(effect: WatchEffect) -> str:
    match effect:
        case OpenStream():
            return "open stream" + (f" for {effect.stream.token.decode()}" if effect.stream.token else "")
        case CloseStream():
            return "close stream"
        case WriteMessage():
            return request(effect.message)
        case Progressed(watches=[]):
            return f"at {effect.header.revision} after {effect.number}"
        case Progressed():
            proven = f"{' '.join(map(repr, effect.watches))} complete through {effect.header.revision}"
            return f"{proven}, after {effect.number}" if effect.number else proven
        case WatchLost():
            return f"{effect.watch!r} lost: {effect.status} {effect.text}"
        case TokenRefused():
            return f"{(effect.token or b'').decode()} is refused"
        case HeaderSeen():
            return f"at {effect.header.revision}"
        case WatchReceived():
            return f"{effect.watch!r} {_response_in_words(effect.response)}"


def _response_in_words(response: WatchResponse) -> str:
    if response.created:
        return f"created at {response.header.revision}"
    if response.canceled:
        return f"compacted {response.compact_revision}"
    if response.events:
        return f"got {' '.join(map(str, revisions(response)))}" + (" and more" if response.fragment else "")
    return f"bookmark {response.header.revision}"


def connected(revision: int = 10) -> WatchState:
    """Return the state of a client that is connected to an etcd at `revision`."""
    state = WatchState()
    assert state.connect(True, revision) == []
    return state


def stream_of(state: WatchState, watch: OpenedWatch) -> WatchStream:
    """Return the stream of a watch that has one."""
    registration = state.registration(watch)
    assert registration is not None
    assert registration.stream is not None
    return registration.stream


def live(state: WatchState, *watches: Opened, at: int = 10) -> WatchStream:
    """Open watches, let etcd answer their creates with the ids 0, 1, ..., and return the stream of the first."""
    for watch in watches:
        state.open(watch)
    for watch_id, watch in enumerate(watches):
        state.received(stream_of(state, watch), answer(watch_id, at, created=True))
    return stream_of(state, watches[0])
