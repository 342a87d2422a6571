"""What a raw client got: every response of every stream, as it came."""

from __future__ import annotations

from dataclasses import dataclass, field

from proto.pb import rpc_pb2
from tests.differential.steps import Create
from tests.e2e.raw_client import RawClient, WatchStream

FENCE_ID = 1_000_000_000
"""The watch that the player adds to each stream at the end, to know that all that was on its way has come."""


class StreamLog:
    """One Watch stream and what it brought so far."""

    def __init__(self, name: str, client: RawClient, watch: WatchStream) -> None:
        self.name = name
        self.client = client
        self.watch = watch
        self.creates: list[Create] = []
        """What was asked, in order, which is that of the answers."""
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
        """Take what came since."""
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
        """It has ended, in whichever way."""
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
    """One stream, at the end."""

    name: str
    responses: list[rpc_pb2.WatchResponse]
    end: str
    """How it ended; empty while it is open."""
    cut: int
    """Events of this revision and above came after the program, and may not all have come."""
    creates: list[Create]


@dataclass
class Recording:
    """One run of a program."""

    proxied: bool
    base: int
    """The store's revision when it began: 0 in the program's terms."""
    newest: int
    """The store's revision when it was over."""
    ids: tuple[int, int, int]
    """What etcd itself gives as cluster, member and term when the program begins."""
    streams: list[StreamRecord] = field(default_factory=list)
    follows: dict[str, str] = field(default_factory=dict)
    """The stream that took up another one's watches, by the name of that."""
    calls: list[str] = field(default_factory=list)
    """Unary calls and their outcome."""
    vain: list[str] = field(default_factory=list)
    """What was waited for in vain."""
