"""Permission checks of tokens: which calls are to be made, and what their answers mean. Pure: no I/O here.

With auth on, each create checks whether its token may watch its range. One call checks many ranges of one token: etcd
checks the permission of each range of a transaction (server/etcdserver/apply/apply_auth.go, checkTxnReqsPermission).

- Equal checks (same token, same range) that arrive before the call is sent share it; later ones wait for the next
  call, so no answer is older than its check.
- A token has one call in flight. Its other creates wait for that one, and their sessions take turns. Only a token that
  was granted a range, and has enough ranges waiting, may have more calls in flight.
- The number of calls in flight is bounded for all tokens together, and tokens take turns. Tokens that were granted a
  range have slots of their own, and tokens that were refused last time have few: made-up tokens cannot use up the
  slots of others.
- "invalid auth token" is the answer to all creates of that token that arrived before the call was sent. Any other
  refusal is about a range: a call for several ranges is split in halves until the range is found, which alone is
  refused. A call that fails at every endpoint for an unclear reason is split as well. A single range that keeps
  failing is given up after some tries; the token's other creates do not wait for it.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import Final

from coalesce.inputs import Granted
from proto.etcd_errors import OLD_AUTH_REVISION, TOO_MANY_OPS
from proto.framing import Status
from proto.scan import Header
from proxy.auth.model import AuthCall, Outcome, PermissionCheck, Query, QueryEffect, Range, SendCall, refusal_of
from upstream.attempts import is_about_request, is_about_server, is_too_large

RANGES_MAX: Final = 128
"""Ranges of one call: etcd's --max-txn-ops."""

RANGE_BYTES_MAX: Final = 64 * 1024
"""Bytes of the keys of one call, so that the call stays below etcd's request limit. A larger range is checked alone."""

CALLS_PER_TOKEN_MAX: Final = 4
"""Calls in flight of a token that was granted a range, while each call is full: when many clients reconnect, the checks
are limited by the speed of etcd, not by the round-trip time."""

TRIES_MAX: Final = 10
"""A call for one range that fails this many times at every endpoint for an unclear reason (over some 7 s) is given up:
the client's stream ends with that reason, as etcd would end it."""

STANDINGS_MAX: Final = 10_000
"""Tokens whose last answer is remembered, by a hash; it only decides the order."""


class TokenStanding(Enum):
    """The last answer for a token; the value is the share of the slots that is reserved for such tokens."""

    GRANTED = 0.5
    UNKNOWN = 0.375
    REFUSED = 0.125


class CheckBatch(Query):
    """The ranges of one token that one call checks."""

    __slots__ = ("asked_again", "call", "line", "sent_number", "standing", "tries", "waiting")

    def __init__(self, line: CheckQueue, waiting: dict[Range, list[PermissionCheck]]) -> None:
        super().__init__()
        self.line = line
        self.waiting = waiting
        self.call = AuthCall(self, line.token, tuple(waiting))
        # Checks with a higher number arrived after the call was sent and are not answered by it.
        self.sent_number = 0
        # The standing whose slot it holds; None if it holds no slot.
        self.standing: TokenStanding | None = None
        self.tries = 0
        # It has been retried after OLD_AUTH_REVISION.
        self.asked_again = False

    @property
    def wanted(self) -> bool:
        """Drop the checks of closed sessions; return whether any is left."""
        left = {each: [check for check in checks if check.wanted] for each, checks in self.waiting.items()}
        kept = {each: checks for each, checks in left.items() if checks}
        if len(kept) < len(self.waiting):
            self.call.ranges = tuple(kept)
        self.waiting = kept
        return bool(kept)

    def halves(self) -> tuple[CheckBatch, CheckBatch]:
        """Return two batches of half of its ranges each."""
        items = list(self.waiting.items())
        middle = len(items) // 2
        return CheckBatch(self.line, dict(items[:middle])), CheckBatch(self.line, dict(items[middle:]))

    def answer(self, outcome: Outcome) -> list[QueryEffect]:
        """Answer all of its checks."""
        return [each for checks in self.waiting.values() for check in checks for each in check.outcome(outcome)]

    def end(self, status: int, text: str) -> list[QueryEffect]:
        """End the streams of the clients that wait for its checks."""
        return [each for checks in self.waiting.values() for check in checks for each in check.end(status, text)]


class CheckQueue:
    """The waiting checks of one token."""

    __slots__ = ("_turns", "_waiting", "batches", "current", "ranges_max", "ready", "token")

    def __init__(self, token: bytes) -> None:
        self.token = token
        # Halves of a refused call, and failed calls to retry: these are sent before new checks.
        self.batches: list[CheckBatch] = []
        # Calls that are in flight, or that wait for their retry.
        self.current: set[CheckBatch] = set()
        # It is in `Checks._ready`.
        self.ready = False
        self.ranges_max = RANGES_MAX
        # The checks of each range.
        self._waiting: dict[Range, list[PermissionCheck]] = {}
        # The ranges of each session, sessions in turn; may list ranges already taken in another session's turn.
        self._turns: dict[int, deque[Range]] = {}

    def __bool__(self) -> bool:
        """Whether any check waits to be sent."""
        return bool(self.batches or self._waiting)

    def may_send(self, standing: TokenStanding) -> bool:
        """Whether another call may be sent."""
        if not self.current:
            return True
        several = standing is TokenStanding.GRANTED and len(self.current) < CALLS_PER_TOKEN_MAX
        return several and not self.batches and len(self._waiting) >= RANGES_MAX

    def add(self, check: PermissionCheck) -> None:
        """Add a check."""
        each: Range = check.asked[1:]
        self._waiting.setdefault(each, []).append(check)
        self._turns.setdefault(id(check.session), deque()).append(each)

    def take(self, ranges_max: int) -> CheckBatch:
        """Remove and return the checks for the next call, of at most `ranges_max` ranges."""
        if self.batches:
            return self.batches.pop()
        ranges_max = min(ranges_max, self.ranges_max)
        taken: dict[Range, list[PermissionCheck]] = {}
        size = 0
        while self._waiting and len(taken) < ranges_max:
            session = next(iter(self._turns))
            turn = self._turns.pop(session)
            each = turn[0]
            checks = self._waiting.get(each)
            if checks is not None:
                size += len(each[0]) + len(each[1])
                if taken and size > RANGE_BYTES_MAX:
                    self._turns = {session: turn} | self._turns
                    break
                taken[each] = self._waiting.pop(each)
            turn.popleft()
            if turn:
                self._turns[session] = turn
        if not self._waiting:
            self._turns.clear()
        return CheckBatch(self, taken)

    def take_before(self, number: int) -> list[PermissionCheck]:
        """Remove and return the checks up to a number."""
        taken = [check for batch in self.batches for checks in batch.waiting.values() for check in checks]
        self.batches.clear()
        left: list[PermissionCheck] = []
        for checks in self._waiting.values():
            for check in checks:
                (taken if check.number <= number else left).append(check)
        self._waiting.clear()
        self._turns.clear()
        for check in left:
            self.add(check)
        return taken


class Checks:
    """The permission checks of all tokens."""

    def __init__(self, in_flight_max: int) -> None:
        """`in_flight_max`: calls in flight at once; at least 8, so that each standing has a slot."""
        self.in_flight_max = in_flight_max
        self.in_flight = dict.fromkeys(TokenStanding, 0)
        # Checks that are not answered yet.
        self.waiting = 0
        self._arrived = 0
        self._lines: dict[bytes, CheckQueue] = {}
        # Queues of tokens that may send another call, in turn.
        self._ready: dict[TokenStanding, deque[CheckQueue]] = {standing: deque() for standing in TokenStanding}
        self._standings: dict[int, TokenStanding] = {}
        self._ranges_max = RANGES_MAX

    def add(self, check: PermissionCheck) -> list[QueryEffect]:
        """Add the check of a client with a token."""
        assert check.asked.token is not None, "without a token there is nothing to check"
        self._arrived += 1
        self.waiting += 1
        check.number = self._arrived
        line = self._lines.get(check.asked.token)
        if line is None:
            line = self._lines[check.asked.token] = CheckQueue(check.asked.token)
        line.add(check)
        return self._go_on(line)

    def sent(self, batch: CheckBatch) -> None:
        """A call is sent now."""
        batch.sent_number = self._arrived

    def granted(self, batch: CheckBatch, header: Header) -> list[QueryEffect]:
        """etcd permitted all ranges of a call."""
        line = batch.line
        self._note(line.token, TokenStanding.GRANTED)
        line.ranges_max = min(2 * line.ranges_max, RANGES_MAX)
        return self._done(batch, batch.answer(Granted(header)))

    def failed(self, batch: CheckBatch, status: int, text: str) -> list[QueryEffect]:
        """etcd refused a call, or the call failed at every endpoint."""
        line = batch.line
        # A signed token is from before a change of users; any token if the change came during the call, so that is
        # retried once (server/etcdserver/v3_server.go, doSerialize).
        if text == OLD_AUTH_REVISION and not batch.asked_again:
            batch.asked_again = True
            return [SendCall(batch.call)]
        if status == Status.UNAUTHENTICATED or text == OLD_AUTH_REVISION:
            self._note(line.token, TokenStanding.REFUSED)
            refusal = refusal_of(status, text)
            effects = batch.answer(refusal)
            for check in line.take_before(batch.sent_number):
                self.waiting -= 1
                effects += check.outcome(refusal)
            return self._done(batch, effects)
        if is_about_server(status):
            if status == Status.DEADLINE_EXCEEDED and self._standing(line.token) is TokenStanding.UNKNOWN:
                # etcd delays the answer to a made-up token that seems to come from its future.
                self._note(line.token, TokenStanding.REFUSED)
            self._release(batch)
            return [SendCall(batch.call, later=True), *self._start()]
        if len(batch.waiting) > 1:
            return self._split(batch, text, later=not is_about_request(status, text))
        if is_too_large(status, text):
            return self._done(batch, batch.end(status, text))
        if is_about_request(status, text):
            return self._done(batch, batch.answer(refusal_of(status, text)))
        batch.tries += 1
        if batch.tries >= TRIES_MAX:
            return self._done(batch, batch.end(status, text))
        self._leave(batch)
        return [SendCall(batch.call, later=True), *self._go_on(line)]

    def again(self, batch: CheckBatch) -> list[QueryEffect]:
        """The delay after a failure is over: the call may be retried, in its turn."""
        before = _count(batch)
        if batch.wanted:
            self.waiting -= before - _count(batch)
            batch.line.batches.append(batch)
        else:
            self.waiting -= before
        self._leave(batch)
        self._lines.setdefault(batch.line.token, batch.line)
        return self._go_on(batch.line)

    def _split(self, batch: CheckBatch, text: str, later: bool) -> list[QueryEffect]:
        line = batch.line
        first, second = batch.halves()
        if text == TOO_MANY_OPS:
            self._ranges_max = max(1, len(batch.waiting) // 2)
        line.ranges_max = max(1, min(line.ranges_max, len(batch.waiting)) // 2)
        self._leave(batch)
        if later:
            line.batches.append(second)
            return [SendCall(first.call, later=True), *self._go_on(line)]
        line.batches += (second, first)
        return self._go_on(line)

    def _done(self, batch: CheckBatch, effects: list[QueryEffect]) -> list[QueryEffect]:
        self.waiting -= _count(batch)
        batch.waiting = {}
        self._leave(batch)
        return effects + self._go_on(batch.line)

    def _go_on(self, line: CheckQueue) -> list[QueryEffect]:
        """Let a queue take its turn again if it has checks to send, and send the calls that are possible."""
        standing = self._standing(line.token)
        if not line.ready and line.may_send(standing):
            self._queue(line, standing)
        return self._start()

    def _start(self) -> list[QueryEffect]:
        effects: list[QueryEffect] = []
        while (standing := self._next_standing()) is not None:
            line = self._ready[standing].popleft()
            line.ready = False
            batch = line.take(self._ranges_max)
            before = _count(batch)
            wanted = batch.wanted
            self.waiting -= before - _count(batch)
            if wanted:
                line.current.add(batch)
                batch.standing = standing
                self.in_flight[standing] += 1
                effects.append(SendCall(batch.call))
            if line.may_send(standing):
                self._queue(line, standing)
        return effects

    def _queue(self, line: CheckQueue, standing: TokenStanding) -> None:
        """Let a queue take its turn, or drop it if it has nothing to send."""
        if line:
            line.ready = True
            self._ready[standing].append(line)
        elif not line.current and self._lines.get(line.token) is line:
            del self._lines[line.token]

    def _next_standing(self) -> TokenStanding | None:
        """Choose a standing whose tokens have checks to send and a free slot."""
        for standing, lines in self._ready.items():
            if lines and self.in_flight[standing] < max(1, int(self.in_flight_max * standing.value)):
                return standing
        return None

    def _leave(self, batch: CheckBatch) -> None:
        """A call has ended, or its token no longer waits for it."""
        self._release(batch)
        batch.line.current.discard(batch)

    def _release(self, batch: CheckBatch) -> None:
        if batch.standing is not None:
            self.in_flight[batch.standing] -= 1
            batch.standing = None

    def _standing(self, token: bytes) -> TokenStanding:
        return self._standings.get(hash(token), TokenStanding.UNKNOWN)

    def _note(self, token: bytes, standing: TokenStanding) -> None:
        known = hash(token)
        self._standings.pop(known, None)
        if len(self._standings) >= STANDINGS_MAX:
            del self._standings[next(iter(self._standings))]
        self._standings[known] = standing


def _count(batch: CheckBatch) -> int:
    return sum(map(len, batch.waiting.values()))
