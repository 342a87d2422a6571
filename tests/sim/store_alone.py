"""The bundled store without a proxy: written, compacted and killed; a watch gets exactly what was written."""

from __future__ import annotations

import random

from coalesce.guarantees.checkers import Change
from proto.pb import rpc_pb2
from proto.plain_request import encode_create
from tests.sim.clients import decode_change
from tests.sim.failure import SimulationFailure
from tests.sim.model_store import LEASE, Store
from tests.sim.parts import REAL, Parts
from tests.sim.permissions import Permissions
from tests.sim.store_member import StoreMember

KEYS = (b"a", b"b", b"c")
STEPS = 60


def run_store(seed: int, parts: Parts = REAL) -> str:
    """Run a seed; return the finding, or ""."""
    rng = random.Random(seed)
    store = Store()
    member = StoreMember(parts.store, store, 0xE0, Permissions(enabled=False, keys=KEYS), rng.choice((1, 3, 1000)))
    try:
        for _ in range(STEPS):
            _step(rng, store, member)
            if rng.random() < 0.2:
                _judge(store, member)
        _judge(store, member)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _step(rng: random.Random, store: Store, member: StoreMember) -> None:
    kind = rng.random()
    if kind < 0.4:
        store.write([(rng.choice(KEYS), b"%d" % store.revision)], lease=rng.choice((0, LEASE)))
    elif kind < 0.6:
        store.write([(key, rng.choice((b"txn", None))) for key in rng.sample(KEYS, rng.randint(1, 3))])
    elif kind < 0.65:
        store.revoke()
    elif kind < 0.75:
        store.compact(store.revision - rng.choice((0, 0, 1, 3)))
    elif kind < 0.85:
        member.compact_step()
    elif kind < 0.95:
        member.restart()
    else:
        member.apply_some(rng)


def _judge(store: Store, member: StoreMember) -> None:
    """Check that a watch from the compact revision on gets every change since, with the previous values still kept."""
    member.check()
    first = max(1, store.compact_revision)
    stream = member.open_stream(None, 1000)
    stream.requests.append(encode_create(b"\0", b"\0", start_revision=first, prev_kv=True))
    stream.receive()
    while member.unsynced:
        member.sync(random.Random(0))
    found: list[Change] = []
    while (message := stream.take_bytes()) is not None:
        found += map(decode_change, rpc_pb2.WatchResponse.FromString(message).events)
    wanted = [
        change if change.mod_revision > max(1, store.compact_revision) else change._replace(prev=None)
        for change in store.changes
        if change.mod_revision >= first
    ]
    if found != wanted:
        raise SimulationFailure(f"a watch from {first} got {found}, expected {wanted}")
    stream.close()
