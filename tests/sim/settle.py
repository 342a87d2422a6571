"""The end of a simulation: faults stop, everything that waits happens, and then nothing may be missing.

Liveness and leaks are judged here: every watch has everything, every request is answered, upstream carries one watch
per range and no backfill, and once the clients are gone it carries nothing. Then the guarantee checkers read every
log.
"""

from __future__ import annotations

import random

from tests.sim.clients import SimulationFailure, SimWatch, judge_logs
from tests.sim.world import World

# Far more than any run needs; reaching it means that something goes round in circles.
_MOVES_MAX = 20_000


def settle(world: World, rng: random.Random, seconds: float) -> None:
    """Make all moves, then let `seconds` pass, from timer to timer, with the moves that come of it.

    One move may take away what another was about to move; moves put up with that.
    """
    world.rng = rng
    until = world.now + seconds
    made = 0
    while True:
        while moves := world.moves():
            for move in moves:
                move(rng)
            made += len(moves)
            if made > _MOVES_MAX:
                raise SimulationFailure("it never comes to rest")
        deadline = world.core.next_deadline()
        if deadline is None or deadline > until:
            world.now = max(world.now, until)
            return
        world.now = max(world.now, deadline)
        world.expire()
        made += 1


def finish(world: World, rng: random.Random) -> None:
    """Bring the run to its end and judge it."""
    for client in world.clients:
        client.window = 1 << 30
        if client.session is not None:
            client.session.window = 1 << 30
    settle(world, rng, 1.0)
    for client in world.clients:
        if client.session is None:
            world.connect_client(client)
    # Every watch that starts in the future comes to live, and every range sees one more event.
    highest = max((watch.next_revision or 0 for watch in world.watches), default=0)
    for _ in range(max(1, highest - world.store.revision + 1)):
        world.store.write([(key, b"last") for key in world.config.keys])
    settle(world, rng, 6.0)
    for client in world.clients:
        if client.session is not None and client.session.ended is None:
            client.session.sent_progress()
            world.input(world.core.progress, client.session.core)
    settle(world, rng, 12.0)
    if not world.config.ordered_progress:
        # Old servers prove a quiet range complete by their ticker alone: a backfill, then who waits for progress.
        for _ in range(3):
            for link in world.upstream.links():
                for watch_id in list(link.watchers):
                    link.notify_progress(watch_id)
                    settle(world, rng, 0.0)
            settle(world, rng, 2.0)
    world.check()
    _check_answers(world)
    _check_upstream(world)
    _check_guarantees(world)
    for client in list(world.clients):
        world.close_session(client)
    settle(world, rng, 60.0)
    world.check()
    _check_nothing_left(world)


def _live(world: World) -> list[SimWatch]:
    return [
        watch
        for client in world.clients
        for watch in client.watches
        if client.session is not None and not watch.over and not watch.canceled
    ]


def _check_answers(world: World) -> None:
    if world.reads or world.checks:
        raise SimulationFailure("reads or checks are left")
    for client in world.clients:
        session = client.session
        if session is None:
            continue
        if unanswered := session.unanswered():
            raise SimulationFailure(unanswered)
        if any(watch.doomed for watch in session.announced.values()):
            raise SimulationFailure("a watch that was told of a future that never came was not cancelled")
        if session.stalled:
            raise SimulationFailure("a session with room is stalled")
        if session.progress_waits and session.announced:
            raise SimulationFailure("a progress request was never answered")


def _check_upstream(world: World) -> None:
    """One upstream watch per range that is watched, and nothing else."""
    ranges = {(watch.spec.key or b"\0", watch.spec.range_end) for watch in _live(world)}
    watchers = [watcher for link in world.upstream.links() for watcher in link.watchers.values()]
    opened = list(world.open_upstreams.values())
    if any(upstream.is_backfill for upstream in opened):
        raise SimulationFailure("a backfill is left open")
    if len(watchers) != len(ranges) or {(each.key, each.range_end) for each in watchers} != ranges:
        text = f"upstream watches {sorted((each.key, each.range_end) for each in watchers)}, wanted {sorted(ranges)}"
        raise SimulationFailure(text)


def _check_guarantees(world: World) -> None:
    live = set(map(id, _live(world)))
    revision = world.store.revision
    judge_logs(world.watches, world.store.truth(), lambda watch: revision if id(watch) in live else None)


def _check_nothing_left(world: World) -> None:
    watchers = [watcher for link in world.upstream.links() for watcher in link.watchers.values()]
    if watchers or world.open_upstreams:
        raise SimulationFailure(f"{len(watchers)} upstream watches are left after the last client")
