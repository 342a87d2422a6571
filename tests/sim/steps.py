"""The steps of a simulation: actions of clients, writers and operators, and faults.

A run is a list of steps, and each step is a name and a seed of its own: its action follows from that seed and the
current state of the world. So every subset of a list is a run too (a step without anything to do does nothing), which
makes it possible to shrink a failure.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from tests.sim.calls import POISON
from tests.sim.clients import LOST, SimWatch, Spec
from tests.sim.config import COVERS
from tests.sim.model_store import LEASE
from tests.sim.permissions import MIGHTY, TOKENS
from tests.sim.settle import isolate, settle
from tests.sim.world import SimClient, World


class Step(NamedTuple):
    """One action or fault."""

    name: str
    seed: int


Action = Callable[[World, random.Random], None]

ACTIONS: dict[str, Action] = {}
WEIGHTS: dict[str, float] = {}
FAULTS: set[str] = set()


def _action(weight: float, fault: bool = False) -> Callable[[Action], Action]:
    def register(action: Action) -> Action:
        name = action.__name__
        ACTIONS[name] = action
        WEIGHTS[name] = weight
        if fault:
            FAULTS.add(name)
        return action

    return register


def execute(world: World, step: Step) -> None:
    """Do one step, make a few moves, and check the core's invariants."""
    rng = random.Random(step.seed)
    world.rng = rng
    world.count(step.name)
    ACTIONS[step.name](world, rng)
    world.make_moves(rng, rng.randint(0, world.config.moves))
    world.advance(rng.choice((0.0, 0.001, 0.02)))
    world.check()


# writers


@_action(6)
def put(world: World, rng: random.Random) -> None:
    """A key is put."""
    world.store.write([(rng.choice(world.config.keys), _value(world, rng))], lease=rng.choice((0, 0, 0, LEASE)))


@_action(2)
def delete(world: World, rng: random.Random) -> None:
    """A key is deleted."""
    keys = world.store.live_keys()
    if keys:
        world.store.write([(rng.choice(keys), None)])


@_action(3)
def txn(world: World, rng: random.Random) -> None:
    """Several keys change in one revision."""
    keys = rng.sample(world.config.keys, rng.randint(1, len(world.config.keys)))
    world.store.write([(key, _value(world, rng) if rng.random() < 0.7 else None) for key in keys])


@_action(3)
def burst(world: World, rng: random.Random) -> None:
    """Many revisions at once."""
    for _ in range(rng.randint(2, 10)):
        world.store.write([(rng.choice(world.config.keys), _value(world, rng))])


@_action(0.5)
def expire_lease(world: World, _: random.Random) -> None:
    """The lease runs out: all its keys are deleted at once."""
    world.store.revoke()


@_action(1.5, fault=True)
def compact(world: World, rng: random.Random) -> None:
    """The history is compacted, mostly close to its end."""
    revision = world.store.revision
    world.store.compact(rng.choice((revision, revision - 1, revision - rng.randint(0, 8), rng.randint(1, revision))))


def _value(world: World, rng: random.Random) -> bytes:
    return b"%d:" % world.store.revision + b"v" * rng.randint(0, world.config.value_bytes_max)


# clients


@_action(3)
def join(world: World, rng: random.Random) -> None:
    """A new client connects, with a watch."""
    if len(world.clients) >= world.config.clients_max:
        return
    token = rng.choice(TOKENS) if world.config.auth else None
    window = rng.choice((1 << 20, 1 << 20, 400, 100, 1))
    client = SimClient(token, rng.random() < 0.3, rng.random() < 0.5, window, world.client_reads)
    world.clients.append(client)
    world.connect_client(client)
    _new_watch(world, rng, client)


@_action(7)
def create(world: World, rng: random.Random) -> None:
    """A client creates a watch."""
    client = _connected(world, rng)
    if client is not None:
        _new_watch(world, rng, client)


def _new_watch(
    world: World,
    rng: random.Random,
    client: SimClient,
    place: int | None = None,
    start: int | None = -1,
    *,
    plain: bool = False,
) -> None:
    """Create a random watch; `place` chooses its range, `start` (unless negative) where it begins."""
    session = client.session
    if session is None or session.ended is not None or len(client.watches) >= world.config.watches_max:
        return
    key, range_end = rng.choice(world.config.ranges) if place is None else world.config.ranges[place]
    spec = Spec(
        key,
        range_end,
        no_put=rng.random() < 0.12,
        no_delete=rng.random() < 0.12,
        prev_kv=rng.random() < world.config.prev_kv,
        fragment=rng.random() < 0.3,
        progress_notify=rng.random() < world.config.progress_notify,
    )
    if plain:
        spec = Spec(key, range_end)
    if start is not None and start < 0:
        start = _start(world, rng)
    watch_id = rng.choice((0, 0, 0, 0, 0, 0, 1, 2, 3, 77, -2))
    # Drawn aside, so that the other draws of a seed stay the same.
    aside = random.Random(world.config.crowded * 10 + len(world.watches))
    specs = [watch.spec for watch in client.watches if not watch.over and not watch.spec.fragment]
    if specs and aside.random() < world.config.crowded:
        spec = aside.choice(specs)
    _add_watch(world, client, spec, start, watch_id)
    for _ in range(aside.choice((0, 1, 2, 4))):
        if aside.random() < world.config.crowded:
            _add_watch(world, client, spec, start, 0)


def _add_watch(world: World, client: SimClient, spec: Spec, start: int | None, watch_id: int) -> None:
    if client.session is None or client.session.ended is not None or len(client.watches) >= world.config.watches_max:
        return
    watch = SimWatch.make(spec, start, client.by_header)
    client.watches.append(watch)
    world.watches.append(watch)
    world.create(client, watch, watch_id)


def _start(world: World, rng: random.Random) -> int | None:
    revision = world.store.revision
    near = max(1, revision + rng.randint(-3, 2))
    future = revision + rng.randint(1, 8)
    start = rng.choice((None, None, near, near, rng.randint(1, revision), future, future))
    if rng.random() < 0.1:
        start = rng.choice((1, max(1, world.store.compact_revision + rng.randint(-1, 1))))
    return -rng.randint(1, 3) if rng.random() < 0.02 else start


@_action(0.7)
def herd(world: World, rng: random.Random) -> None:
    """Watches of one range are created together, most of them from now, during writes."""
    if world.covers and rng.random() < 0.6:
        _crowd(world, rng)
        return
    place = rng.randrange(len(world.config.ranges))
    for _ in range(rng.randint(2, 4)):
        client = _connected(world, rng)
        if client is not None:
            _new_watch(world, rng, client, place, rng.choice((None, None, None, world.store.revision)))
        world.calls.answer_checks(rng)
        put(world, rng)
        world.make_moves(rng, rng.choice((0, 0, 1)))


def _crowd(world: World, rng: random.Random) -> None:
    """A client creates watches of several ranges from one revision, past or future, and may be too slow for them."""
    client = _connected(world, rng)
    if client is None or client.session is None:
        return
    start = max(1, world.store.revision + rng.randint(-6, 4))
    for _ in range(rng.randint(2, 5)):
        _new_watch(world, rng, client, rng.randrange(len(world.config.ranges)), start, plain=True)
    world.calls.answer_checks(rng)
    world.make_moves(rng, rng.randint(5, 30))
    if start > world.store.revision:
        # The catch-up may contain the start.
        world.upstream.disconnect()
        burst(world, rng)
    elif client.session is not None and rng.random() < 0.5:
        client.window = client.session.window = 1
        for _ in range(rng.randint(2, 3)):
            txn(world, rng)
        world.make_moves(rng, rng.randint(5, 20))


@_action(3)
def cancel(world: World, rng: random.Random) -> None:
    """A client cancels a watch, created or not yet, or an id that it does not have."""
    client = _connected(world, rng)
    if client is None or client.session is None:
        return
    session = client.session
    known = [*session.announced, *(each.watch_id for each in session.requests), session.next_id, 99]
    watch_id = rng.choice(known)
    session.sent_cancel(watch_id)
    world.input(world.core.cancel, session.core, watch_id)


@_action(3)
def progress(world: World, rng: random.Random) -> None:
    """A client requests progress."""
    client = _connected(world, rng)
    if client is not None and client.session is not None:
        world.ask_progress(client.session)


@_action(1.5)
def press(world: World, rng: random.Random) -> None:
    """Clients request progress repeatedly during writes while etcd is slow to answer."""
    for _ in range(rng.randint(2, 6)):
        if rng.random() < 0.7:
            put(world, rng)
        for member in world.members:
            member.apply(rng.choice((1, 1, 100)))
        progress(world, rng)
        world.make_moves(rng, rng.randint(0, 4))
        world.advance(rng.choice((0.0, 0.02, 0.04, 0.15)))


@_action(1.5, fault=True)
def disconnect(world: World, rng: random.Random) -> None:
    """A client loses its session."""
    client = _connected(world, rng)
    if client is not None:
        world.close_session(client)


@_action(3)
def reconnect(world: World, rng: random.Random) -> None:
    """A client without a session opens one, with all its watches from their next revisions."""
    waiting = [client for client in world.clients if client.session is None]
    if waiting:
        world.connect_client(rng.choice(waiting))


@_action(1)
def reopen(world: World, rng: random.Random) -> None:
    """A client opens a watch again that the server had cancelled."""
    client = _connected(world, rng)
    if client is None:
        return
    canceled = [watch for watch in client.watches if watch.canceled and not watch.over]
    if canceled:
        world.create(client, rng.choice(canceled), 0)


@_action(0.7)
def leave(world: World, rng: random.Random) -> None:
    """A client disconnects permanently."""
    if world.clients:
        client = world.clients.pop(rng.randrange(len(world.clients)))
        world.close_session(client)


@_action(2, fault=True)
def squeeze(world: World, rng: random.Random) -> None:
    """A client becomes slow, or fast again."""
    client = _connected(world, rng)
    if client is not None and client.session is not None:
        client.window = client.session.window = rng.choice((1, 50, 300, 1 << 20))


def _connected(world: World, rng: random.Random) -> SimClient | None:
    clients = [client for client in world.clients if client.session is not None and client.session.ended is None]
    return rng.choice(clients) if clients else None


# upstream


@_action(2, fault=True)
def break_upstream(world: World, _: random.Random) -> None:
    """The connection to etcd breaks."""
    world.upstream.disconnect()


@_action(1.5, fault=True)
def break_stream(world: World, rng: random.Random) -> None:
    """One watch stream to etcd breaks; or each one with the create of some range does from now on, or no longer."""
    if rng.random() < 0.8:
        world.upstream.end_stream(rng)
        return
    world.count("poisoned creates")
    world.upstream.poison_text = LOST
    key, range_end = rng.choice(world.config.ranges) if rng.random() < 0.5 else (None, b"")
    # In etcd an empty key means the smallest one.
    world.upstream.poisoned = set() if key is None else {(key or b"\0", range_end)}


@_action(0.8, fault=True)
def rotate_connection(world: World, rng: random.Random) -> None:
    """The connection to etcd is closed gracefully, or a stream on such a connection ends."""
    if rng.random() < 0.5:
        world.upstream.rotate(rng)
    else:
        world.upstream.end_leaving(rng)


@_action(0.4, fault=True)
def limit_streams(world: World, _: random.Random) -> None:
    """The server limits the streams of a connection, or lifts the limit: new streams wait for a further connection."""
    world.upstream.limited = not world.upstream.limited


@_action(0.3, fault=True)
def lose(world: World, rng: random.Random) -> None:
    """The server cancels one upstream watch permanently; the proxy may interpret it as a refusal of the token."""
    world.permissions.fickle.update(MIGHTY)
    world.upstream.cancel_one(
        rng, f"rpc error: code = {rng.choice(('PermissionDenied', 'Unavailable', 'Internal'))} desc = {LOST}"
    )


@_action(0.6, fault=True)
def lose_leader(world: World, rng: random.Random) -> None:
    """Quorum is lost or regained: without it no member has a leader and nothing is written."""
    if world.config.tells_status:
        if world.store.has_quorum:
            world.lose_quorum()
        elif rng.random() < 0.7:
            world.store.has_quorum = True


@_action(0.6, fault=True)
def cut_off(world: World, rng: random.Random) -> None:
    """A member is cut off, without a leader and new entries, or all members are connected again."""
    if world.cut:
        world.cut.clear()
    elif len(world.members) - len(world.still) > 1 and world.config.tells_status:
        world.cut.add(rng.choice([each for each in world.members if each.member_id not in world.still]).member_id)
        world.leaders_changed()


@_action(0.6, fault=True)
def hold_still(world: World, rng: random.Random) -> None:
    """A member stops answering calls, or all answer again."""
    if world.still:
        world.still.clear()
    elif len(world.members) - len(world.cut) > 1:
        world.still.add(rng.choice([each for each in world.members if each.member_id not in world.cut]).member_id)


@_action(0.6, fault=True)
def poison_check(world: World, rng: random.Random) -> None:
    """A client creates a watch whose key is too large for etcd: that ends only its own stream."""
    client = _connected(world, rng)
    if client is None or not world.config.auth or world.config.limits["queue_max"] < 1000:
        return
    watch = SimWatch.make(Spec(POISON, b""), None, client.by_header)
    world.watches.append(watch)
    assert client.session is not None
    client.session.poisoned = True
    world.create(client, watch, 0)


@_action(0.6, fault=True)
def change_endpoints(world: World, rng: random.Random) -> None:
    """The operator changes the endpoints, or the covers."""
    if world.config.covers and rng.random() < 0.7:
        world.count("covers changed")
        world.reload(tuple(rng.sample(COVERS, rng.choice((0, 1, 1, 2, 2)))))
        return
    world.upstream.set_endpoints(rng.sample(world.members, rng.randint(1, len(world.members))))
    world.leaders_changed()


@_action(0.2, fault=True)
def restart(world: World, _: random.Random) -> None:
    """The proxy is killed and started again."""
    world.restart()


@_action(0.5, fault=True)
def restart_member(world: World, rng: random.Random) -> None:
    """A member is killed and restarted from its disk."""
    world.restart_member(rng.choice(world.members))


@_action(0.3, fault=True)
def restore(world: World, rng: random.Random) -> None:
    """The store is restored from a snapshot, and maybe written to."""
    revision = world.store.revision - rng.randint(1, 12)
    if revision >= 1 and world.undiscovered is None:
        world.restore(revision, rng)
        # It may reach the old one's revision, or pass it, before the proxy sees it.
        grown = world.believed + rng.choice((-100, -100, 0, 1))
        while world.undiscovered is not None and world.store.has_quorum and world.store.revision < grown:
            put(world, rng)
        if rng.random() < 0.5:
            for member in world.members:
                member.apply(member.behind)


@_action(1, fault=True)
def expire_token(world: World, rng: random.Random) -> None:
    """A token becomes invalid, or all invalidated ones become valid again."""
    if rng.random() < 0.3:
        world.permissions.expired.clear()
        return
    world.permissions.expire(rng.choice(MIGHTY))
    if rng.random() < 0.7:
        world.upstream.disconnect()


@_action(1)
def notify(world: World, rng: random.Random) -> None:
    """A member's progress ticker fires for one upstream watch."""
    live = [(link, watch_id) for link in world.upstream.links() for watch_id in link.spans]
    if live:
        link, watch_id = rng.choice(live)
        link.notify_progress(watch_id)


# time


@_action(5)
def flow(world: World, rng: random.Random) -> None:
    """Many pending moves are made, in random order."""
    world.make_moves(rng, rng.randint(5, 40))


@_action(2)
def quiet(world: World, rng: random.Random) -> None:
    """All pending moves are made."""
    settle(world, rng, 0.0)
    world.check_rest()


@_action(0.7)
def freeze(world: World, rng: random.Random) -> None:
    """One client reads nothing for a while, which must not affect any other."""
    client = _connected(world, rng)
    if client is not None and client.session is not None:
        client.session.window = rng.choice((1, 100))
        isolate(world, rng, client)
        if client.session is not None:
            client.session.window = client.window


@_action(2)
def wait(world: World, rng: random.Random) -> None:
    """Time passes."""
    world.advance(rng.choice((0.1, 0.3, 2.0, 6.0)))


@_action(0.4)
def wait_long(world: World, rng: random.Random) -> None:
    """Much time passes."""
    world.advance(rng.choice((35.0, 80.0)))


# making runs


def make_steps(rng: random.Random, count: int) -> list[Step]:
    """Return a random run, in which each kind of step is common, rare or absent."""
    names = list(ACTIONS)
    weights = [
        WEIGHTS[name] * rng.choice((0.0, 1.0, 1.0, 1.0, 4.0) if name in FAULTS else (0.5, 1.0, 1.0, 3.0))
        for name in names
    ]
    opening = [Step("join", rng.getrandbits(32)), Step("burst", rng.getrandbits(32))]
    return opening + [Step(name, rng.getrandbits(32)) for name in rng.choices(names, weights, k=count)]
