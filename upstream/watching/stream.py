"""
What `WatchState` keeps: a watch of the listener (`Registration`), and a Watch call that carries some (`WatchStream`).

In no family of the simulator's mutants: these objects pass between modules of which one may be a mutant.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import Final, Protocol

from proto.scan import Event

_PASSED_MAX: Final = 256


class Kind(Enum):
    """What a stream is for, see `streams`."""

    SHARED = "the live watches of a token"
    BACKFILL = "one backfill, which can be paused"
    CATCH_UP = "watches that have something to catch up with"
    LARGE = "watches with large creates"
    SUSPECT = "creates of which one may have ended its stream"


class Next(Enum):
    """What follows when a stream has ended without our doing."""

    LOST = "its watches are over"
    MOVED = "they register again at once, on another connection to this server"
    HERE = "they register again, on this connection"
    APART = "they do, and those that it did not answer apart from the others: one of them may have ended it"
    TOKEN = "its token cannot be sent to this server"
    ELSEWHERE = "this server is not to be used any more"
    NOTHING = "the connection is over too, which is told separately"


class OpenedWatch(Protocol):
    """What the listener opens: its own object, handed back with every effect."""

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
        """True: it gets a stream of its own, which can be paused."""

    @property
    def token(self) -> bytes | None:
        """The auth token to register with; read anew at each registration."""


class Registration:
    """One watch of the listener and where it stands."""

    __slots__ = (
        "announced",
        "closed",
        "ends",
        "group",
        "next_revision",
        "now",
        "own_refused",
        "paused",
        "stream",
        "unproven",
        "watch",
        "watch_id",
    )

    def __init__(self, watch: OpenedWatch) -> None:
        self.watch = watch
        # The first revision still needed; None = now, until the first `created` says what that was.
        self.next_revision = watch.start_revision
        # What "now" was: the revision of `created`. -1 for a watch with a start revision.
        self.now = -1
        # The listener has been told `created`; it is told once.
        self.announced = False
        # The listener has closed it, or it was lost; it may still wait for the answer to its create.
        self.closed = False
        # A backfill that is not to be read at present.
        self.paused = False
        # Times that our own user was refused in a row; from `_OWN_REFUSED_MAX` on it is watched by its own token.
        self.own_refused = 0
        # Times in a row that a stream has ended before it answered its create.
        self.ends = 0
        # The suspects that it is tried with; None = it is no suspect.
        self.group: int | None = None
        # Where it is creating or live; None = waits for `register`.
        self.stream: WatchStream | None = None
        # The id upstream while live; None before.
        self.watch_id: int | None = None
        # The number of the last progress request sent before its `created` came: an answer to that one, or to an
        # older one, proves nothing for it.
        self.unproven = 0


class Create:
    """A create that was sent."""

    __slots__ = ("number", "registration", "requested_before", "skips")

    def __init__(
        self, registration: Registration | None, requested_before: int, number: int = 0, *, skips: bool = False
    ) -> None:
        # None: a probe, sent after the request for progress of this number was made.
        self.registration = registration
        self.number = number
        # It asks for what comes from now on though its position is known: nothing there was known to be written.
        self.skips = skips
        # The number of progress requests sent on the stream before it.
        self.requested_before = requested_before


class Held:
    """The events of the last revision that came of a run of pieces: it may go on."""

    __slots__ = ("events", "size")

    def __init__(self) -> None:
        self.events: list[Event] = []
        # Of the encoded events, in bytes.
        self.size = 0


class WatchStream:
    """One Watch call upstream, of one token; `own`: that of our own user; `group`: that of its suspects."""

    __slots__ = (
        "answered",
        "answers_from",
        "by_id",
        "creating",
        "dying",
        "group",
        "held",
        "kind",
        "live",
        "numbers",
        "ordered",
        "own",
        "passed",
        "paused",
        "requested",
        "shell",
        "token",
        "waiting",
        "wanted",
        "wanted_number",
    )

    def __init__(self, token: bytes | None, kind: Kind, own: bool = False, group: int | None = None) -> None:
        self.token = token
        self.kind = kind
        self.own = own
        self.group = group
        # Free for whoever does the I/O.
        self.shell: object = None
        # A backfill's stream that is not to be read at present.
        self.paused = False
        # Its member answers requests for progress in order with events; what does the I/O sets it as the call begins.
        # Members differ while a cluster is upgraded, and a stream stays at its own when the connection rotates.
        self.ordered = True
        # Creates sent and not answered, oldest first.
        self.creating: deque[Create] = deque()
        self.by_id: dict[int, Registration] = {}
        # Ids cancelled by us whose last answer has not come: what they send is dropped.
        self.dying: set[int] = set()
        # Suspects whose creates are sent when the server has answered a probe, so that it is known to be well.
        self.waiting: list[Registration] = []
        # Per id inside of a run of pieces.
        self.held: dict[int, Held] = {}
        # Registrations here that are not closed.
        self.live = 0
        # The server has answered a create: the call works.
        self.answered = False
        # Progress requests sent; they are numbered from 1.
        self.requested = 0
        # (n, number), rising: what the listener calls request n. Bounded as `passed` is, for the same reason.
        self.numbers: deque[tuple[int, int]] = deque(maxlen=_PASSED_MAX)
        # The next answer belongs to this request or to a later one.
        self.answers_from = 1
        # (n, revision), rising: requests up to number n were handled when the store had this revision or less.
        # Bounded: a lost pair only makes an answer prove less.
        self.passed: deque[tuple[int, int]] = deque(maxlen=_PASSED_MAX)
        # Progress is wanted, and is asked for when this create has been answered; and the number of that request.
        self.wanted: Registration | None = None
        self.wanted_number = 0

    @property
    def tested(self) -> bool:
        """It carries suspects."""
        return self.group is not None

    @property
    def unanswered(self) -> list[Registration]:
        """Those whose creates the server has not answered, in order."""
        sent = [create.registration for create in self.creating if create.registration is not None]
        return [registration for registration in sent + self.waiting if registration.stream is self]
