"""
What `WatchState` keeps: a watch of the listener (`Registration`), and a Watch call that carries some (`WatchStream`).
"""

from __future__ import annotations

from collections import deque
from typing import Final, Protocol

from proto.scan import Event

_PASSED_MAX: Final = 256


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


class WatchStream:
    """One Watch call upstream, of one token; `own`: that of our own user."""

    __slots__ = (
        "answered",
        "answers_from",
        "by_id",
        "creating",
        "dying",
        "held",
        "is_backfill",
        "live",
        "numbers",
        "own",
        "passed",
        "paused",
        "requested",
        "shell",
        "token",
        "wanted",
        "wanted_number",
    )

    def __init__(self, token: bytes | None, is_backfill: bool, own: bool = False) -> None:
        self.token = token
        self.is_backfill = is_backfill
        self.own = own
        # Free for whoever does the I/O.
        self.shell: object = None
        # A backfill's stream that is not to be read at present.
        self.paused = False
        # Creates sent and not answered, oldest first.
        self.creating: deque[Create] = deque()
        self.by_id: dict[int, Registration] = {}
        # Ids cancelled by us whose last answer has not come: what they send is dropped.
        self.dying: set[int] = set()
        # Per id inside of a run of fragments: the events of its last revision, which may be incomplete.
        self.held: dict[int, list[Event]] = {}
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
