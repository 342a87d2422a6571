"""A pure model of one Watch call at an etcd server: server/etcdserver/api/v3rpc/watch.go without its goroutines.

It has a receive loop that handles one request after the other, a control channel and an event channel, and a send loop
that takes from either. Where etcd depends on its scheduler, the model has one call each (`receive`, `send`), made in
any order. So progress answers may overtake `created`, its header may be read long after the watch was registered, and a
full channel drops progress and makes victims.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from coalesce.guarantees.checkers import Change
from proto.pb import rpc_pb2
from proto.scan import Header, WatchResponse
from tests.sim.model_store import Member, Watcher

CLUSTER_ID = 0xC1
RAFT_TERM = 3


@dataclass(slots=True)
class Queued:
    """An item in the event channel."""

    watch_id: int
    revision: int
    changes: Sequence[Change] = ()
    compact_revision: int = 0


@dataclass(slots=True)
class Announcement:
    """A registered watch whose `created` has not been put on the control channel."""

    watcher: Watcher | None
    reason: str = ""


@dataclass(slots=True, eq=False)
class ServerStream:
    """One Watch call: its requests, its channels, and the responses in flight to the client."""

    member: Member
    # etcd's watch channel holds 128 responses; a small one makes victims.
    channel_max: int = 128
    # Responses of at least this many events may be split for watches with fragment.
    fragment_events: int = 2
    # Why a range is refused on this call; "" is allowed.
    permission: Callable[[bytes, bytes], str] = lambda _key, _range_end: ""
    requests: deque[bytes] = field(default_factory=deque)
    out: deque[WatchResponse] = field(default_factory=deque)
    watchers: dict[int, Watcher] = field(default_factory=dict)
    _next_id: int = 0
    _control: deque[WatchResponse] = field(default_factory=deque)
    _channel: deque[Queued] = field(default_factory=deque)
    _announcement: Announcement | None = None
    _announced: set[int] = field(default_factory=set)
    _pending: dict[int, list[Queued]] = field(default_factory=dict)
    _fragments: set[int] = field(default_factory=set)
    _prev_kv: set[int] = field(default_factory=set)

    @property
    def spans(self) -> dict[int, tuple[bytes, bytes]]:
        """The range of each watch by its id."""
        return {watch_id: (watcher.key, watcher.range_end) for watch_id, watcher in self.watchers.items()}

    # the receive loop

    @property
    def can_receive(self) -> bool:
        """Whether the receive loop has work."""
        return self._announcement is not None or bool(self.requests)

    def receive(self, _: random.Random | None = None) -> None:
        """Take one step of the receive loop: register a watch, announce it, cancel one, or answer progress."""
        if self._announcement is not None:
            self._announce(self._announcement)
            return
        if not self.requests:
            return
        request = rpc_pb2.WatchRequest.FromString(self.requests.popleft())
        kind = request.WhichOneof("request_union")
        if kind == "create_request":
            self._announcement = self._create(request.create_request)
        elif kind == "cancel_request":
            self._cancel(request.cancel_request.watch_id)
        elif kind == "progress_request":
            self._progress()

    def _create(self, request: rpc_pb2.WatchCreateRequest) -> Announcement:
        key = request.key or b"\0"
        range_end = request.range_end
        if request.start_revision < 0:
            return Announcement(None, "etcdserver: mvcc: required revision has been compacted")
        if refusal := self.permission(key, range_end):
            return Announcement(None, refusal)
        if len(range_end) and range_end != b"\0" and key >= range_end:
            return Announcement(None, "mvcc: watcher range is empty")
        watch_id = request.watch_id
        if watch_id == 0:
            while self._next_id in self.watchers:
                self._next_id += 1
            watch_id = self._next_id
            self._next_id += 1
        elif watch_id in self.watchers:
            return Announcement(None, "mvcc: duplicate watch ID provided on the WatchStream")
        watcher = Watcher(self, watch_id, key, range_end, request.start_revision, 0)
        self.watchers[watch_id] = watcher
        if request.fragment:
            self._fragments.add(watch_id)
        if request.prev_kv:
            self._prev_kv.add(watch_id)
        self.member.add(watcher)
        return Announcement(watcher)

    def _announce(self, announcement: Announcement) -> None:
        self._announcement = None
        watcher = announcement.watcher
        header = self._header(self.member.revision)
        if watcher is None:
            refusal = WatchResponse(header, -1, created=True, canceled=True, cancel_reason=announcement.reason)
            self._control.append(refusal)
        else:
            self._control.append(WatchResponse(header, watcher.watch_id, created=True))

    def _cancel(self, watch_id: int) -> None:
        watcher = self.watchers.pop(watch_id, None)
        if watcher is not None:
            self.member.remove(watcher)
            self._control.append(WatchResponse(self._header(self.member.revision), watch_id, canceled=True))

    def _progress(self) -> None:
        revision = self.member.revision
        if not self.member.ordered_progress:
            self._control.append(WatchResponse(self._header(revision), -1))
            return
        watchers = self.watchers.values()
        if watchers and all(each in self.member.synced and each.start_revision <= revision for each in watchers):
            self._offer(Queued(-1, revision))

    def notify_progress(self, watch_id: int) -> None:
        """Send progress under a watch's own id, as the 10-minute ticker does, if the watch is synced."""
        watcher = self.watchers.get(watch_id)
        if watcher in self.member.synced and watcher.start_revision <= self.member.revision:
            self._offer(Queued(watch_id, self.member.revision))

    def cancel_with(self, watch_id: int, reason: str) -> None:
        """Cancel a watch from the server's side; it blocks progress until the cancel has been sent."""
        watcher = self.watchers.get(watch_id)
        if watcher is not None:
            self.member.remove(watcher)
            header = self._header(self.member.revision)
            self._control.append(WatchResponse(header, watch_id, canceled=True, cancel_reason=reason))

    # the event channel

    def offer(self, watcher: Watcher, changes: Sequence[Change], revision: int) -> bool:
        """Put events on the channel; False when it is full."""
        return self._offer(Queued(watcher.watch_id, revision, changes))

    def offer_compacted(self, watcher: Watcher, compact_revision: int) -> bool:
        """Put a compaction cancel on the channel; False when it is full."""
        return self._offer(Queued(watcher.watch_id, 0, compact_revision=compact_revision))

    def _offer(self, queued: Queued) -> bool:
        if len(self._channel) >= self.channel_max:
            return False
        self._channel.append(queued)
        return True

    # the send loop

    @property
    def can_send(self) -> bool:
        """Whether the send loop has a response to take."""
        return bool(self._control or self._channel)

    def send(self, rng: random.Random) -> None:
        """Take one response from either channel and send it, or hold it until its watch is announced."""
        if self._control and (not self._channel or rng.random() < 0.5):
            response = self._control.popleft()
            self.out.append(response)
            if response.created and not response.canceled:
                self._announced.add(response.watch_id)
                for queued in self._pending.pop(response.watch_id, []):
                    self._send(queued, rng)
            elif response.canceled and response.watch_id != -1:
                self.watchers.pop(response.watch_id, None)
                self._announced.discard(response.watch_id)
                self._fragments.discard(response.watch_id)
                self._prev_kv.discard(response.watch_id)
            return
        if not self._channel:
            return
        queued = self._channel.popleft()
        if queued.watch_id != -1 and queued.watch_id not in self._announced:
            self._pending.setdefault(queued.watch_id, []).append(queued)
        else:
            self._send(queued, rng)

    def _send(self, queued: Queued, rng: random.Random) -> None:
        header = self._header(queued.revision)
        if queued.compact_revision:
            cancel = WatchResponse(header, queued.watch_id, canceled=True, compact_revision=queued.compact_revision)
            # etcd may repeat it.
            self.out.extend([cancel] * rng.choice((1, 1, 1, 2)))
            return
        prev_kv = queued.watch_id in self._prev_kv
        store = self.member.store
        # The previous value is read when the response is sent: after a compaction above it there is none.
        compacted = self.member.compact_revision
        events = [store.event(each, prev_kv and each.mod_revision - 1 >= compacted) for each in queued.changes]
        pieces = [events]
        if queued.watch_id in self._fragments and len(events) >= self.fragment_events:
            cuts = sorted(rng.sample(range(1, len(events)), rng.randint(0, min(3, len(events) - 1))))
            pieces = [events[low:high] for low, high in zip([0, *cuts], [*cuts, len(events)], strict=True)]
        for piece in pieces:
            last = piece is pieces[-1]
            self.out.append(WatchResponse(header, queued.watch_id, fragment=not last, events=piece))

    def close(self) -> None:
        """End the call: its watchers are gone."""
        for watcher in self.watchers.values():
            self.member.remove(watcher)
        self.watchers.clear()
        for queue in (self.requests, self.out, self._control, self._channel):
            queue.clear()
        self._announcement = None

    def _header(self, revision: int) -> Header:
        return header_of(self.member.member_id, revision)


_HEADERS: dict[tuple[int, int], Header] = {}


def header_of(member_id: int, revision: int) -> Header:
    """Return a header as this member writes it."""
    header = _HEADERS.get((member_id, revision))
    if header is None:
        header = _HEADERS[member_id, revision] = Header.make(CLUSTER_ID, member_id, revision, RAFT_TERM)
    return header
