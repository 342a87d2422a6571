"""The simulated reads: the engine's calls to etcd besides the watches, decided by `proxy/auth/queries.py`.

A call goes to one member after the other, as `upstream/attempts.py` decides, until a move answers it: in any order,
late, after its timeout, refused, by a member that lags, or by the store as it was before a restore. A member that is
cut off has no leader, and a suspended one never answers.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proto.scan import Header
from proxy.auth.restore import AuthScope
from tests.sim.failure import SimulationFailure
from tests.sim.model_stream import header_of
from tests.sim.parts import Parts

if TYPE_CHECKING:
    from tests.sim.world import World

_STATUS = {"PermissionDenied": 7, "Unauthenticated": 16, "InvalidArgument": 3}
_REFUSAL = re.compile(r"rpc error: code = (\w+) desc = (.*)")
# No member answered in time, or none was reachable.
_FAILURES = ((4, "the call took too long"), (14, "connection refused"), (13, "it cannot be read"))
_NO_LEADER = "etcdserver: no leader"
TOO_LARGE = "grpc: received message larger than max (2 vs. 1)"
_ANSWERS_MAX = 10_000
POISON = b"poison"
"""A key that is too large for a request to etcd."""


@dataclass(slots=True, eq=False)
class Sent:
    """A call in flight."""

    call: Any
    # The members that have it, by name.
    attempts: Any
    # The store's revision when it was sent; a linearizable answer is not below.
    began_at: int
    # The answer of a store that has been replaced since.
    answer: Header | None = None


class Calls:
    """Carries out the effects of `Queries`, as `proxy.auth.reads.AuthReader` does."""

    def __init__(self, world: World, parts: Parts, probe_age_s_max: float) -> None:
        self._world = world
        self._parts = parts
        self.queries: Any = parts.queries.Queries(probe_age_s_max)
        self.sent: list[Sent] = []
        # Failed calls that wait for a retry.
        self.waiting: list[Any] = []

    def read(self, read: Any) -> None:
        """Read "now" for the creates that wait."""
        self._do(self.queries.read(self._parts.queries.RevisionRead(read)))

    def check(self, create: Any) -> None:
        """Find out whether a client may watch a range."""
        self._do(self.queries.check(self._parts.queries.PermissionCheck.of(create), self._world.now))

    def connected(self) -> None:
        """Report a new connection of the watches."""
        self.queries.connected()
        self.prove()

    def prove(self) -> None:
        """Find out which store it leads to, with a token that may read; called periodically."""
        if self.queries.rollback.unproven:
            self._do(self.queries.prove(None, list(self._world.open_upstreams.values())))

    def restored(self, revision: int, old_revision: int | None, rng: random.Random) -> None:
        """Handle a restore: the old store has answered some calls (None: none), the new one answers the others."""
        for sent in self.sent:
            if old_revision is None or sent.answer is not None or self._refusal(sent.call):
                pass
            elif rng.random() < 0.5:
                sent.answer = header_of(self._world.members[0].member_id, rng.randint(sent.began_at, old_revision))
            sent.began_at = min(sent.began_at, revision)

    def prove_at_once(self) -> None:
        """Check for a restore at once, before any further write."""
        queries = self._parts.queries
        call = queries.AuthCall.by(queries.RestoreCheck(self.queries.rollback), AuthScope())
        self.queries.begin(call, self._world.upstream.state.newest_revision, self._world.now)
        self._do(self.queries.answered(call, self._header(self._world.store.revision)))

    def answer_one(self, rng: random.Random) -> None:
        """Make one move of a call in flight, at one of the members that have it."""
        world = self._world
        sent = rng.choice(self.sent)
        call = sent.call
        if sent.answer is not None:
            self._answered(sent, sent.answer)
            return
        name = rng.choice(sorted(sent.attempts.open))
        member = next(each for each in world.members if str(each.member_id) == name)
        if sent.attempts.left and (member.member_id in world.still or rng.random() < 0.1):
            # The answer is late.
            sent.attempts.next()
        elif member.member_id in world.still:
            self._failed(sent, name, 4, "the call took too long")
        elif rng.random() < world.config.failing_reads:
            world.count("failed reads")
            self._failed(sent, name, *rng.choice(_FAILURES))
        elif call.linearizable and call.ranges != self._parts.queries.NO_RIGHT and not world.has_leader(member):
            self._failed(sent, name, 14, _NO_LEADER)
        elif any(key == POISON for key, _ in call.ranges):
            self._failed(sent, name, 8, TOO_LARGE)
        elif refusal := self._refusal(call):
            code, text = _REFUSAL.fullmatch(refusal).groups()  # type: ignore[union-attr]  # all of them have this form
            self._failed(sent, name, _STATUS[code], text)
        elif not call.linearizable or call.ranges == self._parts.queries.NO_RIGHT:
            if call.token is not None and type(call.query).__name__ == "CheckBatch":
                raise SimulationFailure("one member alone decides about a permission")
            self._answered(sent, self._header(member.revision))
        else:
            revision = rng.choice((sent.began_at, rng.randint(sent.began_at, world.store.revision)))
            self._answered(sent, self._header(revision))

    def again(self, rng: random.Random) -> None:
        """Retry a failed call."""
        call = rng.choice(self._repeatable())
        self.waiting.remove(call)
        self._do(self.queries.again(call))

    @property
    def may_go_on(self) -> bool:
        """Whether a failed call may succeed when retried."""
        return bool(self._repeatable())

    def answer_checks(self, rng: random.Random) -> None:
        """Answer all pending permission checks, and the calls that they wait for."""
        for _ in range(_ANSWERS_MAX):
            if not any(type(sent.call.query).__name__ in ("CheckBatch", "AuthProbe") for sent in self.sent):
                return
            self.answer_one(rng)
        raise SimulationFailure("permission checks never settle")

    def _repeatable(self) -> list[Any]:
        """Return the calls worth retrying: without a leader only those that one member can answer."""
        world = self._world
        if world.store.has_quorum:
            return self.waiting
        if world.still and not world.upstream.choice.leaderless:
            # The suspended member may have one, as far as is known.
            return []
        return [call for call in self.waiting if type(call.query).__name__ in ("RevisionRead", "AuthProbe")]

    def _answered(self, sent: Sent, header: Header) -> None:
        self.sent.remove(sent)
        self._do(self.queries.answered(sent.call, header))

    def _failed(self, sent: Sent, name: str, status: int, text: str) -> None:
        failure = sent.attempts.failed(name, status, text)
        if failure is None:
            sent.attempts.next()
            return
        world = self._world
        self.sent.remove(sent)
        # Without a watch, a call of the watch client itself finds out (upstream/watching/leader.py).
        leaderless = world.upstream.choice.leaderless or (failure.text == _NO_LEADER and not world.open_upstreams)
        self._do(self.queries.failed(sent.call, *failure, leaderless=leaderless))

    def _refusal(self, call: Any) -> str:
        permissions = self._world.permissions
        refusals = [permissions.refusal(call.token, *each) for each in call.ranges]
        return next(filter(None, refusals), "")

    def _header(self, revision: int) -> Header:
        return header_of(self._world.members[0].member_id, revision)

    def _begin(self, call: Any) -> None:
        world = self._world
        self.queries.begin(call, world.upstream.state.newest_revision, world.now)
        names = [str(member.member_id) for member in world.members]
        world.rng.shuffle(names)
        sent = Sent(call, self._parts.attempts.Attempts(names), world.store.revision)
        sent.attempts.next()
        self.sent.append(sent)

    def _do(self, effects: list[Any]) -> None:
        world = self._world
        for effect in effects:
            kind = type(effect).__name__
            if kind == "SendCall" and effect.later:
                self.waiting.append(effect.call)
            elif kind == "SendCall":
                self._begin(effect.call)
            elif kind == "AnswerRead":
                world.input(world.core.revision_read, effect.read, effect.header)
            elif kind == "AnswerCheck":
                self._answer(effect.check.create, effect.outcome)
            elif kind == "DisconnectSession":
                world.send_away(effect.session, f"watchmux: not authorized any more: {effect.refusal.text}")
            elif kind == "RefuseSession":
                world.send_away(effect.session, effect.text, effect.status)
            elif kind == "RevisionRegressed":
                world.went_back(effect.header)
            else:
                raise SimulationFailure(f"an unknown effect: {effect}")

    def _answer(self, create: Any, outcome: Any) -> None:
        world, kind = self._world, type(outcome).__name__
        # The core may be a mutant, whose classes are different objects.
        if kind == "Granted":
            outcome = world.package.Granted(outcome.header)
        elif kind == "CreateRefusal":
            outcome = world.package.CreateRefusal(outcome.text)
        world.input(world.core.permission, create, outcome)
