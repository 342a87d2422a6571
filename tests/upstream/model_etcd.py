"""A model of how etcd serves a Watch stream: the order and timing that a watch client has to handle.

One key, one event per revision. Every step that etcd's goroutines take concurrently is a method, so that a seeded test
can take the steps in any order: handling a request, catching up a watch, sending from one of two queues.

Source: etcd server/etcdserver/api/v3rpc/watch.go (recvLoop, sendLoop), server/storage/mvcc/watchable_store.go.
"""

from __future__ import annotations

from collections import deque
from random import Random

from proto.pb import kv_pb2, rpc_pb2
from proto.scan import WatchResponse, scan_watch_response

CATCH_UP_MAX = 3


class ModelStore:
    """The newest revision and the compact revision."""

    def __init__(self) -> None:
        self.revision = 1
        self.compact_revision = 0
        self.streams: list[ModelStream] = []

    def put(self) -> None:
        """Write a revision; it is queued at once for synced watches."""
        self.revision += 1
        for stream in self.streams:
            for watch_id, next_revision in list(stream.synced.items()):
                if next_revision <= self.revision:
                    stream.queue(watch_id, [self.revision], self.revision)
                    stream.synced[watch_id] = self.revision + 1

    def compact(self, revision: int) -> None:
        """Drop the revisions below this one."""
        self.compact_revision = max(self.compact_revision, min(revision, self.revision))


class ModelStream:
    """One Watch call at the server."""

    def __init__(self, store: ModelStore, random: Random) -> None:
        self.store = store
        self.random = random
        self.inbox: deque[bytes] = deque()
        store.streams.append(self)
        # Watches by id, with the first revision each still needs.
        self.synced: dict[int, int] = {}
        self.unsynced: dict[int, int] = {}
        # Cancelled by a compaction, and not yet by the client.
        self.compacted: set[int] = set()
        # Announced to the client.
        self.ids: set[int] = set()
        self.next_id = 0
        self.control: deque[rpc_pb2.WatchResponse] = deque()
        self.events: deque[rpc_pb2.WatchResponse] = deque()
        self.pending: dict[int, list[rpc_pb2.WatchResponse]] = {}
        # Fragments and flushed responses, which are sent without any other response between them.
        self.outbox: deque[rpc_pb2.WatchResponse] = deque()

    @property
    def busy(self) -> bool:
        """A step can be taken."""
        return bool(self.inbox or self.unsynced or self.control or self.events or self.outbox)

    def queue(self, watch_id: int, revisions: list[int], header_revision: int, compact_revision: int = 0) -> None:
        """Queue events, or progress without events."""
        response = rpc_pb2.WatchResponse(header=_header(header_revision), watch_id=watch_id)
        response.compact_revision = compact_revision
        response.canceled = compact_revision > 0
        # Two events per revision, so that fragments can split a revision.
        for revision in revisions:
            for key in (b"a", b"b"):
                response.events.append(kv_pb2.Event(kv=kv_pb2.KeyValue(key=key, mod_revision=revision)))
        self.events.append(response)

    def handle(self) -> None:
        """Handle the oldest request (recvLoop)."""
        if not self.inbox:
            return
        request = rpc_pb2.WatchRequest.FromString(self.inbox.popleft())
        store = self.store
        if request.HasField("create_request"):
            start = request.create_request.start_revision
            watch_id, self.next_id = self.next_id, self.next_id + 1
            if not start or start > store.revision:
                self.synced[watch_id] = start or store.revision + 1
            else:
                self.unsynced[watch_id] = start
            if self.random.random() < 0.2:
                # The header is read after the watch is registered.
                store.put()
            self._answer(watch_id, created=True)
        elif request.HasField("cancel_request"):
            watch_id = request.cancel_request.watch_id
            known = watch_id in self.synced or watch_id in self.unsynced or watch_id in self.compacted
            self.synced.pop(watch_id, None)
            self.unsynced.pop(watch_id, None)
            self.compacted.discard(watch_id)
            if known:
                self._answer(watch_id, canceled=True)
        elif self._answers_progress():
            self.queue(-1, [], store.revision)

    def _answers_progress(self) -> bool:
        due = self.store.revision + 1
        synced = bool(self.synced) and all(next_revision <= due for next_revision in self.synced.values())
        return synced and not self.unsynced and not self.compacted

    def notify(self) -> None:
        """Send progress_notify of a synced watch."""
        for watch_id, next_revision in self.synced.items():
            if next_revision <= self.store.revision + 1:
                self.queue(watch_id, [], self.store.revision)

    def catch_up(self) -> None:
        """Let one watch catch up a little, or cancel it because its next revision is compacted (syncWatchers)."""
        if not self.unsynced:
            return
        watch_id = self.random.choice(list(self.unsynced))
        next_revision = self.unsynced[watch_id]
        store = self.store
        if next_revision < store.compact_revision:
            del self.unsynced[watch_id]
            self.compacted.add(watch_id)
            self.queue(watch_id, [], 0, store.compact_revision)
            return
        last = min(store.revision, next_revision + CATCH_UP_MAX - 1)
        self.queue(watch_id, list(range(next_revision, last + 1)), store.revision)
        if last == store.revision:
            del self.unsynced[watch_id]
            self.synced[watch_id] = last + 1
        else:
            self.unsynced[watch_id] = last + 1

    def send(self) -> WatchResponse | None:
        """Send one message (sendLoop): from either queue, at random when both have messages."""
        if not self.outbox:
            sources = [queue for queue in (self.control, self.events) if queue]
            if not sources:
                return None
            source = self.random.choice(sources)
            self._send(source.popleft(), source is self.control)
        return scan_watch_response(self.outbox.popleft().SerializeToString()) if self.outbox else None

    def _send(self, response: rpc_pb2.WatchResponse, is_control: bool) -> None:
        watch_id = response.watch_id
        if is_control:
            self.outbox.append(response)
            if response.canceled and watch_id >= 0:
                self.ids.discard(watch_id)
            elif response.created:
                self.ids.add(watch_id)
                self.outbox.extend(self.pending.pop(watch_id, []))
        elif watch_id >= 0 and watch_id not in self.ids:
            self.pending.setdefault(watch_id, []).append(response)
        elif len(response.events) > 1 and self.random.random() < 0.4:
            self._send_fragments(response)
        else:
            self.outbox.append(response)

    def _send_fragments(self, response: rpc_pb2.WatchResponse) -> None:
        events = list(response.events)
        while events:
            size = self.random.randint(1, 3)
            piece = rpc_pb2.WatchResponse(header=response.header, watch_id=response.watch_id)
            piece.events.extend(events[:size])
            events = events[size:]
            piece.fragment = bool(events)
            self.outbox.append(piece)

    def _answer(self, watch_id: int, *, created: bool = False, canceled: bool = False) -> None:
        header = _header(self.store.revision)
        self.control.append(rpc_pb2.WatchResponse(header=header, watch_id=watch_id, created=created, canceled=canceled))


def _header(revision: int) -> rpc_pb2.ResponseHeader:
    return rpc_pb2.ResponseHeader(cluster_id=1, member_id=1, revision=revision, raft_term=1)
