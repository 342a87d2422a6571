"""The simulated world: one core, its engine, its upstream, an etcd and its clients, on one virtual clock.

Every interaction between them is a pending *move*: a request on its way upstream, a response on its way back, a member
that applies, a read that is answered, a client that reads its socket. A step of the simulation does one thing and makes
a few random moves; `settle` makes all of them.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from coalesce.guarantees.checkers import Received
from proto.scan import Header, WatchResponse
from tests.coalesce.shell import messages_of
from tests.sim.calls import Calls
from tests.sim.clients import OTHER_HISTORY, SimSession, SimWatch, Spec, judge_logs, leaves
from tests.sim.config import Config, covers_range
from tests.sim.describing import describe
from tests.sim.failure import SimulationFailure
from tests.sim.model_store import Store
from tests.sim.parts import REAL, Parts
from tests.sim.permissions import Permissions
from tests.sim.store_member import make_member
from tests.sim.upstream_shell import AnyMember, Callbacks, UpstreamShell

Move = Callable[[random.Random], None]


@dataclass(slots=True, eq=False)
class SimClient:
    """A client program: its identity, its habits, its watches, and its session while it has one."""

    token: bytes | None
    has_leader: bool
    by_header: bool
    window: int
    read: Callable[[SimClient, int], None]
    watches: list[SimWatch] = field(default_factory=list)
    session: SimSession | None = None

    def reads_some(self, rng: random.Random) -> None:
        """Read a few messages."""
        self.read(self, rng.randint(1, 6))


class World:
    """The state of one simulation. `parts` is the code under test: the real one, or a mutant of it."""

    def __init__(self, config: Config, parts: Parts = REAL) -> None:
        self.config = config
        self.package = parts.core
        self._parts = parts
        self.now = 1000.0
        self.store = Store()
        self.permissions = Permissions(config.auth, config.keys)
        made = partial(make_member, config, parts, self.store, self.permissions)
        self.members: list[AnyMember] = [made(place) for place in range(config.members)]
        self.covers = config.covers
        self.clients: list[SimClient] = []
        # All watches ever, for the checkers; and those of clients that disconnected permanently.
        self.watches: list[SimWatch] = []
        self.counts: dict[str, int] = {}
        # Members that are cut off from the others, and members that answer no call.
        self.cut: set[int] = set()
        self.still: set[int] = set()
        # The revision that the store was restored to, until the proxy notices.
        self.restored_to: int | None = None
        # The same while the proxy may still send outdated data; and the highest revision that it may send until then.
        self.undiscovered: int | None = None
        self.believed = 0
        self.restores = 0
        # Receives a trace of the run, if not None.
        self.trace: Callable[[str], None] | None = None
        self._inbox: deque[tuple[Any, ...]] = deque()
        self._busy = False
        self._inputs = 0
        self._rings_at: float | None = None
        """The engine's timer; if it fires too early, it is set again."""
        self._start()

    def _start(self) -> None:
        """Start the proxy."""
        limits = self.package.CoreLimits(**self.config.limits, covers=self.covers)
        self.core: Any = self.package.Coalescer(limits)
        self.upstream = UpstreamShell(
            self.members,
            self.config.channel_max,
            self.permissions.refusal,
            Callbacks(
                self._received,
                lambda *answer: self.input(self.core.upstream_progress, *answer),
                self._lost,
                lambda header: self.core.header_seen(header),
                self._resumed,
                self._no_leader,
                self._other_history,
                self.lost_upstream,
            ),
            self._parts,
            self.has_leader,
            self.config.tells_status,
            streams_max=self.config.streams_max,
            whole=self.config.whole,
            own_token=self.config.own_token if self.config.auth else None,
        )
        self.calls = Calls(self, self._parts, self.config.probe_age_s_max)
        self.undiscovered = self.restored_to = None
        self.open_upstreams: dict[int, Any] = {}
        self.rng = random.Random(0)

    def reload(self, covers: tuple[bytes, ...]) -> None:
        """Change the covers while clients are connected, as SIGHUP does."""
        self.covers = covers
        self.core.limits = replace(self.core.limits, covers=covers)
        self.input(self.core.expire)

    def covers_of(self, span: tuple[bytes, bytes]) -> list[bytes]:
        """Return the prefixes of the covers that contain a range, without those that etcd has refused."""
        refused = self.core._state.covers.suspended
        return [prefix for prefix in self.covers if prefix not in refused and covers_range(prefix, *span)]

    def restart(self) -> None:
        """Kill the proxy and start a new one: all sessions break."""
        for client in self.clients:
            if client.session is not None:
                client.session.closed = True
                client.session = None
                self._session_over(client)
        self.upstream.disconnect()
        self._inbox.clear()
        self._start()

    def restore(self, revision: int, rng: random.Random) -> None:
        """Restore the store from a snapshot of an earlier revision; the proxy must detect it by itself.

        The clients' logs so far are checked against the old truth; watches that received nothing above `revision`
        continue under the new one.
        """
        self._read_all()
        self.judge(lambda _: None)
        self.lose_etcd()
        old_revision = self.store.revision
        self.store.restore(revision)
        for member in self.members:
            member.restore()
        self.was_restored(revision, old_revision, rng)

    def lose_etcd(self) -> None:
        """Lose the connection to etcd."""
        self.upstream.disconnect()

    def knows_above(self, revision: int) -> bool:
        """Whether the proxy has seen that the store was above a revision."""
        known: int = self.calls.queries.rollback.begin(self.upstream.state.newest_revision).known
        return known > revision

    def was_restored(self, revision: int, old_revision: int, rng: random.Random) -> None:
        """Note the restore; detect it at once if it could not be detected later."""
        self.believed = old_revision
        self.undiscovered = revision
        self.restored_to = revision if self.restored_to is None else min(revision, self.restored_to)
        self.restores += 1
        self._forget_above(revision)
        knows = self.knows_above(revision)
        self.calls.restored(revision, old_revision if knows else None, rng)
        # The log proves nothing if the store was restored twice, does not report its position, or was read from but
        # never connected to.
        untold = self.restores > 1 or not self.config.tells_status or self.upstream.lineage.known is None
        if not knows or untold or rng.random() < 0.3:
            self.calls.prove_at_once()
            self.undiscovered = None

    def went_back(self, header: Header) -> None:
        """The proxy has noticed that the store went back."""
        self.count("rollbacks noticed")
        revision, self.restored_to = self.restored_to, None
        if revision is None:
            raise SimulationFailure("a restore was reported that did not happen")
        # Data sent until now may be of either history.
        self._read_all()
        self.undiscovered = None
        self._forget_above(revision)
        self.upstream.store_went_back(header.revision)
        self.input(self.core.other_history, header)

    def _read_all(self) -> None:
        """Have all clients read everything in flight to them."""
        for client in self.clients:
            while client.session is not None and client.session.outbox:
                self.client_reads(client, 1)

    def _forget_above(self, revision: int) -> None:
        """Switch the clients to the truth of a store that was restored to `revision`."""
        for client in self.clients:
            for watch in client.watches:
                session = client.session
                watch.went_back(revision, session is not None and session.ended is None and not watch.canceled)
            if client.session is not None:
                client.session.store_went_back(revision)
        kept = {id(watch) for client in self.clients for watch in client.watches}
        self.watches = [watch for watch in self.watches if id(watch) in kept and not watch.over]

    def restart_member(self, member: AnyMember) -> None:
        """Kill a member and restart it."""
        self.upstream.lose_member(member)
        member.restart()

    def judge(self, complete_through: Callable[[SimWatch], int | None]) -> None:
        """Check the logs of all watches."""
        judge_logs(self.watches, self.store.truth(), complete_through)
        for watch in self.watches:
            self.count("events checked", sum(len(each.changes) for each in watch.log.records if type(each) is Received))

    def count(self, what: str, number: int = 1) -> None:
        """Count an event."""
        self.counts[what] = self.counts.get(what, 0) + number

    # the engine

    def _received(self, upstream: Any, response: WatchResponse) -> None:
        if response.canceled:
            self.open_upstreams.pop(id(upstream), None)
            if response.cancel_reason == OTHER_HISTORY and not upstream.closed:
                self._other_history(response.header)
        self.input(self.core.upstream_response, upstream, response)

    def _lost(self, upstream: Any, status: int, text: str) -> None:
        self.open_upstreams.pop(id(upstream), None)
        self.input(self.core.upstream_lost, upstream, self.package.UpstreamLost(status, text))

    def _resumed(self, ordered_progress: bool) -> None:
        self.core.ordered_progress = ordered_progress
        member = self.upstream.member
        if self.undiscovered is not None and member is not None and member.revision > self.believed:
            raise SimulationFailure("watches were registered at a restored store that had grown past the old one")
        self.calls.connected()

    def lost_upstream(self) -> None:
        """The connection of the watches has ended; with one level, a cached probe may outlive it."""

    def _no_leader(self) -> None:
        self.count("sessions ended without a leader")
        self.input(self.core.no_leader)
        if self._busy:
            return
        for _ in self.clients:
            # Those that exceed a step end at the next timers.
            self.input(self.core.expire)
        for client in self.clients:
            if client.has_leader and client.session is not None and client.session.ended is None:
                raise SimulationFailure("a session with hasleader goes on without a leader")

    def _other_history(self, header: Header) -> None:
        self.calls.queries.other_history(header)
        self.went_back(header)

    def has_leader(self, member: AnyMember) -> bool:
        """Whether a member has a leader."""
        return self.store.has_quorum and member.member_id not in self.cut

    def now_at_least(self) -> int:
        """The least revision that a read of "now" may return: without a leader that of some member."""
        if any(self.has_leader(endpoint.member) for endpoint in self.upstream.endpoints):
            return self.store.revision
        return min(member.revision for member in self.members)

    def leaders_changed(self) -> None:
        """Update "now" after a change of leaders at the endpoints, also for creates that already wait."""
        for client in self.clients:
            if client.session is not None:
                client.session.now_may_be(self.now_at_least())

    def check_rest(self) -> None:
        """Check the idle state: watches have their places, and sessions with hasleader know of a lost leader."""
        self.upstream.check()
        for client in self.clients if self.upstream.choice.leaderless else ():
            if client.has_leader and client.session is not None and client.session.ended is None:
                raise SimulationFailure("a session with hasleader was not ended although there is no leader")

    def lose_quorum(self) -> None:
        """Take the leader away: reads of "now" return some member's revision, also those already in flight."""
        self.store.has_quorum = False
        self.leaders_changed()

    def heal(self) -> None:
        """End all faults of members, connections and endpoints."""
        self.store.has_quorum = True
        self.cut.clear()
        self.still.clear()
        self.upstream.poisoned.clear()
        self.upstream.set_endpoints(self.members)

    def send_away(self, core_session: Any, text: str, status: int = 14) -> None:
        """End a session for a reason outside the core."""
        session: SimSession = core_session.outlet
        self.calls.queries.session_over(core_session)
        if not core_session.ended and session.ended is None and not session.closed:
            session.end(status, text, has_leader=False)
            self.count("sessions disconnected")
        self.input(self.core.close, core_session)

    def input(self, method: Callable[..., list[Any]], *arguments: Any) -> None:
        """Give the core an input and carry out its effects; inputs that arise meanwhile are queued."""
        self._inbox.append((method, *arguments))
        if self._busy:
            return
        self._busy = True
        try:
            while self._inbox:
                method, *rest = self._inbox.popleft()
                self._inputs += 1
                if self.trace is not None:
                    self.trace(f"    -> {method.__name__} {' '.join(map(describe, rest))}")
                for effect in method(*rest, self.now):
                    if self.trace is not None:
                        self.trace(f"       {describe(effect)}")
                    _CARRY_OUT[type(effect).__name__](self, effect)
        finally:
            self._busy = False
        self._arm()

    def _arm(self) -> None:
        """Set the timer as the engine does, which does not query a deadline that has not moved."""
        moved = self.core.deadline_moved
        deadline = self.core.next_deadline()
        if moved:
            self._rings_at = deadline
        elif deadline is not None and (self._rings_at is None or deadline < self._rings_at):
            raise SimulationFailure("a deadline moved earlier without notice")

    def _deliver(self, effect: Any) -> None:
        payload = effect.payload
        for watch in effect.watches:
            session: SimSession = watch.outlet
            if leaves(watch.session, watch):
                continue
            if session.stalled:
                session.note_returned(watch, payload, self._inputs)
                self.count("returned")
                self.core.undelivered(watch, payload)
                continue
            if not session.write(messages_of(payload, watch.watch_id)):
                self._stall(session)

    def _send(self, effect: Any) -> None:
        session: SimSession = effect.session.outlet
        if leaves(effect.session):
            return
        for message in effect.messages:
            session.answered(message)
        if not session.write(tuple(effect.messages)) and not session.stalled:
            self._stall(session)

    def _stall(self, session: SimSession) -> None:
        self.count("stalls")
        session.stalled = True
        session.stalled_input, session.stalled_at = self._inputs, self.now
        session.stalled_ids = tuple(session.announced)
        session.returned.clear()
        self.core.stalled(session.core)

    def _end_session(self, effect: Any) -> None:
        session: SimSession = effect.session.outlet
        session.end(effect.status, effect.text, has_leader=effect.session.identity.has_leader)
        self.count("ended sessions")

    def _open_upstream(self, effect: Any) -> None:
        upstream = effect.upstream
        if id(upstream) in self.open_upstreams:
            raise SimulationFailure("an upstream watch opened twice")
        self.open_upstreams[id(upstream)] = upstream
        self.count("backfills" if upstream.is_backfill else "trunks")
        self.upstream.open(upstream)

    def _close_upstream(self, effect: Any) -> None:
        self.open_upstreams.pop(id(effect.upstream), None)
        self.upstream.close(effect.upstream)

    def _pause_upstream(self, effect: Any) -> None:
        self.count("pauses")
        self.upstream.pause(effect.upstream, self.rng.choice((0, 0, 1, 2)))

    def _resume_upstream(self, effect: Any) -> None:
        self.upstream.resume(effect.upstream)

    def _read_revision(self, effect: Any) -> None:
        self.count("reads")
        self.calls.read(effect.read)

    def _check_permission(self, effect: Any) -> None:
        self.calls.check(effect.check)

    def _request_progress(self, effect: Any) -> None:
        self.count("progress requests upstream")
        self.upstream.request_progress(effect.number, effect.upstreams)

    # moves

    def moves(self, frozen: SimClient | None = None) -> list[Move]:
        """Return all possible moves; a `frozen` client reads nothing."""
        moves: list[Move] = []
        for member in self.members:
            if member.behind and member.member_id not in self.cut:
                moves.append(member.apply_some)
            if member.unsynced:
                moves.append(member.sync)
            if member.victims:
                moves.append(member.retry_victims)
            if member.compacting:
                moves.append(member.compact_step)
        self.upstream.add_moves(moves)
        if self.calls.sent:
            moves.append(self.calls.answer_one)
        if self.calls.may_go_on:
            moves.append(self.calls.again)
        for client in self.clients:
            session = client.session
            if session is not None and client is not frozen and (session.outbox or session.ended is not None):
                moves.append(client.reads_some)
        return moves

    def make_moves(self, rng: random.Random, count: int) -> None:
        """Make up to `count` random moves."""
        self.rng = rng
        for _ in range(count):
            moves = self.moves()
            if not moves:
                return
            rng.choice(moves)(rng)

    # clients

    def client_reads(self, client: SimClient, count: int) -> None:
        """Have a client read some messages; once all are read, the proxy may write again, or the stream is over."""
        session = client.session
        if session is None:
            return
        while count > 0 and session.outbox:
            if self.undiscovered is None:
                session.read(self.store.revision, self.store.compact_revision)
            else:
                session.read(max(self.store.revision, self.believed), self.store.revision)
            count -= 1
        if session.ended is not None:
            if not session.outbox:
                session.closed = True
                client.session = None
                self._session_over(client)
            return
        if session.stalled and session.outbox_bytes <= session.window:
            session.stalled = False
            self.input(self.core.drained, session.core, session.window - session.outbox_bytes)

    def connect_client(self, client: SimClient) -> None:
        """Open a session for a client, with all watches that it still wants."""
        if client.has_leader and self.upstream.choice.leaderless:
            # It is refused, as proxy/watch/service.py does.
            return
        limits = self.config.limits
        session = SimSession(
            client.window,
            limits.get("response_bytes_max", 1 << 22),
            partial(self.permissions.refusal, client.token),
            limits.get("fragment_bytes", 1 << 21),
            limits.get("watches_per_session_max", 100_000),
            any(limits.get(name, 1000) < 1000 for name in ("watches_max", "trunks_max", "queue_max")),
        )
        session.noticed = lambda: self.undiscovered is None
        session.fickle = lambda: client.token in self.permissions.fickle
        identity = self.package.Identity(client.token, client.has_leader)
        session.core = self.core.open_session(session, identity, self.now)
        client.session = session
        for watch in client.watches:
            if not watch.over:
                self.create(client, watch, 0)

    def create(self, client: SimClient, watch: SimWatch, watch_id: int) -> None:
        """Send a watch's create request, from its next revision."""
        session = client.session
        assert session is not None
        spec: Spec = watch.spec
        start_revision = watch.next_revision
        session.sent_create(watch, watch_id, self.now_at_least())
        request = self.package.CreateRequest(
            spec.key,
            spec.range_end,
            start_revision,
            watch_id,
            spec.progress_notify,
            spec.no_put,
            spec.no_delete,
            spec.prev_kv,
            spec.fragment,
        )
        auth_off = self.calls.queries.admit(session.core, (spec.key or b"\0", spec.range_end), self.now)
        if auth_off is None:
            self.input(self.core.create, session.core, request)
        else:
            self.input(self.core.create_admitted, session.core, request, auth_off)

    def ask_progress(self, session: SimSession) -> None:
        """Send a progress request."""
        session.sent_progress(min(member.revision for member in self.members))
        self.input(self.core.progress, session.core)

    def close_session(self, client: SimClient) -> None:
        """Break or close a client's stream: unread messages are lost."""
        session = client.session
        if session is None:
            return
        client.session = None
        if session.ended is None:
            self.input(self.core.close, session.core)
        self.calls.queries.session_over(session.core)
        session.closed = True
        self._session_over(client)

    def _session_over(self, client: SimClient) -> None:
        """Reset a client whose state is outdated without its knowledge: it got no notice of the restore."""
        for watch in client.watches:
            if watch.doomed or self.undiscovered is not None:
                watch.forget()

    # time

    def advance(self, seconds: float) -> None:
        """Let time pass, firing the core's timers on time, or at the end when the event loop is late."""
        until = self.now + seconds
        if self.config.late_timers:
            self.now = until
        for _ in range(10_000):
            deadline = self.next_deadline()
            if deadline is None or deadline > until:
                break
            self.now = max(self.now, deadline)
            self.expire()
        else:
            raise SimulationFailure("a timer that is always due")
        self.now = until

    def next_deadline(self) -> float | None:
        """Return when the core's timer is due."""
        self._rings_at = self.core.next_deadline()
        return self._rings_at

    def check(self) -> None:
        """Have the core check its invariants."""
        self.count("invariant checks")
        self.count("groups behind", sum(len(session.groups_behind) for session in self.core._state.lagging_sessions))
        self._parts.invariants.check(self.core)
        self._check_postponed()
        age_s_max = self.config.limits["lagging_age_s_max"]
        for upstream in self.open_upstreams.values():
            if not upstream.is_backfill and type(upstream.source).__name__ == "Cover" and upstream.token is not None:
                raise SimulationFailure("a cover is watched with the token of a client")
        for client in self.clients:
            session = client.session
            if session is None or session.ended is not None or not session.stalled:
                continue
            if not session.core.stalled:
                raise SimulationFailure("the core does not know that a session is stalled")
            waits = any(watch_id in session.core.watches for watch_id in session.stalled_ids)
            if age_s_max is not None and waits and self.now > session.stalled_at + age_s_max + 0.001:
                raise SimulationFailure(f"a session has been stalled since {session.stalled_at}, it is {self.now}")

    def _check_postponed(self) -> None:
        """Check that what exceeded the bound of one step goes on at once."""
        core, state = self.core, self.core._state
        to_examine = core._moving._to_examine if state.covers.prefixes else ()
        rests = (state.leaving, state.to_replay_later, state.to_advance_later, core._notifying._rounds, to_examine)
        deadline = World.next_deadline(self)
        if any(rests) and (deadline is None or deadline > self.now):
            raise SimulationFailure("work that was postponed waits for another reason to go on")

    def expire(self) -> None:
        """Fire the due timers of the core and the reader."""
        self.calls.prove()
        self.upstream.look_again(self.rng)
        self.input(self.core.expire)


_CARRY_OUT: dict[str, Callable[[World, Any], None]] = {
    "Deliver": World._deliver,
    "Send": World._send,
    "TakeRequests": lambda world, _effect: world.count("lines short again"),
    "EndSession": World._end_session,
    "OpenUpstream": World._open_upstream,
    "CloseUpstream": World._close_upstream,
    "PauseUpstream": World._pause_upstream,
    "ResumeUpstream": World._resume_upstream,
    "ReadRevision": World._read_revision,
    "CheckPermission": World._check_permission,
    "RequestProgress": World._request_progress,
}
