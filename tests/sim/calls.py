"""The simulated reads: what the engine asks etcd beside the watches, decided by `proxy/deciding/questions.py`.

A call is on its way until a move answers it: in any order, late, never in time, refused, by a member that lags, or by
the store as it was before it was restored.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proto.scan import Header
from tests.sim.failure import SimulationFailure
from tests.sim.model_stream import header_of
from tests.sim.parts import Parts

if TYPE_CHECKING:
    from tests.sim.world import World

_STATUS = {"PermissionDenied": 7, "Unauthenticated": 16, "InvalidArgument": 3}
_REFUSAL = re.compile(r"rpc error: code = (\w+) desc = (.*)")
# Nobody answered in time, or nobody was there.
_FAILURES = ((4, "the call took too long"), (14, "connection refused"), (13, "it cannot be read"))
_NO_LEADER = "etcdserver: no leader"


@dataclass(slots=True)
class Sent:
    """A call on its way."""

    call: Any
    # The store's revision when it left; a linearizable answer is not below.
    began_at: int
    # What a store answered that is no more.
    answer: Header | None = None


class Calls:
    """Carries out what `Questions` wants, as `proxy.reads.Reader` does."""

    def __init__(self, world: World, parts: Parts, probe_age_s_max: float) -> None:
        self._world = world
        self._parts = parts
        self.questions: Any = parts.questions.Questions(probe_age_s_max)
        self.sent: list[Sent] = []
        # Calls that have failed and wait to be made again.
        self.waiting: list[Any] = []

    def read(self, read: Any) -> None:
        """Read "now" for those who wait."""
        self._do(self.questions.read(self._parts.questions.Now(read)))

    def check(self, create: Any) -> None:
        """Find out whether a client may watch a range."""
        asked = self._parts.questions.Asked(create.session.identity.token, create.key, create.range_end)
        self._do(self.questions.check(self._parts.questions.May(asked, create), self._world.now))

    def connected(self) -> None:
        """There is a new connection for the watches."""
        self.questions.connected()
        self.prove()

    def prove(self) -> None:
        """Find out what it leads to, by whose right one may; from time to time."""
        if self.questions.rollback.unproven:
            self._do(self.questions.prove(None, list(self._world.open_upstreams.values())))

    def restored(self, revision: int, old_revision: int | None, rng: random.Random) -> None:
        """The store was restored; some calls have been answered by the old one (None: by none), the others will be."""
        for sent in self.sent:
            if old_revision is None or sent.answer is not None or self._refusal(sent.call.asked):
                pass
            elif rng.random() < 0.5:
                sent.answer = header_of(self._world.members[0].member_id, rng.randint(sent.began_at, old_revision))
            sent.began_at = min(sent.began_at, revision)

    def prove_at_once(self) -> None:
        """Read before anybody writes."""
        questions = self._parts.questions
        call = questions.Call(questions.Proof(self.questions.rollback), questions.Asked())
        self.questions.begin(call, self._world.upstream.state.newest_revision, self._world.now)
        self._do(self.questions.answered(call, self._header(self._world.store.revision)))

    def answer_one(self, rng: random.Random) -> None:
        """Answer a call that is on its way."""
        world = self._world
        sent = self.sent.pop(rng.randrange(len(self.sent)))
        call = sent.call
        if sent.answer is not None:
            self._do(self.questions.answered(call, sent.answer))
            return
        refusal = self._refusal(call.asked)
        if rng.random() < world.config.failing_reads:
            world.count("failed reads")
            self._do(self.questions.failed(call, *rng.choice(_FAILURES)))
        elif call.linearizable and not world.store.has_quorum:
            self._do(self.questions.failed(call, 14, _NO_LEADER))
        elif refusal:
            code, text = _REFUSAL.fullmatch(refusal).groups()  # type: ignore[union-attr]  # all of them have this form
            self._do(self.questions.failed(call, _STATUS[code], text))
        elif call.asked == self._parts.questions.NO_RIGHT or not call.linearizable:
            self._do(self.questions.answered(call, self._header(rng.choice(world.members).revision)))
        else:
            revision = rng.choice((sent.began_at, rng.randint(sent.began_at, world.store.revision)))
            self._do(self.questions.answered(call, self._header(revision)))

    def again(self, rng: random.Random) -> None:
        """Make a call again that has failed."""
        self._do(self.questions.again(self.waiting.pop(rng.randrange(len(self.waiting)))))

    def answer_checks(self, rng: random.Random) -> None:
        """Answer all permission checks that wait, and what they wait for."""
        while any(type(sent.call.question).__name__ in ("May", "Probe") for sent in self.sent):
            self.answer_one(rng)

    def _refusal(self, asked: Any) -> str:
        anybody = asked == self._parts.questions.NO_RIGHT
        return "" if anybody else self._world.permissions.refusal(*asked)

    def _header(self, revision: int) -> Header:
        return header_of(self._world.members[0].member_id, revision)

    def _do(self, effects: list[Any]) -> None:
        world = self._world
        for effect in effects:
            kind = type(effect).__name__
            if kind == "Ask" and effect.later:
                self.waiting.append(effect.call)
            elif kind == "Ask":
                self.questions.begin(effect.call, world.upstream.state.newest_revision, world.now)
                self.sent.append(Sent(effect.call, world.store.revision))
            elif kind == "Tell":
                self._tell(effect.question, effect.outcome)
            elif kind == "SendAway":
                world.send_away(effect.session, f"watchmux: not authorized any more: {effect.refusal.text}")
            elif kind == "WentBack":
                world.went_back(effect.header)
            else:
                raise SimulationFailure(f"an unknown effect: {effect}")

    def _tell(self, question: Any, outcome: Any) -> None:
        world, kind = self._world, type(outcome).__name__
        if type(question).__name__ == "Now":
            world.input(world.core.revision_read, question.read, outcome)
            return
        # The core may be a mutant, with classes of its own.
        if kind == "Granted":
            outcome = world.package.Granted(outcome.header)
        elif kind == "Refusal":
            outcome = world.package.Refusal(outcome.text)
        world.input(world.core.permission, question.create, outcome)
