"""The end of a simulation: faults stop, all pending moves are made, and then nothing may be missing.

Liveness and leaks are checked here: every watch has every event, every request is answered, upstream has one watch per
range and no backfill, and none once the clients are gone. Then the guarantee checkers read every log.
"""

from __future__ import annotations

import random

from tests.sim.clients import SimWatch, judge_logs
from tests.sim.config import covers_range, span_of
from tests.sim.failure import SimulationFailure
from tests.sim.world import SimClient, World

# Far more than any run needs; reaching it means an endless loop.
_MOVES_MAX = 20_000
# Times 12 s that an answer to a progress request may take after everything else has settled: new requests, one a
# second, have to outnumber those that etcd dropped before.
_PATIENCE = 20
# The gauges among the core's Stats.
_GAUGES = (
    "sessions",
    "watches",
    "trunks",
    "parked",
    "backfills",
    "lagging",
    "queued",
    "history_bytes",
    "history_batches",
)


def settle(world: World, rng: random.Random, seconds: float, frozen: SimClient | None = None) -> None:
    """Make all moves, then let `seconds` pass, from timer to timer, with the moves that come of it.

    One move may make another one impossible, which then does nothing. A `frozen` client reads nothing.
    """
    world.rng = rng
    until = world.now + seconds
    made = 0
    while True:
        while moves := world.moves(frozen):
            for move in moves:
                move(rng)
            made += len(moves)
            _check_idle(made)
        deadline = world.next_deadline()
        if deadline is None or deadline > until:
            world.now = max(world.now, until)
            if not world.upstream.look_again(rng):
                return
            continue
        world.now = max(world.now, deadline)
        world.expire()
        made += 1
        # A timer may be due at once again and again.
        _check_idle(made)


def _check_idle(made: int) -> None:
    if made > _MOVES_MAX:
        raise SimulationFailure("the simulation never becomes idle")


def catch_up(world: World, rng: random.Random) -> None:
    """Let all clients read and come back, and ask them for progress after one more event of every range."""
    for client in world.clients:
        client.window = 1 << 30
        if client.session is not None:
            client.session.window = 1 << 30
    settle(world, rng, 1.0)
    for client in world.clients:
        if client.session is None:
            world.connect_client(client)
    # Every future watch becomes live, and every range gets one more event.
    highest = max((watch.next_revision or 0 for watch in world.watches), default=0)
    for _ in range(max(1, highest - world.store.revision + 1)):
        world.store.write([(key, b"last") for key in world.config.keys])
    settle(world, rng, 6.0)
    ask_all(world, rng)


def finish(world: World, rng: random.Random) -> None:
    """Finish the run and check it."""
    world.heal()
    catch_up(world, rng)
    if any(not member.ordered_progress for member in world.members):
        _notify_all(world, rng)
    check_answers(world)
    _check_notified(world, rng)
    _check_quiet_resumption(world, rng)
    world.check()
    check_answers(world)
    world.upstream.check()
    _finish_moves(world, rng)
    _check_upstream(world)
    check_guarantees(world)
    _check_quiet_times(world, rng)
    for client in list(world.clients):
        world.close_session(client)
    # Also long enough for the oldest batch of a history.
    settle(world, rng, 400.0)
    world.check()
    check_nothing_left(world)


def ask_all(world: World, rng: random.Random) -> None:
    """Have every session request progress, and wait for the answers."""
    for client in world.clients:
        if client.session is not None and client.session.ended is None:
            world.ask_progress(client.session)
    settle(world, rng, 12.0)
    for _ in range(_PATIENCE):
        if not any(client.session is not None and client.session.progress_waits for client in world.clients):
            break
        settle(world, rng, 12.0)


def isolate(world: World, rng: random.Random, frozen: SimClient) -> None:
    """One client reads nothing for a while: all others get everything meanwhile."""
    if world.undiscovered is not None or not world.store.has_quorum or world.cut:
        # Then no client gets everything.
        return
    world.store.write([(key, b"isolated") for key in world.config.keys])
    settle(world, rng, 3.0, frozen)
    if frozen.session is not None and frozen.session.outbox_bytes > frozen.session.window:
        world.count("isolated")
    others = [
        watch
        for client in world.clients
        if client is not frozen and client.session is not None
        for watch in client.session.announced.values()
    ]
    # A backfill of a quiet range ends only by progress, which old servers send every ten minutes: others wait in line.
    old = any(not member.ordered_progress for member in world.members)
    judge_logs(others, world.store.truth(), lambda _: None if old else world.store.revision)


def _notify_all(world: World, rng: random.Random) -> None:
    """Fire the members' progress tickers.

    On old servers nothing else proves a quiet range complete: first a backfill, then the next one, then the sessions
    that wait for progress.
    """
    for _ in range(24):
        waits = any(client.session is not None and client.session.progress_waits for client in world.clients)
        if not waits and not any(upstream.is_backfill for upstream in world.open_upstreams.values()):
            break
        _tick(world, rng)
        settle(world, rng, 2.0)
    # The watches of those backfills may move to another cover, and the one they leave lingers.
    settle(world, rng, 6.0)


def _check_notified(world: World, rng: random.Random) -> None:
    """Fire etcd's ticker twice without a write: every watch with progress_notify gets progress, on any server.

    At the first tick etcd skips an upstream watch that had events. Until the second one at least the interval passes
    that the core has learnt, or knows etcd's to exceed; its own round on such a trunk is due by then.
    """
    if world.config.channel_max < 128 or not any(watch.spec.progress_notify for watch in live_watches(world)):
        # etcd drops progress when the channel is full.
        return
    _tick(world, rng)
    settle(world, rng, 1.1 * world.core._notifying.pace.seconds)
    before = {id(watch): watch.bookmarks for watch in live_watches(world) if watch.spec.progress_notify}
    _tick(world, rng)
    for watch in live_watches(world):
        if before.get(id(watch)) == watch.bookmarks:
            raise SimulationFailure("a notification of etcd was not forwarded")


def _tick(world: World, rng: random.Random) -> None:
    """Fire the progress ticker of every stream."""
    for link in world.upstream.links():
        for watch_id in list(link.spans):
            link.notify_progress(watch_id)
            settle(world, rng, 0.0)


def _check_quiet_resumption(world: World, rng: random.Random) -> None:
    """Register all ranges again, some up to date and some behind, without further writes: all still get progress."""
    if any(not member.ordered_progress for member in world.members):
        return
    world.store.write([(world.config.keys[0], b"newest")])
    settle(world, rng, 1.0)
    world.upstream.disconnect()
    settle(world, rng, 1.0)
    ask_all(world, rng)


def _check_quiet_times(world: World, rng: random.Random) -> None:
    """Without a write, quiet watches get progress, and a compaction after that cancels no watch."""
    if any(not member.ordered_progress for member in world.members):
        return
    world.permissions.expired.clear()
    live = {id(watch): watch.bookmarks for watch in live_watches(world)}
    for _ in range(3):
        world.store.write([(b"elsewhere", b"")])
    bookmark_s = world.config.limits["bookmark_s"]
    settle(world, rng, bookmark_s + 2.0)
    notified_s = 2.2 * world.config.limits["progress_notify_s"]
    for watch in live_watches(world):
        if watch.spec.progress_notify and bookmark_s > notified_s and watch.bookmarks == live[id(watch)]:
            raise SimulationFailure("a quiet watch with progress_notify got no progress")
    world.store.compact(world.store.revision)
    world.upstream.disconnect()
    settle(world, rng, 1.0)
    if {id(watch) for watch in live_watches(world)} != live.keys():
        raise SimulationFailure("a watch that had missed nothing was cancelled by a compaction")


def live_watches(world: World) -> list[SimWatch]:
    return [
        watch
        for client in world.clients
        for watch in client.watches
        if client.session is not None and not watch.over and not watch.canceled
    ]


def check_answers(world: World) -> None:
    if world.calls.sent or world.calls.waiting:
        raise SimulationFailure("reads or checks are pending")
    for client in world.clients:
        session = client.session
        if session is None:
            continue
        if unanswered := session.unanswered():
            raise SimulationFailure(unanswered)
        if any(watch.doomed for watch in session.announced.values()):
            raise SimulationFailure("a watch with progress beyond a restored store was not cancelled")
        if session.stalled:
            raise SimulationFailure("a session whose client can read is stalled")
        if session.progress_waits and session.announced:
            raise SimulationFailure("a progress request was never answered")


def _finish_moves(world: World, rng: random.Random) -> None:
    """A cover that etcd had refused may just be open again: its watches move, and the trunks that they leave linger."""
    moving = world.core._state.to_move
    if not moving:
        return
    for _ in range(5):
        settle(world, rng, 1.0)
        if not moving:
            break
    settle(world, rng, world.config.limits["linger_s"] + 0.1)


def _check_upstream(world: World) -> None:
    """Check that there is one upstream watch per cover or watched range, and nothing else."""
    ranges = {(watch.spec.key or b"\0", watch.spec.range_end) for watch in live_watches(world)}
    # A cover that etcd has refused, or that was removed, may have a twin, with or without prev_kv, that it serves.
    state = world.core._state
    refused = set(map(span_of, state.covers.suspended))
    # While trunks_max trunks are open, watches stay on a cover that was removed.
    is_full = len(state.trunks) >= world.config.limits["trunks_max"]
    removed = {trunk.prefix for trunk in state.trunks.values() if is_full and getattr(trunk, "retired", False)}
    # A watch stays on a wider cover when a longer one is configured later.
    allowed = {span: set(map(span_of, world.covers_of(span))) or {span, *refused} for span in ranges}
    for span, wanted in allowed.items():
        wanted.update(span_of(prefix) for prefix in removed if covers_range(prefix, *span))
    watched = sorted(span for link in world.upstream.links() for span in link.spans.values())
    opened = list(world.open_upstreams.values())
    if any(upstream.is_backfill for upstream in opened):
        raise SimulationFailure("a backfill is left open")
    served = all(spans.intersection(watched) for spans in allowed.values())
    twins = refused.union(map(span_of, removed))
    surplus = [span for span in watched if span not in twins]
    if not served or len(set(surplus)) < len(surplus) or not set(surplus) <= set().union(*allowed.values()):
        raise SimulationFailure(f"upstream watches {watched}, wanted {allowed}")


def check_guarantees(world: World) -> None:
    live = set(map(id, live_watches(world)))
    revision = world.store.revision
    world.judge(lambda watch: revision if id(watch) in live else None)
    for member in world.members:
        member.check()


def check_nothing_left(world: World) -> None:
    watchers = [span for link in world.upstream.links() for span in link.spans.values()]
    if watchers or world.open_upstreams:
        raise SimulationFailure(f"{len(watchers)} upstream watches are left after the last client")
    stats = world.core.stats
    left = {name: getattr(stats, name) for name in _GAUGES if getattr(stats, name)}
    if left or world.core.next_deadline() is not None:
        raise SimulationFailure(f"left after the last client: {left}, a timer at {world.core.next_deadline()}")
