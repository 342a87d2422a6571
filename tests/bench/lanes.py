"""What each fast path of an event saves: `python -m tests.bench.lanes` times it and the general code on the same input.

Prints nanoseconds of CPU for one event, the best of several runs; the comments beside the fast paths quote them.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import hpack

from coalesce.core import Coalescer
from coalesce.effects import CheckPermission, OpenUpstream, ReadRevision
from coalesce.inputs import CreateRequest, Granted, Identity
from proto import scan
from proto.http2 import Connection, Http2Limits, Role, StreamBatch
from proto.pb import kv_pb2, rpc_pb2
from proto.plain_request import plain_create
from proto.scan import Header, WatchResponse
from proxy.listening.connection import ServerConnection
from proxy.listening.listener import Listener
from proxy.watch.unusual import create_request
from tests.bench.profiles import GrpcGo, frame, settings, window_update
from tests.bench.wire import PREFACE, message_frame
from upstream.watching.state import WatchState
from upstream.watching.stream_calls import StreamCalls

TIMES = 20_000
RUNS = 7
STREAMS = 50
REVISION = 1 << 20


class Lane(NamedTuple):
    """A fast path and the general code, each as a function of the number of the event."""

    name: str
    general: Callable[[int], object]
    fast: Callable[[int], object]


def event(revision: int) -> bytes:
    """Return etcd's response for a put."""
    value = kv_pb2.KeyValue(
        key=b"bench/000001/k", value=bytes(64), create_revision=5, mod_revision=revision, version=100
    )
    header = rpc_pb2.ResponseHeader(cluster_id=1 << 60, member_id=1 << 61, revision=revision, raft_term=3)
    return rpc_pb2.WatchResponse(header=header, watch_id=7, events=[kv_pb2.Event(kv=value)]).SerializeToString()


def time_ns(do: Callable[[int], object]) -> float:
    """Return the CPU nanoseconds of one call."""
    best = float("inf")
    for run in range(RUNS):
        started = time.process_time_ns()
        for number in range(TIMES):
            do(REVISION + run * TIMES + number)
        best = min(best, (time.process_time_ns() - started) / TIMES)
    return best


def request_block(encoder: hpack.Encoder) -> bytes:
    """Return the header block of a request."""
    names = ((":method", "POST"), (":scheme", "http"), (":path", "/x"), (":authority", "a"), ("te", "trailers"))
    return encoder.encode([*names, ("content-type", "application/grpc")])


def scanning() -> Lane:
    """The scan of a response."""
    message = event(REVISION)
    scan.scan_watch_response(message)
    return Lane(
        "scan_watch_response", lambda _: scan._scan_response(message), lambda _: scan.scan_watch_response(message)
    )


def placing() -> Lane:
    """The position of a watch at etcd."""
    response = scan.scan_watch_response(event(REVISION))
    registration = SimpleNamespace(next_revision=REVISION, watch=object())
    stream: Any = SimpleNamespace(by_id={7: registration}, held={})
    state = WatchState()
    calls: Any = SimpleNamespace(_listener=SimpleNamespace(received=lambda *_: None), _state=state)

    def general(_: int) -> None:
        registration.next_revision = REVISION
        StreamCalls.apply(calls, state.received(stream, response))

    def fast(_: int) -> None:
        registration.next_revision = REVISION
        StreamCalls.take(calls, stream, response)

    return Lane("WatchState.received_events", general, fast)


def requesting() -> Lane:
    """Return the lane of a create of one key."""
    message = rpc_pb2.WatchRequest(create_request=rpc_pb2.WatchCreateRequest(key=b"bench/000001/k")).SerializeToString()

    def general(_: int) -> None:
        request = rpc_pb2.WatchRequest.FromString(message)
        assert request.WhichOneof("request_union") == "create_request"
        create_request(request.create_request)

    def fast(_: int) -> None:
        plain = plain_create(message)
        assert plain is not None
        CreateRequest(*plain)

    return Lane("plain_create", general, fast)


def receiving() -> Lane:
    """One whole DATA frame of etcd."""
    data = message_frame(1, event(REVISION))
    connections = []
    for _ in range(2):
        connection = Connection(Role.CLIENT, Http2Limits())
        connection.start()
        connection.open([(b":method", b"POST"), (b":path", b"/x"), (b":scheme", b"http"), (b":authority", b"a")])
        block = hpack.Encoder().encode([(":status", "200")])
        connection.receive(settings() + frame(1, 4, 1, block))
        connections.append(connection)
    slow, quick = connections

    def wide(connection: Connection) -> None:
        connection.receive_window = connection.streams[1].receive_window = 1 << 30

    def general(_: int) -> None:
        wide(slow)
        slow.receive(data)

    def fast(_: int) -> None:
        wide(quick)
        quick.receive_data(data)

    return Lane("Connection.receive_data", general, fast)


def merging() -> Lane:
    """An event of a trunk in the core."""

    def make() -> tuple[Coalescer, Any]:
        core = Coalescer()
        header = Header.make(1, 1, REVISION, 1)
        session = core.open_session(object(), Identity(), 0.0)
        opened: list[Any] = []

        def carry_out(effects: Any) -> None:
            for effect in effects:
                if isinstance(effect, CheckPermission):
                    carry_out(core.permission(effect.check, Granted(header), 0.0))
                elif isinstance(effect, ReadRevision):
                    carry_out(core.revision_read(effect.read, header, 0.0))
                elif isinstance(effect, OpenUpstream):
                    opened.append(effect.upstream)

        carry_out(core.create(session, CreateRequest(key=b"k", range_end=b"l"), 0.0))
        carry_out(core.upstream_response(opened[0], WatchResponse(header, 0, created=True), 0.0))
        carry_out(core.upstream_response(opened[0], scan.scan_watch_response(event(REVISION + 1)), 0.0))
        return core, opened[0]

    (slow, slow_trunk), (quick, quick_trunk) = make(), make()
    texts = [event(REVISION + 2 + number) for number in range(RUNS * TIMES)]
    parsed = [scan.scan_watch_response(text) for text in texts]

    def general(number: int) -> None:
        slow._received(slow_trunk, parsed[number - REVISION], 0.0)

    def fast(number: int) -> None:
        quick.upstream_response(quick_trunk, parsed[number - REVISION], 0.0)

    return Lane("Coalescer.upstream_response", general, fast)


class Sink:
    """A transport that keeps nothing."""

    def __init__(self) -> None:
        self.write = len
        self.set_write_buffer_limits = lambda **_: None
        self.get_extra_info = lambda _: ("127.0.0.1", 1)
        self.is_closing = bool


def connection_of(listener: Listener, streams: int = 1) -> tuple[ServerConnection, Any]:
    """Return a client's connection with open streams, and the first one."""
    connection = ServerConnection(listener)
    connection.connection_made(cast(Any, Sink()))
    encoder = hpack.Encoder()
    requests = [frame(1, 4, 1 + 2 * index, request_block(encoder)) for index in range(streams)]
    listener.turns.left = 1 << 30
    connection.data_received(PREFACE + settings() + frame(4, 1, 0, b"") + b"".join(requests))
    connection.flush()
    for stream in connection.h2.streams.values():
        connection.h2.send_headers(stream, [(b":status", b"200")])
    connection.flush()
    return connection, connection.h2.streams[1]


def sharing(listener: Listener) -> Lane:
    """A message to STREAMS streams of one connection, per stream."""
    h2 = connection_of(listener, STREAMS)[0].h2
    message = message_frame(1, event(REVISION))[9:]
    size = len(message)
    batch = StreamBatch(tuple(h2.streams.values()))
    columns = ([message] * STREAMS,)

    def wide() -> None:
        h2.send_window = 1 << 30
        for stream in batch.streams:
            stream.send_window = 1 << 20
        h2.output()

    def general(number: int) -> None:
        if number % STREAMS == 0:
            wide()
        h2.send(batch.streams[number % STREAMS], (message,), size)

    def fast(number: int) -> None:
        if number % STREAMS == 0:
            wide()
            assert not h2.send_each(batch, columns, size)

    return Lane("SendSide.send_each", general, fast)


def writing(listener: Listener) -> tuple[Lane, Lane]:
    """A message to a client, and a Go client's answer to it."""
    connection, stream = connection_of(listener)
    h2 = connection.h2
    message = message_frame(1, event(REVISION))[9:]
    size = len(message)

    def wide() -> None:
        h2.send_window = stream.send_window = 1 << 20

    def queue(_: int) -> None:
        wide()
        listener.output.cork()
        connection.schedule_flush()
        h2.send(stream, (message,), size)
        listener.output.uncork()

    def write(_: int) -> None:
        wide()
        assert connection.write_now(stream, message, size)

    answer = window_update(0, size) + GrpcGo.PING
    turns = connection.turns

    def take(data: bytes) -> None:
        wide()
        turns.left = 1 << 30
        listener.output.cork()
        connection._receive(data, 1 << 30)
        connection.schedule_flush()
        listener.output.uncork()

    def acknowledge(_: int) -> None:
        wide()
        turns.left = 1 << 30
        assert connection._acknowledge(answer)

    return (
        Lane("ServerConnection.write_now", queue, write),
        Lane("ServerConnection._acknowledge", lambda _: take(answer), acknowledge),
    )


async def main() -> None:
    """Print the table."""
    listener = Listener()
    listener._loop = asyncio.get_running_loop()
    listener.routes[b"/x"] = lambda *_: cast(Any, SimpleNamespace(closed=print, drained=print))
    # As the proxy does while it serves, nearly.
    gc.disable()
    lanes = (receiving(), scanning(), placing(), merging(), *writing(listener), sharing(listener), requesting())
    sys.stdout.write("| fast path | general code, ns | fast path, ns |\n|---|---:|---:|\n")
    for lane in lanes:
        sys.stdout.write(f"| {lane.name} | {time_ns(lane.general):.0f} | {time_ns(lane.fast):.0f} |\n")


if __name__ == "__main__":
    asyncio.run(main())
