"""Sends requests to a real etcd and to the store's pure parts, and makes the answers comparable."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import cast

import grpc
from google.protobuf.message import Message

from proto.pb import kv_pb2, rpc_pb2, rpc_pb2_grpc
from upstream.store.errors import StoreError
from upstream.store.state import StoreIdentity, StoreState
from upstream.store.watch_batch import encode_message

CALL_TIMEOUT_S = 30.0
PROGRESS_RETRY_S = 0.02


@dataclass(frozen=True)
class Refused:
    """An error as a client gets it."""

    code: int
    text: str


Answer = Message | Refused


def new_state() -> StoreState:
    """Make an empty store."""
    lease_ids = itertools.count(1000)
    return StoreState(StoreIdentity(1, 2), lambda: next(lease_ids))


def ask_state(state: StoreState, request: Message, now: float = 0.0) -> Answer:
    """Call the store's pure parts, as a service would."""
    calls: dict[type[Message], Callable[[], Message]] = {
        rpc_pb2.RangeRequest: lambda: state.range(cast(rpc_pb2.RangeRequest, request)),
        rpc_pb2.PutRequest: lambda: state.put(cast(rpc_pb2.PutRequest, request)),
        rpc_pb2.DeleteRangeRequest: lambda: state.delete_range(cast(rpc_pb2.DeleteRangeRequest, request)),
        rpc_pb2.TxnRequest: lambda: state.txn(cast(rpc_pb2.TxnRequest, request)),
        rpc_pb2.CompactionRequest: lambda: state.compact(cast(rpc_pb2.CompactionRequest, request)),
        rpc_pb2.LeaseGrantRequest: lambda: state.lease_grant(cast(rpc_pb2.LeaseGrantRequest, request), now),
        rpc_pb2.LeaseRevokeRequest: lambda: state.lease_revoke(cast(rpc_pb2.LeaseRevokeRequest, request).ID),
        rpc_pb2.LeaseTimeToLiveRequest: lambda: state.lease_time_to_live(
            cast(rpc_pb2.LeaseTimeToLiveRequest, request), now
        ),
    }
    try:
        return calls[type(request)]()
    except StoreError as error:
        return Refused(error.refusal.code, error.refusal.text)
    finally:
        state.publish()
        state.mvcc.compact_step(3)


class Client:
    """A blocking client of any server with etcd's API."""

    def __init__(self, endpoint: str) -> None:
        self.channel = grpc.insecure_channel(endpoint, options=[("grpc.max_receive_message_length", -1)])
        kv, lease = rpc_pb2_grpc.KVStub(self.channel), rpc_pb2_grpc.LeaseStub(self.channel)
        self.kv = kv
        self.lease = lease
        self._watch = rpc_pb2_grpc.WatchStub(self.channel)
        self._calls: dict[type[Message], Callable[..., Message]] = {
            rpc_pb2.RangeRequest: kv.Range,
            rpc_pb2.PutRequest: kv.Put,
            rpc_pb2.DeleteRangeRequest: kv.DeleteRange,
            rpc_pb2.TxnRequest: kv.Txn,
            rpc_pb2.CompactionRequest: kv.Compact,
            rpc_pb2.LeaseGrantRequest: lease.LeaseGrant,
            rpc_pb2.LeaseRevokeRequest: lease.LeaseRevoke,
            rpc_pb2.LeaseTimeToLiveRequest: lease.LeaseTimeToLive,
        }

    def close(self) -> None:
        """Close the connection."""
        self.channel.close()

    def ask(self, request: Message) -> Answer:
        """Send a unary request."""
        try:
            return self._calls[type(request)](request, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            return refused(error)

    def watch(self) -> WatchCall:
        """Open a watch stream."""
        return WatchCall(self._watch)

    def watched(self, create: rpc_pb2.WatchCreateRequest) -> list[kv_pb2.Event]:
        """Return all events that a watch gets before the answer to a progress request."""
        with self.watch() as call:
            call.create(create)
            assert call.next().created
            events: list[kv_pb2.Event] = []
            call.keep_requesting_progress()
            for response in call:
                events += response.events
                if response.canceled or response.watch_id == -1:
                    break
            return events


class WatchCall:
    """A watch stream of a blocking client."""

    def __init__(self, stub: rpc_pb2_grpc.WatchStub) -> None:
        self._requests: SimpleQueue[rpc_pb2.WatchRequest | None] = SimpleQueue()
        self._ended = threading.Event()
        self.answers = stub.Watch(iter(self._requests.get, None), timeout=60)

    def __enter__(self) -> WatchCall:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._requests.put(None)
        self.answers.cancel()

    def create(self, create: rpc_pb2.WatchCreateRequest) -> None:
        """Send a create."""
        self._requests.put(rpc_pb2.WatchRequest(create_request=create))

    def cancel(self, watch_id: int) -> None:
        """Send a cancel."""
        self._requests.put(rpc_pb2.WatchRequest(cancel_request=rpc_pb2.WatchCancelRequest(watch_id=watch_id)))

    def half_close(self) -> None:
        """Close the client's side of the stream."""
        self._requests.put(None)

    def request_progress(self) -> None:
        """Request progress once."""
        self._requests.put(rpc_pb2.WatchRequest(progress_request=rpc_pb2.WatchProgressRequest()))

    def keep_requesting_progress(self) -> None:
        """Request progress repeatedly until the stream ends, since etcd drops requests that it cannot answer yet."""

        def repeat() -> None:
            while not self._ended.wait(PROGRESS_RETRY_S):
                self.request_progress()

        self.request_progress()
        threading.Thread(target=repeat, daemon=True).start()

    def next(self) -> rpc_pb2.WatchResponse:
        """Wait for the next answer."""
        return next(self.answers)

    def __iter__(self) -> Iterator[rpc_pb2.WatchResponse]:
        return self.answers


def refused(error: grpc.RpcError) -> Refused:
    """Make an error comparable."""
    call = cast(grpc.Call, error)
    return Refused(call.code().value[0], call.details() or "")


def watched_state(state: StoreState, create: rpc_pb2.WatchCreateRequest) -> list[kv_pb2.Event]:
    """Return all events that a watch of the store's pure parts gets up to the current revision."""
    stream = state.watchable.open_stream()
    stream.create(
        create.key,
        create.range_end,
        create.start_revision,
        no_put=rpc_pb2.WatchCreateRequest.NOPUT in create.filters,
        no_delete=rpc_pb2.WatchCreateRequest.NODELETE in create.filters,
        prev_kv=create.prev_kv,
    )
    while state.watchable.sync():
        pass
    events: list[kv_pb2.Event] = []
    while (message := stream.take()) is not None:
        for piece in encode_message(state.head, message):
            events += rpc_pb2.WatchResponse.FromString(piece).events
    stream.close()
    return events


def comparable(answer: Answer) -> Answer:
    """Remove what differs between any two etcds: the header's ids, and the seconds left of a lease."""
    if isinstance(answer, Refused):
        return answer
    copy = type(answer)()
    copy.CopyFrom(answer)
    header = getattr(copy, "header", None)
    if isinstance(header, rpc_pb2.ResponseHeader):
        header.cluster_id = header.member_id = header.raft_term = 0
    if isinstance(copy, rpc_pb2.LeaseTimeToLiveResponse):
        copy.TTL = min(copy.TTL, 0)
        keys = sorted(copy.keys)
        del copy.keys[:]
        copy.keys.extend(keys)
    return copy
