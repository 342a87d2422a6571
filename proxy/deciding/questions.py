"""What the engine asks etcd beside the watches, and what it makes of the answers, without asking anything itself.

A *question* is what somebody wants to know: what is "now" (`Now`), whether a client may watch a range (`May`), or
whether the store is the one it was (`Proof`). A *call* is one transaction at etcd that executes nothing, made for a
question, again and again until it is answered or refused. Who calls, and how long one waits, is the business of whoever
carries the effects out: `proxy/reads.py`, or the simulator.

Whether auth is on is nowhere to be read without a right. So it is probed by a call without a token: answered, auth is
off and everything is allowed; refused, each client is asked about by his own token. One probe, not older than
`probe_age_s_max`, serves all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from coalesce.inputs import Granted, Refusal
from proto.framing import Status
from proto.scan import Header
from proxy.deciding.rollback import Asked, Begun, Readable, Rollback
from upstream.errors import NO_LEADER_TEXT

if TYPE_CHECKING:
    from coalesce.joining import Read
    from coalesce.session import PendingCreate, Session

NO_RIGHT = Asked(key=b"")
"""A read that needs no right, and tells only what the member at hand knows: a transaction of nothing at all."""

USER_EMPTY = "rpc error: code = InvalidArgument desc = etcdserver: user name is empty"
"""What etcd tells a client without a token when auth is on."""

REFUSALS = {
    Status.PERMISSION_DENIED: "PermissionDenied",
    Status.UNAUTHENTICATED: "Unauthenticated",
    Status.INVALID_ARGUMENT: "InvalidArgument",
}
"""What etcd says about who asks, in the names that its cancel reasons use; everything else is about etcd itself, and
is asked again."""

Outcome = Granted | Header | Refusal
Told = Callable[[Outcome], None]


class Question:
    """Something that is asked for as long as somebody wants to know it."""

    __slots__ = ("told",)

    def __init__(self, told: Told | None = None) -> None:
        # Free for whoever does the I/O: where the answer goes.
        self.told = told

    @property
    def wanted(self) -> bool:
        """Somebody still waits."""
        return True


class Now(Question):
    """Which revision is "now", for the creates that wait for a read of the core."""

    __slots__ = ("_refused", "asking", "read")

    def __init__(self, read: Read, told: Told | None = None) -> None:
        super().__init__(told)
        self.read = read
        # By whose right it is asked.
        self.asking: Session | None = None
        # Those whose right turned out to be none.
        self._refused: set[int] = set()

    def asker(self) -> Asked | None:
        """Choose by whose right to read; None when nobody waits."""
        waiting = [
            create
            for create in self.read.waiting
            if not create.session.ended and id(create.session) not in self._refused
        ]
        self.asking = None
        if not waiting:
            return None
        permitted = [create for create in waiting if create.refusal is None]
        if not permitted:
            # They only need a header to be refused with.
            return NO_RIGHT
        create = next((create for create in permitted if create.session.identity.token is not None), permitted[0])
        self.asking = create.session
        return Asked(create.session.identity.token, create.key, create.range_end)

    def refused(self) -> Session | None:
        """Note that the session by whose right it was asked has none; return that session."""
        if self.asking is not None:
            self._refused.add(id(self.asking))
        return self.asking


class May(Question):
    """Whether somebody may watch a range; a client's create, or anybody else's wish."""

    __slots__ = ("asked", "create", "fresh")

    def __init__(self, asked: Asked, create: PendingCreate | None = None, told: Told | None = None) -> None:
        super().__init__(told)
        self.asked = asked
        self.create = create
        # It came before the probe in flight began.
        self.fresh = False

    @property
    def wanted(self) -> bool:
        """Nobody asks on for a client that is gone."""
        return self.create is None or not self.create.session.ended


class Proof(Question):
    """Whether the store is the one it was: the answer is for `Rollback` alone."""

    __slots__ = ("_rollback",)

    def __init__(self, rollback: Rollback) -> None:
        super().__init__()
        self._rollback = rollback

    @property
    def wanted(self) -> bool:
        """Nothing else has proven it."""
        return self._rollback.unproven


class Probe(Question):
    """Whether auth is on, for all who wait for that."""

    __slots__ = ("waiting",)

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[May] = []

    @property
    def wanted(self) -> bool:
        """Forget those who do not wait any more; tell whether anybody does."""
        self.waiting = [may for may in self.waiting if may.wanted]
        return bool(self.waiting)


class Call:
    """One transaction that executes nothing, or, as a `login`, an attempt to log in as a user there is not."""

    __slots__ = ("asked", "began_at", "begun", "linearizable", "login", "question")

    def __init__(self, question: Question, asked: Asked, login: bool = False) -> None:
        self.question = question
        self.asked = asked
        self.login = login
        self.linearizable = True
        # Set by `Questions.begin`.
        self.begun = Begun(0, 0)
        self.began_at = 0.0


class Ask(NamedTuple):
    """Make a call: now, or `later`, after a while that grows with each failure of this call."""

    call: Call
    later: bool = False


class Tell(NamedTuple):
    """A question is answered."""

    question: Now | May
    outcome: Outcome


class SendAway(NamedTuple):
    """A session was let in while auth was off, or its right is gone since: it shall come again and be checked anew."""

    session: Session
    refusal: Refusal


class WentBack(NamedTuple):
    """The store is older than it was."""

    header: Header
    known: int


Effect = Ask | Tell | SendAway | WentBack


class Questions:
    """All questions that are open. Inputs return what is to be done, in order."""

    def __init__(self, probe_age_s_max: float) -> None:
        """`probe_age_s_max`: how long, in seconds, "auth is off" is believed."""
        self.rollback = Rollback()
        # The newest probe was refused: etcd asks for users.
        self.auth_on = False
        # The proxy's certificate has a CN: with auth on etcd may take that for the user of a probe without a token.
        self.named = False
        self._probe_age_s_max = probe_age_s_max
        # When the newest probe that found auth off began, and what it read.
        self._auth_off: tuple[float, Header] | None = None
        # The probe in flight.
        self._probe: Probe | None = None

    def read(self, now: Now) -> list[Effect]:
        """Somebody wants to know what "now" is; asked once for all who wait.

        With auth on it is read by the right of one of them: etcd has no linearizable read that needs no right. With no
        leader the read is serializable: a watch needs no quorum, and "now" is then what the member at hand knows.
        """
        asked = now.asker()
        # When nobody waits the core waits for an answer all the same; this one tells nothing.
        return [Ask(Call(now, asked)) if asked is not None else Tell(now, Header.make(0, 0, 0, 0))]

    def check(self, may: May, at: float) -> list[Effect]:
        """Somebody wants to watch; he is told a refusal, or else the header of what was read.

        As Granted when the read began after this, so that it is good for "now"; bare when an earlier probe read it.
        """
        if self.auth_on and may.asked.token is not None:
            return [Ask(Call(may, may.asked))]
        if self._auth_off is not None and at - self._auth_off[0] <= self._probe_age_s_max:
            return [Tell(may, self._auth_off[1])]
        if self._probe is not None:
            self._probe.waiting.append(may)
            return []
        self._probe = Probe()
        self._probe.waiting.append(may)
        return [Ask(Call(self._probe, Asked(), login=self.named))]

    def connected(self) -> None:
        """There is a new connection for the watches; `prove` until it is proven what it leads to."""
        self.rollback.connected()

    def prove(self, own_token: bytes | None, watches: Iterable[Readable]) -> list[Effect]:
        """Read by whose right one may, see `Rollback.rights`, until it is known whether the store is the one it was."""
        return [Ask(Call(Proof(self.rollback), asked)) for asked in self.rollback.rights(own_token, watches)]

    def other_history(self, header: Header) -> None:
        """The store is known to be another one: what was read before says nothing about this one."""
        self.rollback.other_history(header)
        self._auth_off = None

    def begin(self, call: Call, known: int, at: float) -> None:
        """A call leaves now; `known` is the newest revision that the watches have seen."""
        call.begun, call.began_at = self.rollback.begin(known), at
        if isinstance(call.question, Probe):
            for may in call.question.waiting:
                may.fresh = True

    def answered(self, call: Call, header: Header) -> list[Effect]:
        """etcd answered a call."""
        question = call.question
        if call.login:
            # It took a user there is not: that says nothing.
            return [Ask(Call(question, call.asked))]
        if self.rollback.is_stale(call.begun):
            # Maybe the store answered that is no more: its revision is neither "now" nor anything else here.
            return [Ask(call)]
        linearizable = call.linearizable and call.asked.key != NO_RIGHT.key
        effects: list[Effect] = []
        if self.rollback.answered(call.begun, header, linearizable):
            effects.append(WentBack(header, call.begun.known))
            self._auth_off = None
        if isinstance(question, Now):
            effects.append(Tell(question, header))
        elif isinstance(question, May):
            effects.append(Tell(question, Granted(header)))
        elif isinstance(question, Probe):
            effects += self._probed(question, call, header)
        return effects

    def failed(self, call: Call, status: int, text: str) -> list[Effect]:
        """etcd refused a call, or could not be asked."""
        question = call.question
        if call.login:
            if status == Status.INVALID_ARGUMENT and isinstance(question, Probe):
                return self._probed(question, call, Refusal(USER_EMPTY))
            return [Ask(Call(question, call.asked))]
        if status in REFUSALS:
            refusal = Refusal(f"rpc error: code = {REFUSALS[Status(status)]} desc = {text}")
            return self._refused(question, call, refusal)
        if text == NO_LEADER_TEXT and call.linearizable:
            call.linearizable = False
            return [Ask(call)]
        call.linearizable = True
        return [Ask(call, later=True)]

    def again(self, call: Call) -> list[Effect]:
        """A while after a failure: make the call again, if anybody still wants to know."""
        if call.question.wanted:
            return [Ask(call)]
        if call.question is self._probe:
            self._probe = None
        return []

    def _refused(self, question: Question, call: Call, refusal: Refusal) -> list[Effect]:
        if isinstance(question, Probe):
            return self._probed(question, call, refusal)
        if isinstance(question, May):
            return [Tell(question, refusal)]
        effects: list[Effect] = []
        if isinstance(question, Now):
            # Auth is on, whatever was believed.
            self._auth_off = None
            session = question.refused()
            if session is not None:
                effects.append(SendAway(session, refusal))
            effects += self.read(question)
        return effects

    def _probed(self, probe: Probe, call: Call, answer: Header | Refusal) -> list[Effect]:
        """It is known whether auth is on: answer everybody who waits for that."""
        self._probe = None
        self.auth_on = isinstance(answer, Refusal)
        self._auth_off = None if isinstance(answer, Refusal) else (call.began_at, answer)
        effects: list[Effect] = []
        for may in probe.waiting:
            if not isinstance(answer, Refusal):
                effects.append(Tell(may, Granted(answer) if may.fresh else answer))
            elif may.asked.token is None:
                # In etcd's words, which go by the certificate that it is shown as well.
                effects.append(Tell(may, answer))
            else:
                effects.append(Ask(Call(may, may.asked)))
        return effects
