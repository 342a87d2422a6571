"""A shell for tests: carries the core's effects out on plain lists, and records what each client received.

It answers permission checks at once with "auth is off" unless `auth` is set, and leaves everything else (reads,
upstream watches, progress) to the test. After every input and its effects it calls `invariants.check`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from coalesce import (
    CheckPermission,
    CloseUpstream,
    Coalescer,
    CoreLimits,
    CreateRequest,
    Deliver,
    Effect,
    EndSession,
    Identity,
    OpenUpstream,
    PauseUpstream,
    Payload,
    PendingCreate,
    PendingRead,
    ReadRevision,
    RequestProgress,
    ResumeUpstream,
    Send,
    Session,
    TakeRequests,
    Upstream,
    Watch,
    invariants,
)
from proto.pb import kv_pb2, rpc_pb2
from proto.scan import Event, Header, WatchResponse, scan_watch_response

CLUSTER_ID, MEMBER_ID, RAFT_TERM = 0xC1, 0xE1, 3


def header(revision: int) -> Header:
    """Return a header as etcd sends it."""
    return Header.make(CLUSTER_ID, MEMBER_ID, revision, RAFT_TERM)


def put(revision: int, key: bytes = b"k", value: bytes = b"v", prev: bytes | None = None) -> Event:
    """Return a PUT event, scanned from its bytes; with `prev` it carries a prev_kv of that value."""
    return _event(kv_pb2.Event.PUT, revision, key, value, prev)


def delete(revision: int, key: bytes = b"k", prev: bytes | None = None) -> Event:
    """Return a DELETE event."""
    return _event(kv_pb2.Event.DELETE, revision, key, b"", prev)


def _event(
    kind: kv_pb2.Event.EventType.ValueType, revision: int, key: bytes, value: bytes, prev: bytes | None
) -> Event:
    event = kv_pb2.Event(type=kind, kv=kv_pb2.KeyValue(key=key, value=value, mod_revision=revision))
    if prev is not None:
        event.prev_kv.CopyFrom(kv_pb2.KeyValue(key=key, value=prev, mod_revision=revision - 1))
    return scan_watch_response(rpc_pb2.WatchResponse(events=[event]).SerializeToString()).events[0]


def messages_of(payload: Payload, watch_id: int) -> tuple[bytes, ...]:
    """Return the framed messages for a watch, each joined from its pieces."""
    data = b"".join(payload.pieces(watch_id))
    messages = []
    while data:
        end = 5 + int.from_bytes(data[1:5], "big")
        messages.append(data[:end])
        data = data[end:]
    return tuple(messages)


def seen(message: bytes) -> str:
    """Return a framed WatchResponse as a line: `#0 @7 put 7 k=v`, `#0 @5 created`, `#-1 @9 progress`."""
    assert message[0] == 0
    assert int.from_bytes(message[1:5], "big") == len(message) - 5
    response = rpc_pb2.WatchResponse.FromString(message[5:])
    assert response.header.cluster_id == CLUSTER_ID
    words = [f"#{response.watch_id} @{response.header.revision}"]
    words.extend(word for word in ("created", "canceled", "fragment") if getattr(response, word))
    if response.compact_revision:
        words.append(f"compacted {response.compact_revision}")
    if response.cancel_reason:
        words.append(f"({response.cancel_reason})")
    for event in response.events:
        text = f"{kv_pb2.Event.EventType.Name(event.type).lower()} {event.kv.mod_revision} {event.kv.key.decode()}"
        if event.kv.value:
            text += f"={event.kv.value.decode()}" if len(event.kv.value) <= 10 else f"=[{len(event.kv.value)}]"
        if event.HasField("prev_kv"):
            text += f" (was {event.prev_kv.value.decode()})"
        words.append(text)
    if len(words) == 1:
        words.append("progress")
    return " ".join(words)


class Client:
    """One client: its session, the messages it received, and how many more it accepts."""

    def __init__(self, shell: Shell, identity: Identity) -> None:
        self.shell = shell
        self.session: Session = shell.core.open_session(self, identity, shell.now)
        # Messages that reached the client, in the form of `seen`; taken by read().
        self.lines: list[str] = []
        # Messages it still accepts before it stalls; None = any number.
        self.room: int | None = None
        self.unsent: list[str] = []
        self.ended: tuple[int, str] | None = None
        # The core has asked for further requests (TakeRequests).
        self.may_ask = False

    def read(self) -> list[str]:
        """Take the received messages."""
        lines, self.lines = self.lines, []
        return lines

    def create(self, key: bytes = b"k", range_end: bytes = b"", start: int | None = None, **more: bool | int) -> None:
        """Create a watch."""
        request = CreateRequest(key, range_end, start, **more)  # type: ignore[arg-type]  # keywords of one call
        self.shell.do(self.shell.core.create, self.session, request)

    def cancel(self, watch_id: int) -> None:
        """Cancel a watch."""
        self.shell.do(self.shell.core.cancel, self.session, watch_id)

    def progress(self) -> None:
        """Request progress."""
        self.shell.do(self.shell.core.progress, self.session)

    def close(self) -> None:
        """Close the session."""
        self.shell.do(self.shell.core.close, self.session)

    def stall(self) -> None:
        """Accept no further messages."""
        self.room = 0

    def drain(self, room: int | None = None) -> None:
        """Accept the unsent messages, and `room` further ones."""
        self.room = room
        self.lines.extend(self.unsent)
        self.unsent.clear()
        if self.session.stalled:
            self.shell.do(self.shell.core.drained, self.session, None)

    def write(self, messages: Iterable[bytes]) -> None:
        """Accept messages from the shell; the first one without room stalls the session."""
        for message in messages:
            if self.room == 0:
                self.unsent.append(seen(message))
            else:
                self.lines.append(seen(message))
                if self.room is not None:
                    self.room -= 1
        if self.unsent and not self.session.stalled:
            self.shell.core.stalled(self.session)


class Shell:
    """Drives one core."""

    def __init__(self, limits: CoreLimits | None = None, ordered_progress: bool = True) -> None:
        self.core = Coalescer(limits, ordered_progress)
        self.now = 1000.0
        # Requests of the core that the test has not answered yet.
        self.reads: list[PendingRead] = []
        self.checks: list[PendingCreate] = []
        self.auth = False
        # Progress requests made, and the number of the newest.
        self.asked: list[tuple[Upstream, ...]] = []
        self.asked_number = 0
        # Upstream watches opened, the newest last; those closed; those paused now.
        self.opened: list[Upstream] = []
        self.closed: list[Upstream] = []
        self.paused: list[Upstream] = []
        self.deliveries = 0
        self._inbox: deque[tuple[Callable[..., list[Effect]], tuple[object, ...]]] = deque()

    def client(self, token: bytes | None = None, has_leader: bool = False) -> Client:
        """Return a new client."""
        return Client(self, Identity(token, has_leader))

    def do(self, step: Callable[..., list[Effect]], *arguments: object) -> None:
        """Pass in one input and carry out its effects, then do the same for the inputs that these cause."""
        self._inbox.append((step, arguments))
        while self._inbox:
            step, arguments = self._inbox.popleft()
            for effect in step(*arguments, self.now):
                self._carry_out(effect)
            invariants.check(self.core)

    def read_now(self, revision: int) -> None:
        """Answer the read in flight."""
        self.do(self.core.revision_read, self.reads.pop(0), header(revision))

    def created(self, upstream: Upstream, revision: int) -> None:
        """Etcd registers an upstream watch."""
        self.do(self.core.upstream_response, upstream, WatchResponse(header(revision), 0, created=True))

    def events(self, upstream: Upstream, *events: Event, at: int | None = None) -> None:
        """Etcd sends events; `at` is the store's revision when that is not the last event's."""
        revision = events[-1].revision if at is None else at
        self.do(self.core.upstream_response, upstream, WatchResponse(header(revision), 0, events=list(events)))

    def bookmark(self, upstream: Upstream, revision: int) -> None:
        """Etcd sends a progress notify of one upstream watch."""
        self.do(self.core.upstream_response, upstream, WatchResponse(header(revision), 0))

    def canceled(self, upstream: Upstream, compact_revision: int = 0, reason: str = "", at: int = 0) -> None:
        """Etcd ends an upstream watch."""
        response = WatchResponse(header(at), 0, canceled=True, compact_revision=compact_revision, cancel_reason=reason)
        self.do(self.core.upstream_response, upstream, response)

    def progressed(self, revision: int, *upstreams: Upstream, number: int | None = None) -> None:
        """Etcd answers the newest manual progress request (or `number`), for all open upstream watches or for these."""
        chosen = upstreams or tuple(each for each in self.opened if each not in self.closed and each.created)
        self.do(self.core.upstream_progress, chosen, header(revision), self.asked_number if number is None else number)

    def probed(self, revision: int) -> None:
        """Etcd reports its revision, after the newest progress request."""
        self.do(self.core.upstream_progress, (), header(revision), self.asked_number)

    def wait(self, seconds: float) -> None:
        """Let time pass, and call `expire` whenever it is due."""
        end = self.now + seconds
        while (deadline := self.core.next_deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.do(self.core.expire)
        self.now = end

    def settle(self) -> None:
        """Call `expire` as long as it is due at once."""
        self.wait(0)

    def trunk(
        self, revision: int, client: Client, key: bytes = b"k", range_end: bytes = b"", **more: bool | int
    ) -> Upstream:
        """Let a client's watch from now open a trunk, created at `revision`; its `created` is taken."""
        client.create(key, range_end, None, **more)
        upstream = self.opened[-1]
        self.read_now(revision)
        self.created(upstream, revision)
        client.read()
        return upstream

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Deliver(payload=payload, watches=watches):
                self._deliver(payload, watches)
            case Send(session=session, messages=messages):
                _client_of(session).write(messages)
            case TakeRequests(session=session):
                _client_of(session).may_ask = True
            case EndSession(session=session, status=status, text=text):
                _client_of(session).ended = (status, text)
            case OpenUpstream(upstream=upstream):
                self.opened.append(upstream)
            case CloseUpstream(upstream=upstream):
                self.closed.append(upstream)
            case PauseUpstream(upstream=upstream):
                self.paused.append(upstream)
            case ResumeUpstream(upstream=upstream):
                self.paused.remove(upstream)
            case ReadRevision(read=read):
                self.reads.append(read)
            case CheckPermission(check=check):
                if self.auth:
                    self.checks.append(check)
                else:
                    self._inbox.append((self.core.permission, (check, None)))
            case RequestProgress(upstreams=upstreams, number=number):
                self.asked.append(upstreams)
                self.asked_number = number

    def _deliver(self, payload: Payload, watches: Iterable[Watch]) -> None:
        self.deliveries += 1
        for watch in watches:
            if watch.session.stalled:
                self.core.undelivered(watch, payload)
            else:
                _client_of(watch.session).write(messages_of(payload, watch.watch_id))


def _client_of(session: Session) -> Client:
    assert isinstance(session.outlet, Client)
    return session.outlet
