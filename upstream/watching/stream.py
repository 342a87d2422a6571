"""The data of `WatchState`: a watch of the listener (`Registration`), and a Watch call and its watches (`WatchStream`).

Not part of the simulator's mutants: these objects pass between modules of which one may be a mutant.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import Final, Protocol

from proto.scan import Event

_PASSED_MAX: Final = 256


class StreamKind(Enum):
    """The purpose of a stream, see `streams`."""

    SHARED = "the live watches of a token"
    BACKFILL = "one backfill, which can be paused"
    CATCH_UP = "watches that have to catch up"
    LARGE = "watches with large creates"
    SUSPECT = "creates of which one may have ended its stream"


class StreamEndAction(Enum):
    """What to do with the watches of a stream that the server or the connection ended."""

    LOST = "they end"
    MOVED = "they register again at once, on another connection to this server"
    HERE = "they register again, on this connection"
    APART = "as HERE, but unanswered creates on separate streams: one of them may have ended this one"
    TOKEN = "they end: their token cannot be sent to this server"
    ELSEWHERE = "stop using this server"
    NOTHING = "the connection has ended as well, which is reported separately"


class OpenedWatch(Protocol):
    """A watch that the listener opens: its own object, passed back with every effect."""

    @property
    def key(self) -> bytes: ...

    @property
    def range_end(self) -> bytes: ...

    @property
    def start_revision(self) -> int | None:
        """The first revision wanted; None = now."""

    @property
    def prev_kv(self) -> bool: ...

    @property
    def is_backfill(self) -> bool:
        """Whether it gets a stream of its own, which can be paused."""

    @property
    def watchers(self) -> int:
        """How many watches of clients get its events: those for many may wait for those for few, see `call`."""

    @property
    def token(self) -> bytes | None:
        """The auth token to register with; read again at each registration."""


class Registration:
    """One watch of the listener, its position and its stream."""

    __slots__ = (
        "_stream",
        "announced",
        "closed",
        "ends",
        "group",
        "next_revision",
        "now",
        "own_refused",
        "paused",
        "unproven",
        "watch",
        "watch_id",
    )

    def __init__(self, watch: OpenedWatch) -> None:
        self.watch = watch
        # The first revision still needed; None = now, until the first `created` gives its revision.
        self.next_revision = watch.start_revision
        # The revision of "now", from `created`. -1 for a watch with a start revision.
        self.now = -1
        # The listener has got `created`; it gets it once.
        self.announced = False
        # The listener has closed it, or it was lost; it may still wait for the answer to its create.
        self.closed = False
        # A backfill that is not read at present.
        self.paused = False
        # Consecutive refusals of the proxy's own user; from `_OWN_REFUSED_MAX` on the watch uses its own token.
        self.own_refused = 0
        # Consecutive streams that ended before they answered its create.
        self.ends = 0
        # The group of suspects that it is tried with; None = it is not a suspect.
        self.group: int | None = None
        self._stream: WatchStream | None = None
        # The id upstream while live; None before. Stale while it has no stream.
        self.watch_id: int | None = None
        # The number of the last progress request sent before its `created` arrived: an answer to that request, or to an
        # older one, proves nothing about this watch.
        self.unproven = 0

    @property
    def stream(self) -> WatchStream | None:
        """The stream on which it is creating or live; None = it waits for `register`."""
        # The end of a stream does not change each of its registrations.
        return None if self._stream is None or self._stream.ended else self._stream

    @stream.setter
    def stream(self, stream: WatchStream | None) -> None:
        self._stream = stream
        self.watch_id = None


class SentCreate:
    """A create that was sent."""

    __slots__ = ("number", "registration", "requested_before", "skips")

    def __init__(
        self, registration: Registration | None, requested_before: int, number: int = 0, *, skips: bool = False
    ) -> None:
        # None: a probe, sent after the request for progress of this number was made.
        self.registration = registration
        self.number = number
        # It starts from now although its position is known: no write from that position on was known.
        self.skips = skips
        # The number of progress requests sent on the stream before it.
        self.requested_before = requested_before


class HeldRevision:
    """The events of the last revision so far in a run of pieces: the revision may continue."""

    __slots__ = ("events", "size")

    def __init__(self) -> None:
        self.events: list[Event] = []
        # Of the encoded events, in bytes.
        self.size = 0


class WatchStream:
    """One Watch call upstream with one token; `own`: that of the proxy's own user; `group`: that of its suspects."""

    def __init__(self, token: bytes | None, kind: StreamKind, own: bool = False, group: int | None = None) -> None:
        self.token = token
        self.kind = kind
        self.own = own
        self.group = group
        # For the I/O shell's own use.
        self.shell: object = None
        # Its registrations have no stream any more.
        self.ended = False
        # A backfill's stream that is not read at present.
        self.paused = False
        # Its member answers progress requests in order with events; the I/O shell sets it when the call starts. Members
        # differ during an upgrade of the cluster, and a stream stays at its member when the connection rotates.
        self.ordered = True
        # Creates sent and not answered, oldest first.
        self.creating: deque[SentCreate] = deque()
        self.by_id: dict[int, Registration] = {}
        # Ids that the proxy cancelled and whose last answer is outstanding: their responses are dropped.
        self.canceled_ids: set[int] = set()
        # Suspects whose creates are sent once the server has answered a probe, which proves that it works.
        self.waiting: list[Registration] = []
        # By id: the watches that are within a run of pieces.
        self.held: dict[int, HeldRevision] = {}
        # Registrations here that are not closed.
        self.live = 0
        # The server has answered a create: the call works.
        self.answered = False
        # The number of progress requests sent; they are numbered from 1.
        self.requested = 0
        # (n, number), ascending: the listener's number of request n. Bounded like `passed`, for the same reason.
        self.numbers: deque[tuple[int, int]] = deque(maxlen=_PASSED_MAX)
        # The next answer belongs to this request or to a later one.
        self.answers_from = 1
        # (n, revision), ascending: etcd handled requests up to number n while the store was at this revision or below.
        # Bounded: a dropped pair only makes an answer prove less.
        self.passed: deque[tuple[int, int]] = deque(maxlen=_PASSED_MAX)
        # Progress is requested once this registration's create is answered; and the listener's number of that request.
        self.wanted: Registration | None = None
        self.wanted_number = 0

    @property
    def tested(self) -> bool:
        """It carries suspects."""
        return self.group is not None

    @property
    def registrations(self) -> list[Registration]:
        """All registrations that are creating or live on it."""
        return [*self.by_id.values(), *self.unanswered]

    @property
    def unanswered(self) -> list[Registration]:
        """Registrations whose creates the server has not answered, in order."""
        sent = [create.registration for create in self.creating if create.registration is not None]
        return [registration for registration in sent + self.waiting if registration.stream is self]
