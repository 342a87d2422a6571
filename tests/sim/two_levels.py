"""Two levels of the core, as with --workers: a worker, whose etcd is a hub, and the hub, before etcd.

The worker's watches come from the hub, its reads and checks go to etcd. The connections of both levels break, both are
killed and started again, and the worker may read slowly. The worker's clients must see what they would see of etcd.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from proto.pb import rpc_pb2
from proto.scan import Header, WatchResponse, scan_watch_response
from tests.sim import settle
from tests.sim.config import COVERS, Config, make_config
from tests.sim.constants import replaced
from tests.sim.failure import SimulationFailure
from tests.sim.parts import REAL, Parts
from tests.sim.steps import Step, execute
from tests.sim.world import Move, SimClient, World

STEPS = 80
LOST = "rpc error: code = Unavailable desc = etcdserver: the simulator took it"
# The steps of the worker's world, as often as each is made.
_STEPS = (
    ("put", "create", "flow") * 8
    + ("burst", "join", "txn", "delete", "cancel", "progress", "reconnect") * 3
    + ("compact", "squeeze", "wait", "press", "disconnect", "break_upstream") * 2
    + ("herd", "reopen", "leave", "restart", "wait_long", "expire_token")
)
_UNLIMITED = {"watches_per_session_max": 100_000, "watches_max": 1000, "trunks_max": 1000, "queue_max": 1000}


class HubStream:
    """A stream of the worker at the hub: to the worker one at etcd, to the hub the outlet of a session."""

    def __init__(self, hub: Hub, token: bytes | None, window: int) -> None:
        self.member = hub.member
        self.requests: deque[bytes] = deque()
        self.out: deque[WatchResponse] = deque()
        self.can_send = False
        # Of an outlet: see `SimSession`.
        self.stalled = False
        self.stalled_input, self.stalled_at, self.stalled_ids = 0, 0.0, ()
        self.announced: dict[int, Any] = {}
        self.returned: dict[Any, int] = {}
        self.ended: tuple[int, str] | None = None
        self.closed = False
        self._hub = hub
        # Responses that it takes before it stalls.
        self._window = window
        self.core: Any = hub.core.open_session(self, hub.package.Identity(token, False), hub.now)

    # the worker's side

    @property
    def spans(self) -> dict[int, tuple[bytes, bytes]]:
        """The range of each watch by its id."""
        return {watch_id: (watch.trunk.key, watch.trunk.range_end) for watch_id, watch in self.core.watches.items()}

    @property
    def can_receive(self) -> bool:
        """Whether there is a request to take."""
        return bool(self.requests) and self.ended is None

    def receive(self, _: random.Random) -> None:
        """Take one request."""
        request, hub = rpc_pb2.WatchRequest.FromString(self.requests.popleft()), self._hub
        kind = request.WhichOneof("request_union")
        if kind == "create_request":
            create = request.create_request
            no_put, no_delete = rpc_pb2.WatchCreateRequest.NOPUT, rpc_pb2.WatchCreateRequest.NODELETE
            asked = hub.package.CreateRequest(
                create.key,
                create.range_end,
                create.start_revision or None,
                create.watch_id,
                create.progress_notify,
                no_put in create.filters,
                no_delete in create.filters,
                create.prev_kv,
                create.fragment,
            )
            hub.input(hub.core.create, self.core, asked)
        elif kind == "cancel_request":
            hub.input(hub.core.cancel, self.core, request.cancel_request.watch_id)
        else:
            hub.input(hub.core.progress, self.core)

    def send(self, _: random.Random) -> None:
        """Do nothing: the hub writes by itself."""

    @property
    def is_drained(self) -> bool:
        """Whether it can take more after a stall."""
        return self.stalled and self.ended is None and len(self.out) <= self._window

    def drain(self, _: random.Random) -> None:
        """Let the hub write again."""
        if self.is_drained:
            self.stalled = False
            self._hub.input(self._hub.core.drained, self.core, None)

    def close(self) -> None:
        """End the stream."""
        self.closed = True
        if self.ended is None:
            self._hub.input(self._hub.core.close, self.core)
        self._hub.calls.queries.session_over(self.core)
        self.requests.clear()
        self.out.clear()

    # the hub's side

    def write(self, messages: tuple[bytes, ...]) -> bool:
        """Take framed responses; False: no more now."""
        if self.closed or self.ended is not None:
            raise SimulationFailure("written to a stream that has ended")
        self.out.extend(scan_watch_response(message[5:]) for message in messages)
        return len(self.out) <= self._window

    def answered(self, _: bytes) -> None:
        """Do nothing: the clients of the worker judge the answers."""

    def note_returned(self, *_: Any) -> None:
        """Do nothing."""

    def end(self, status: int, text: str, *, has_leader: bool) -> None:
        """End the stream after what is written."""
        del has_leader
        self.ended = (status, text)


class HubMember:
    """The hub in the place of a member of etcd."""

    ordered_progress = True
    member_id = 0xF0

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    @property
    def has_server(self) -> bool:
        """Whether the hub is connected to etcd."""
        return self._hub.upstream.endpoint is not None

    @property
    def revision(self) -> int:
        """What etcd has, which is not below what the hub has."""
        return self._hub.store.revision

    @property
    def index(self) -> int:
        """The newest entry of etcd's log."""
        return max(member.index + member.behind for member in self._hub.members)

    behind = 0

    def open_stream(self, token: bytes | None, channel_max: int) -> HubStream:
        """Open a stream."""
        return HubStream(self._hub, token, channel_max)


class Hub(World):
    """The hub: its core, engine and watch client, before the members of the worker's world."""

    def __init__(self, config: Config, front: World, parts: Parts) -> None:
        super().__init__(config, parts)
        self.store, self.permissions, self.members = front.store, front.permissions, front.members
        self.now = front.now
        self.member = HubMember(self)
        # It has registered watches at the restored store before its log showed that it was restored: that may be once
        # its revision has passed the known one. Then these watches are cancelled too, although they missed nothing.
        self.noticed_late = False
        self._registered = False
        self._start()

    def was_restored(self, revision: int, old_revision: int, rng: random.Random) -> None:
        """Note the restore: no watch is registered at the restored store yet."""
        self._registered = False
        super().was_restored(revision, old_revision, rng)

    def _resumed(self, ordered_progress: bool) -> None:
        self._registered = True
        super()._resumed(ordered_progress)

    def lost_upstream(self) -> None:
        """As `AuthReader.broken`: the worker relies on it that the hub reads again before it admits a watch."""
        self.calls.queries.broken()

    def _other_history(self, header: Header) -> None:
        self.noticed_late = self._registered
        super()._other_history(header)


class Worker(World):
    """The worker with its clients, the hub, and etcd."""

    _hub: Hub | None = None
    # The worker's calls do not reach etcd yet, after a restore.
    _calls_resume = False

    def __init__(self, config: Config, hub_config: Config, parts: Parts) -> None:
        super().__init__(config, parts)
        self._hub = Hub(hub_config, self, parts)
        self.heal()

    @property
    def hub(self) -> Hub:
        """The hub; there is one once both levels have started."""
        assert self._hub is not None
        return self._hub

    def _start(self) -> None:
        super()._start()
        if self._hub is not None:
            self.heal()

    def heal(self) -> None:
        """End the faults: there are none, but the worker's endpoint is the hub."""
        self.upstream.state.late_progress = True
        self.upstream.set_endpoints([self.hub.member])  # type: ignore[list-item]  # it stands in for a member

    def lose_etcd(self) -> None:
        """Lose both levels' connections to etcd; that to the hub lives on."""
        self.hub.upstream.disconnect()
        self._calls_resume = True

    def restore(self, revision: int, rng: random.Random) -> None:
        """Restore the store, once both levels have noticed the last restore."""
        if self.hub.undiscovered is None:
            super().restore(revision, rng)

    def went_back(self, header: Header) -> None:
        """The worker has noticed that the store went back, maybe once more because of a hub that noticed it late."""
        if self.hub.noticed_late and self.restored_to is None:
            self.restored_to = header.revision
        self.hub.noticed_late = False
        super().went_back(header)

    def was_restored(self, revision: int, old_revision: int, rng: random.Random) -> None:
        """Note the restore; either level may notice it first."""
        hub = self.hub
        hub.now, hub.rng = self.now, self.rng
        levels = [partial(hub.was_restored, revision, old_revision, rng)]
        levels.insert(rng.randint(0, 1), partial(super().was_restored, revision, old_revision, rng))
        for level in levels:
            level()
        if self.restored_to is not None and self._in_flight(revision, paused=True):
            # It does not know yet that there is something to notice.
            self.undiscovered = revision

    def calls_resumed(self, rng: random.Random) -> None:
        """The worker's calls reach etcd again, see `Engine.calls_resumed`."""
        self._calls_resume = False
        self.upstream.check_history(rng)
        self.calls.connected()

    def _in_flight(self, revision: int, *, paused: bool) -> bool:
        """Whether the hub has sent a revision above this one that the worker has not read; `paused`: also on those."""
        return any(
            response.header.revision > revision
            for stream, link in self.upstream._links.items()
            if paused or not stream.paused
            for response in link.out
        )

    def restart_hub(self) -> None:
        """Kill the hub and start another one."""
        self.upstream.disconnect()
        self.hub.restart()

    def moves(self, frozen: SimClient | None = None) -> list[Move]:
        """Return the possible moves of both levels."""
        hub = self.hub
        hub.now, hub.rng = self.now, self.rng
        moves = [*super().moves(frozen), *hub.moves()]
        revision = self.undiscovered
        if revision is not None and not self.knows_above(revision) and not self._in_flight(revision, paused=True):
            self.undiscovered = None
        if self._calls_resume and not self._in_flight(revision or 0, paused=False):
            # etcd has restarted: what the hub had sent before has arrived, except on paused streams.
            moves.append(self.calls_resumed)
        for stream, link in self.upstream._links.items():
            assert isinstance(link, HubStream)
            if link.is_drained:
                moves.append(link.drain)
            if link.ended is not None and not link.out:
                moves.append(partial(self._stream_ended, stream))
        return moves

    def _stream_ended(self, stream: Any, _: random.Random) -> None:
        link: Any = self.upstream._links.get(stream)
        if link is not None and link.ended is not None and not link.out:
            self.upstream._end(stream, *link.ended)

    def next_deadline(self) -> float | None:
        """Return when a timer of either level is due."""
        return min(filter(None, (super().next_deadline(), self.hub.next_deadline())), default=None)

    def expire(self) -> None:
        """Fire the timers of both levels."""
        self.hub.now, self.hub.rng = self.now, self.rng
        self.hub.expire()
        super().expire()

    def check(self) -> None:
        """Check the invariants of both cores."""
        super().check()
        self.hub.check()


def _configs(rng: random.Random, restores: bool) -> tuple[Config, Config]:
    """Return the shapes of the worker's world and of the hub, which may have covers."""
    worker, hub = (replace(make_config(rng), old_members=0) for _ in range(2))
    if not restores:
        worker, hub = (replace(config, tells_status=False) for config in (worker, hub))
    worker = replace(worker, covers=(), own_token=None)
    hub = replace(hub, auth=worker.auth)
    limits = {**hub.limits, **_UNLIMITED, "lagging_age_s_max": None}
    return (
        replace(worker, limits={**worker.limits, "upstream_has_limits": True}, channel_max=max(2, worker.channel_max)),
        replace(hub, limits=limits, ranges=worker.ranges, keys=worker.keys),
    )


def _faults(world: Worker) -> dict[str, Callable[[random.Random], object]]:
    hub = world.hub
    return {
        "restart the hub": lambda _: world.restart_hub(),
        "break the hub's connection": lambda _: hub.upstream.disconnect(),
        "break a stream of the hub": hub.upstream.end_stream,
        "break a stream of the worker": world.upstream.end_stream,
        "change the hub's covers": lambda rng: hub.reload(tuple(rng.sample(COVERS, rng.choice((0, 1, 2))))),
        "cancel a watch of the hub": lambda rng: hub.upstream.cancel_one(rng, LOST),
        "notify": lambda _: [link.notify_progress(each) for link in hub.upstream.links() for each in link.spans],
    }


def run_two_levels(seed: int, parts: Parts = REAL, trace: Callable[[str], None] | None = None) -> str:
    """Run a seed; return the finding, or "". With odd seeds the store may be restored."""
    rng = random.Random(seed)
    restores = seed % 2 == 1
    config, hub_config = _configs(rng, restores)
    try:
        with replaced(parts, config.constants):
            world = Worker(config, hub_config, parts)
            world.trace = trace
            if trace is not None:
                world.hub.trace = lambda line: trace("                  hub" + line)
            _run(world, rng, trace, (*_STEPS, "restore", "restore") if restores else _STEPS)
    except Exception as error:
        if trace is not None:
            raise
        return f"{type(error).__name__}: {error}"
    return ""


def _run(world: Worker, rng: random.Random, trace: Callable[[str], None] | None, names: tuple[str, ...]) -> None:
    for name in ("join", "burst", *rng.choices(names, k=STEPS)):
        if trace is not None:
            trace(f"{name} at revision {world.store.revision}, {world.now:.2f} s")
        execute(world, Step(name, rng.getrandbits(32)))
        if rng.random() < 0.1:
            faults = _faults(world)
            fault = rng.choice(list(faults))
            if trace is not None:
                trace(fault)
            world.count(fault)
            faults[fault](rng)
    if trace is not None:
        trace("the end")
    _finish(world, rng)


def _finish(world: Worker, rng: random.Random) -> None:
    """Let both levels come to rest; nothing may be missing, and nothing may be left."""
    settle.catch_up(world, rng)
    settle.check_answers(world)
    world.check()
    settle.check_guarantees(world)
    for client in list(world.clients):
        world.close_session(client)
    settle.settle(world, rng, 400.0)
    world.check()
    settle.check_nothing_left(world)
    settle.check_nothing_left(world.hub)
