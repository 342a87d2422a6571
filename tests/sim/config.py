"""The shape of a simulated world: all of it follows from the seed of the run."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from tests.sim import constants
from tests.sim.permissions import HALF, OWN

# Prefixes for covers: of all keys, of one key, and of several, one inside the other.
COVERS = (b"", b"b", b"c", b"ca")
# Keys and ranges of worlds with covers, besides those of other worlds.
_COVERED_KEYS = (b"ca", b"cb")
_COVERED_RANGES = ((b"c", b"d"), (b"c", b""), (b"ca", b""), (b"ca", b"cb"), (b"c", b"cb"), (b"b", b"c"), (b"cb", b"\0"))


@dataclass(frozen=True, slots=True)
class Config:
    """The shape of one world; all of it follows from the seed."""

    limits: dict[str, Any]
    ranges: tuple[tuple[bytes, bytes], ...]
    keys: tuple[bytes, ...]
    # The covers at the start, and the token of the proxy's own user, if it has one.
    covers: tuple[bytes, ...] = ()
    own_token: bytes | None = None
    members: int = 1
    batch_revisions_max: int = 1000
    channel_max: int = 128
    # Whether etcd sends whole responses, or fragments.
    whole: bool = True
    # Upstream streams for catching up, and for suspects.
    streams_max: tuple[int, int] = (16, 8)
    # How many of the members, from the last on, are the bundled store; the others are the model of etcd.
    bundled: int = 0
    # From this size on the bundled store splits a response for watches with fragment.
    store_fragment_bytes: int = 1 << 21
    # How many of the members answer progress requests out of order, as servers before 3.4.25/3.5.8 do.
    old_members: int = 0
    auth: bool = False
    # How long, in seconds, "auth is off" is cached; below 0 each check is a read of now.
    probe_age_s_max: float = 1.0
    # The share of reads that fail.
    failing_reads: float = 0.05
    # Members report their position and whether they have a leader, also without a token.
    tells_status: bool = True
    value_bytes_max: int = 40
    # The share of watches with it.
    prev_kv: float = 0.25
    progress_notify: float = 0.2
    clients_max: int = 5
    watches_max: int = 16
    # Random moves made after each step.
    moves: int = 4
    # The share of watches that repeat the range and the options of another one of their client.
    crowded: float = 0.0
    # Whether the event loop is sometimes late to fire the core's timer.
    late_timers: bool = False
    # Constants of the code under simulation that are small, by module and name.
    constants: dict[tuple[str, str], int] = field(default_factory=dict)


def _make_limits(rng: random.Random, aside: random.Random, response_bytes: int, roomy: bool) -> dict[str, object]:
    """Return the limits of the core; histories are `roomy`, or so small that they lose what is needed."""
    return {
        "linger_s": rng.choice((0.0, 0.5, 2.0)),
        "history_linger_s": rng.choice((0.0, 3.0, 30.0)),
        "parked_max": rng.choice((1, 1000)),
        "history_bytes_max": 1 << 20 if roomy else rng.choice((1, 100, 400, 2000, 1 << 20)),
        "history_bytes_total_max": 1 << 20 if roomy else rng.choice((50, 500, 5000, 1 << 20)),
        "history_revisions_max": 1000 if roomy else rng.choice((1, 2, 4, 10, 1000)),
        "history_age_s": 300.0 if roomy else rng.choice((0.5, 5.0, 300.0)),
        "replay_bytes_max": min(response_bytes, rng.choice((1, 100, 500, 1 << 20))),
        "replay_turn_bytes_max": rng.choice((1, 300, 1 << 20)),
        "replay_events_max": aside.choice((1, 3, 5_000)),
        "replay_turn_events_max": aside.choice((1, 20, 10_000)),
        "response_bytes_max": response_bytes,
        "fragment_bytes": rng.choice((60, 150, 1 << 21)),
        "fragment_run_bytes_max": rng.choice((500, 5000, 1 << 22)),
        "backfills_max": rng.choice((1, 2, 3, 100)),
        "backfill_bytes_max": rng.choice((1, 200, 1 << 20)),
        "backfill_share_revisions": rng.choice((0, 3, 10, 10_000)),
        "trunk_catch_up_revisions": rng.choice((0, 3, 10, 1000)),
        "bookmark_s": rng.choice((5.0, 30.0)),
        "progress_notify_s": rng.choice((3.0, 40.0)),
        "watches_per_session_max": rng.choice((2, 100, 100, 100)),
        "watches_max": rng.choice((4, 1000, 1000, 1000)),
        "trunks_max": rng.choice((2, 1000, 1000, 1000)),
        "queue_max": rng.choice((2, 1000, 1000, 1000)),
        "line_bytes_max": aside.choice((600, 2_000, 1 << 20)),
        "step_watches_max": aside.choice((1, 3, 200)),
        "lagging_age_s_max": rng.choice((None, None, None, 4.0)),
    }


def _draw_covers(rng: random.Random) -> tuple[tuple[bytes, ...], bytes | None]:
    """Return the covers, mostly none, and the token that they are watched with while auth is on."""
    if rng.random() < 0.6:
        return (), None
    return tuple(rng.sample(COVERS, rng.choice((1, 1, 2, 3)))), rng.choice((None, OWN, OWN, HALF))


def span_of(prefix: bytes) -> tuple[bytes, bytes]:
    """Return the range of all keys with a prefix that does not end with the last byte."""
    return (prefix, prefix[:-1] + bytes([prefix[-1] + 1])) if prefix else (b"\0", b"\0")


def covers_range(prefix: bytes, key: bytes, range_end: bytes) -> bool:
    """Return whether all keys of a range have such a prefix."""
    below = not range_end or (range_end != b"\0" and range_end <= span_of(prefix)[1])
    return not prefix or (key.startswith(prefix) and below)


def make_config(rng: random.Random) -> Config:
    """Return the shape of a world: mostly with limits so small that they are reached."""
    keys = tuple(bytes([letter]) for letter in b"abcdef"[: rng.randint(2, 6)])
    some: list[tuple[bytes, bytes]] = [
        (rng.choice(keys), b""),
        (rng.choice(keys), b""),
        (b"a", b"g"),
        (b"b", b"d"),
        (b"", b"\0"),
        (b"c", b"\0"),
        (b"a", b"c"),
        (b"", b""),
    ]
    ranges = rng.sample(some, rng.randint(1, 4))
    if rng.random() < 0.15:
        ranges.append(rng.choice(((b"d", b"b"), (b"b", b"b"))))
    response_bytes = rng.choice((150, 400, 2000, 1 << 22))
    roomy = rng.random() < 0.3
    # Drawn last, so that all earlier draws, and the known findings of each seed, stay the same.
    aside = random.Random(response_bytes + 2 * roomy + len(ranges))
    limits = _make_limits(rng, aside, response_bytes, roomy)
    members = rng.choice((1, 1, 2, 3))
    aside = random.Random(repr(limits))
    covers, own_token = _draw_covers(random.Random(f"covers {limits}"))
    if covers:
        keys = (*keys, *_COVERED_KEYS)
        ranges += aside.sample(_COVERED_RANGES, aside.randint(1, 4))
    small = constants.draw(random.Random(f"constants {limits}"))
    crowded = random.Random(f"crowded {limits}").choice((0.0, 0.5, 0.9)) if small else 0.0
    if crowded:
        small |= constants.draw_crowd(random.Random(f"own groups {limits}"))
    return Config(
        limits,
        tuple(ranges),
        keys,
        covers=covers,
        own_token=own_token,
        members=members,
        bundled=rng.choice((0, members, rng.randint(0, members))),
        store_fragment_bytes=rng.choice((50, 120, 1 << 21)),
        batch_revisions_max=rng.choice((1, 2, 5, 1000)),
        channel_max=rng.choice((1, 2, 128)),
        whole=aside.random() < 0.5,
        streams_max=(aside.choice((0, 0, 1, 16)), aside.choice((1, 8))),
        old_members=rng.choice((0, 0, 0, 0, 0, 0, 1, 3)),
        auth=rng.random() < 0.25,
        prev_kv=rng.choice((0.1, 0.25, 0.5)),
        probe_age_s_max=rng.choice((1.0, 1.0, -1.0)),
        failing_reads=rng.choice((0.0, 0.05, 0.3)),
        tells_status=rng.random() < 0.9,
        value_bytes_max=rng.choice((0, 20, 80)),
        clients_max=rng.randint(1, 6),
        moves=rng.choice((0, 3, 10)),
        late_timers=rng.random() < 0.2,
        crowded=crowded,
        constants=small,
        # So many that a round takes several steps.
        progress_notify=0.6 if small else 0.2,
    )
