"""Recordings of a raw client: every response of every stream, unchanged."""

from __future__ import annotations

from dataclasses import dataclass, field

from proto.pb import rpc_pb2
from tests.differential.steps import Create
from tests.e2e.raw_client import RawClient, WatchStream

FENCE_ID = 1_000_000_000
"""The watch that the player adds to each stream at the end, to know that everything in transit has arrived."""


class StreamLog:
    """One Watch stream and its responses so far."""

    def __init__(self, name: str, client: RawClient, watch: WatchStream) -> None:
        self.name = name
        self.client = client
        self.watch = watch
        self.creates: list[Create] = []
        """The requests, in order, which is also the order of the answers."""
        self.half_closed = False
        self.canceled = False
        """The client has cancelled the stream."""
        self.responses: list[rpc_pb2.WatchResponse] = []
        self.controls: list[rpc_pb2.WatchResponse] = []
        self.events: dict[int, int] = {}
        """Events by watch id."""
        self.compacted: set[int] = set()
        self.answers: list[int] = []
        """Revisions of progress answers."""
        self.notified = 0
        """The highest revision of a progress_notify."""

    def refresh(self) -> None:
        """Read the responses received since."""
        messages = self.watch.raw.messages
        for message in messages[len(self.responses) :]:
            self._take(rpc_pb2.WatchResponse.FromString(message))

    def _take(self, response: rpc_pb2.WatchResponse) -> None:
        self.responses.append(response)
        if response.created or (response.canceled and not response.compact_revision):
            self.controls.append(response)
        elif response.canceled:
            self.compacted.add(response.watch_id)
        elif response.events:
            self.events[response.watch_id] = self.events.get(response.watch_id, 0) + len(response.events)
        elif response.watch_id == -1:
            self.answers.append(response.header.revision)
        else:
            self.notified = max(self.notified, response.header.revision)

    @property
    def over(self) -> bool:
        """Whether it has ended, in any way."""
        return self.canceled or self.watch.raw.over

    @property
    def event_count(self) -> int:
        """Events of all its watches."""
        return sum(self.events.values())

    def created(self, watch_id: int) -> tuple[Create, rpc_pb2.WatchResponse]:
        """Return the last create that was given an id, and its answer."""
        answers = (response for response in self.controls if response.created)
        pairs = [
            (create, answer)
            for create, answer in zip(self.creates, answers, strict=False)
            if answer.watch_id == watch_id and not answer.canceled
        ]
        return pairs[-1]


@dataclass
class StreamRecord:
    """One stream, after the run."""

    name: str
    responses: list[rpc_pb2.WatchResponse]
    end: str
    """How it ended; empty while it is open."""
    cut: int
    """Events of this revision and above belong to the end of the run, and may be incomplete."""
    creates: list[Create]


@dataclass
class Recording:
    """One run of a program."""

    proxied: bool
    base: int
    """The store's revision at the start: 0 in the program's terms."""
    newest: int
    """The store's revision at the end."""
    ids: tuple[int, int, int]
    """Cluster, member and term of etcd itself at the start of the program."""
    streams: list[StreamRecord] = field(default_factory=list)
    follows: dict[str, str] = field(default_factory=dict)
    """The stream that resumed another one's watches, by the name of that one."""
    calls: list[str] = field(default_factory=list)
    """Unary calls and their outcome."""
    vain: list[str] = field(default_factory=list)
    """Waits that timed out."""
