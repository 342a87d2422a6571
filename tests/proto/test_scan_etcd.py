"""Messages of a real etcd: its watch responses are decoded, and it accepts the requests that are encoded here."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import grpc

from proto.pb import rpc_pb2
from proto.plain_request import PROGRESS, encode_cancel, encode_create
from proto.scan import DELETE, PUT, Header, WatchResponse, encode_response, scan_watch_response
from tests.etcd.server import EtcdServer

WAIT_S = 20


class RawWatch:
    """A Watch stream whose messages stay encoded."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        watch: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream("/etcdserverpb.Watch/Watch")
        self._answers: Iterator[bytes] = watch(iter(self._requests.get, b""), timeout=WAIT_S)

    def send(self, request: bytes) -> None:
        """Send one message."""
        self._requests.put(request)

    def next(self) -> WatchResponse:
        """Return the next response; check that it decodes as in the protobuf library and encodes to the same bytes."""
        data = next(self._answers)
        response = scan_watch_response(data)
        expected = rpc_pb2.WatchResponse.FromString(data)
        assert [event.revision for event in response.events] == [like.kv.mod_revision for like in expected.events]
        header = response.header
        assert (
            Header.make(header.cluster_id, header.member_id, header.revision, header.raft_term).encoded
            == header.encoded
        )
        written = encode_response(
            header,
            response.watch_id,
            created=response.created,
            canceled=response.canceled,
            compact_revision=response.compact_revision,
            cancel_reason=response.cancel_reason,
            fragment=response.fragment,
            events=b"".join(event.encoded for event in response.events),
        )
        assert written == data
        return response


def test_a_watch_from_create_to_cancel(etcd: EtcdServer) -> None:
    with grpc.insecure_channel(etcd.endpoint) as channel:
        watch = RawWatch(channel)
        watch.send(encode_create(b"a", b"b", watch_id=7, prev_kv=True, progress_notify=True, fragment=True))
        created = watch.next()
        assert (created.watch_id, created.created, created.canceled) == (7, True, False)

        etcd.ctl("put", "a", "1")
        etcd.ctl("put", "a", "2")
        etcd.ctl("del", "a")
        events = [event for _ in range(3) for event in watch.next().events]
        first = created.header.revision + 1
        assert [(event.kind, event.revision) for event in events] == [
            (PUT, first),
            (PUT, first + 1),
            (DELETE, first + 2),
        ]
        assert [event.bare is event.encoded for event in events] == [True, False, False]

        watch.send(PROGRESS)
        progress = watch.next()
        assert (progress.watch_id, progress.header.revision, progress.events) == (-1, first + 2, [])

        watch.send(encode_cancel(7))
        canceled = watch.next()
        assert (canceled.watch_id, canceled.canceled) == (7, True)
        watch.send(b"")


def test_history_filters_and_refusal(etcd: EtcdServer) -> None:
    for value in ("1", "2"):
        etcd.ctl("put", "a", value)
        etcd.ctl("del", "a")
    with grpc.insecure_channel(etcd.endpoint) as channel:
        watch = RawWatch(channel)
        for no_put, no_delete, kind in ((True, False, DELETE), (False, True, PUT)):
            watch.send(encode_create(b"a", start_revision=2, no_put=no_put, no_delete=no_delete))
            created, history = watch.next(), watch.next()
            assert created.watch_id == history.watch_id
            assert [event.kind for event in history.events] == [kind, kind]
            watch.send(encode_cancel(created.watch_id))
            assert watch.next().canceled

        watch.send(encode_create(b"b", b"a"))
        refused = watch.next()
        assert (refused.watch_id, refused.created, refused.canceled) == (-1, True, True)
        assert refused.cancel_reason
        watch.send(b"")
