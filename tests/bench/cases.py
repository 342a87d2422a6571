"""The load cases, by name: their clients and writes.

Figures are meaningful only in comparison with a peer's in the same run; every case is run at every target in turn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

from tests.bench.profiles import DEFAULT


class Kind(Enum):
    """The kind of a case."""

    # Clients are connected, then writes follow.
    FANOUT = "fanout"
    # Clients are connected, and nothing is written.
    IDLE = "idle"
    # Writes come first, then clients that watch from their start.
    CATCH_UP = "catch-up"
    # Clients have received all writes; then all connections break, and they resume from half of it.
    STORM = "storm"
    # Unary calls.
    CALLS = "calls"


class Variant(NamedTuple):
    """The options of one kind of watch, and its events of each three writes: a new key, the same again, a delete."""

    options: dict[str, object]
    events: int
    stamps: int
    """Values among them, each marked with the time of its write; a prev_kv has one of its own."""
    from_start: bool = False
    """Whether it starts at the very first write, before it was created."""


NO_PUT, NO_DELETE = 0, 1
VARIANTS = (
    Variant({}, 3, 2),
    Variant({"prev_kv": True}, 3, 4),
    Variant({"filters": [NO_DELETE]}, 2, 2),
    Variant({"filters": [NO_PUT], "prev_kv": True}, 1, 1),
    Variant({"fragment": True}, 3, 2),
    Variant({"start_revision": 2}, 3, 2, True),
    Variant({"filters": [NO_DELETE], "prev_kv": True, "fragment": True}, 2, 3),
    Variant({"start_revision": 2, "prev_kv": True, "progress_notify": True}, 3, 4, True),
)
PLAIN = Variant({}, 1, 1)
"""For cases whose writes are all puts."""

PEER = "grpc-proxy"
"""etcd's own proxy, of the same release as the etcd."""
OLD_PEER = "grpc-proxy-3.4"
"""The grpc-proxy of etcd 3.4, in front of the same etcd."""
OURS = "watchmux"
WORKERS = "watchmux-workers"
"""With --workers=2."""
LEVELS = "watchmux-two-levels"
"""A leaf in front of a hub."""
TWICE = "watchmux-twice"
"""Two processes that share nothing, each with half of the clients: what two workers cost without a hub."""
FLOOR = "floor"
"""The minimal loop (tests/bench/floor.py)."""
FLOOR_WORKERS = "floor-workers"
"""Three of them: a hub, and two in front of it, each with half of the clients."""
PEERS = ("etcd", PEER, OURS)
WITH_OLD = ("etcd", PEER, OLD_PEER, OURS)
ALL = (FLOOR, *WITH_OLD)
WITH_SEVERAL = (*ALL, WORKERS, LEVELS, TWICE, FLOOR_WORKERS)
WORKERS_AT = (100, 10_000)
"""The numbers of watches with which the fixed cost of an event with workers is measured."""


@dataclass(frozen=True)
class Case:
    """One load. Watches are distributed over the ranges in turn, and so are writes."""

    name: str
    what: str
    connections: int
    streams: int
    """Streams in total, distributed over the connections."""
    watches: int = 1
    """Watches on each stream."""
    ranges: int = 1
    writes: int = 0
    rate: float = 0.0
    """Writes per second; 0 = as fast as they go."""
    value_bytes: int = 64
    kind: Kind = Kind.FANOUT
    behind: int = 0
    """Writes before the clients come."""
    mixed: bool = False
    """Watches of all variants, and deletes among the writes."""
    tls: bool = False
    """Whether clients use TLS (etcd itself does not)."""
    idle_s: float = 0.0
    """Idle seconds before memory is read."""
    read_bytes_s: float = 0.0
    """Read rate of each connection, in bytes per second; 0 = unlimited."""
    call: str = ""
    """Unary method: put or range."""
    calls: int = 0
    in_flight: int = 0
    """Concurrent calls, over all connections."""
    targets: tuple[str, ...] = ALL
    more: tuple[str, ...] = ()
    """Targets that run only if they are named (--target)."""
    profile: str = DEFAULT
    """What the clients send while they receive (tests/bench/profiles.py)."""
    real: bool = False
    """The clients are clientv3 itself."""
    at_a_time: int = 0
    """Connections that create their watches at the same time; 0: all."""
    limit_s: float | None = None
    """Seconds for all creates, and for all events after the last write; what is then missing is reported."""
    keys: bool = False
    """Watches of single keys, the one that is written in each range; and a bystander whose events are timed."""
    rounds: int = 1
    """Runs at each target, in turn, for a round of the bench. The median of several is steady where few events or a
    short time decide a figure: the machine is slower or faster from one ten seconds to the next."""
    is_default: bool = True
    """Part of a run without --case."""

    @property
    def watch_count(self) -> int:
        """Watches in all."""
        return self.streams * self.watches

    def variant(self, watch: int) -> Variant:
        """Return the options of the watch of this number."""
        return VARIANTS[watch % len(VARIANTS)] if self.mixed else PLAIN

    def expected(self, *, stamps: bool = False, early: bool = False) -> int:
        """Return the events (or stamps) delivered without loss; `early`: of writes before the watches."""
        if self.mixed:
            triples = (self.behind if early else self.writes) // 3
            variants = [self.variant(watch) for watch in range(self.watch_count)]
            kept = [variant for variant in variants if variant.from_start or not early]
            return triples * sum(variant.stamps if stamps else variant.events for variant in kept)
        if early:
            return 0
        if self.kind is Kind.CATCH_UP:
            return self.behind * self.watch_count
        whole, rest = divmod(self.watch_count, self.ranges)
        per_range = [whole + (index < rest) for index in range(self.ranges)]
        return sum(per_range[write % self.ranges] for write in range(self.writes))


def _scale(watches: int) -> Case:
    connections = max(1, watches // 50)
    what = f"{watches:,} watches of one range, up to 50 on a connection, 20 writes/s"
    targets = (PEER, OURS, WORKERS) if watches in WORKERS_AT else (PEER, OURS)
    return Case(f"scale-{watches}", what, connections, watches, writes=60, rate=20, targets=targets)


def _many(name: str, streams: int, watches: int, rate: float, limit_s: float, **options: Any) -> Case:
    """Streams with a watch of each key, and one put to each: a public report of grpc-proxy (etcd issue 9839)."""
    what = (
        f"{streams:,} connections with one stream and {watches:,} watches each, one put of 5,000 bytes to each key, "
        f"{rate:g}/s"
    )
    return Case(
        name,
        what,
        *(streams, streams, watches, watches, watches, rate),
        value_bytes=5000,
        at_a_time=8,
        keys=True,
        limit_s=limit_s,
        **options,
    )


def _as(profile: str, case: Case) -> Case:
    return replace(case, name=f"{case.name}-{profile.lower()}", profile=profile, targets=(PEER, OURS))


def _calls(method: str, in_flight: int, calls: int) -> Case:
    return Case(
        f"{method}-{in_flight}",
        f"{method}, {in_flight} in flight",
        *(min(8, in_flight), 0),
        kind=Kind.CALLS,
        call=method,
        calls=calls,
        in_flight=in_flight,
        targets=(*WITH_OLD, WORKERS) if in_flight > 1 else WITH_OLD,
        rounds=1 if in_flight > 1 else 3,
    )


_REAL = Case(
    "clientv3",
    "100 connections with one stream each, 20 writes/s, clients are clientv3 itself",
    *(100, 100),
    writes=120,
    rate=20,
    targets=(PEER, OURS),
    real=True,
)
REAL_CASES = (_REAL, replace(_REAL, name="clientv3-profile", what="the same load by the profile grpc-go", real=False))
"""A check of the profile grpc-go: the CPU per event should be that of real clients."""

CASES = {
    case.name: case
    for case in (
        Case(
            "burst",
            "1,000 streams on 20 connections, one range, 300 writes as fast as they go",
            *(20, 1000),
            writes=300,
            targets=WITH_SEVERAL,
        ),
        Case(
            "paced",
            "500 streams on 20 connections, 20 writes/s",
            *(20, 500),
            writes=120,
            rate=20,
            targets=WITH_SEVERAL,
        ),
        Case(
            "single",
            "500 connections with one stream each, 10 writes/s",
            *(500, 500),
            writes=60,
            rate=10,
            targets=WITH_SEVERAL,
        ),
        Case(
            "stacked",
            "10 streams with 100 watches each, 300 writes as fast as they go",
            *(1, 10, 100),
            writes=300,
            rounds=3,
        ),
        Case("ranges", "200 ranges with 10 watches each, 400 writes/s", 20, 200, 10, 200, writes=2000, rate=400),
        Case(
            "lowfan",
            "200 ranges with one watch each, 400 writes/s",
            *(20, 200, 1, 200, 1200, 400),
            rounds=3,
        ),
        Case(
            "variants",
            "800 streams on 20 connections with filters, prev_kv, fragments, start revisions; puts and deletes, 90/s",
            *(20, 800),
            writes=450,
            rate=90,
            behind=300,
            mixed=True,
            targets=PEERS,
        ),
        Case(
            "catch-up",
            "1,000 streams on 100 connections come 10,000 revisions behind",
            *(100, 1000),
            kind=Kind.CATCH_UP,
            behind=10_000,
            targets=PEERS,
        ),
        Case(
            "storm",
            "2,000 connections with one stream each are cut and come back 30 revisions behind, all at once",
            *(2000, 2000),
            kind=Kind.STORM,
            writes=60,
            rate=20,
            targets=PEERS,
        ),
        Case(
            "large",
            "50 streams on 10 connections, values of 100 KB, 20 writes/s",
            *(10, 50, 1, 1, 60, 20, 100_000),
            targets=PEERS,
        ),
        Case(
            "tls",
            "500 streams on 20 connections, 20 writes/s, clients speak TLS",
            *(20, 500),
            writes=120,
            rate=20,
            tls=True,
            targets=(PEER, OURS),
        ),
        Case(
            "overload",
            "1,000 streams on 20 connections, 3,000 writes as fast as they go, read at 2 MB/s a connection",
            *(20, 1000),
            writes=3000,
            read_bytes_s=2e6,
            targets=PEERS,
        ),
        Case("idle", "10,000 idle streams on 100 connections", 100, 10_000, kind=Kind.IDLE, idle_s=2, targets=WITH_OLD),
        Case(
            "idle-watches",
            "100,000 idle watches on 1,000 streams, 20 connections",
            *(20, 1000, 100),
            kind=Kind.IDLE,
            idle_s=2,
            targets=PEERS,
        ),
        Case(
            "idle-connections",
            "5,000 idle connections with one stream each",
            *(5000, 5000),
            kind=Kind.IDLE,
            idle_s=2,
            targets=PEERS,
        ),
        *REAL_CASES,
        _many("many-10k", 34, 300, 200, 60, targets=PEERS),
        _many("many-100k", 34, 3000, 200, 120, targets=PEERS),
        _many("many-1m", 334, 3000, 60, 240, targets=(OURS,), more=("etcd", PEER)),
        _many("many-wide", 3500, 50, 8, 60, targets=(OURS,), more=("etcd", PEER), is_default=False),
        _many("many-10m", 3500, 3000, 8, 900, targets=(OURS,), more=("etcd", PEER), is_default=False),
        _calls("put", 1, 2000),
        _calls("put", 64, 12_000),
        _calls("range", 1, 3000),
        _calls("range", 64, 20_000),
        *(_scale(watches) for watches in (10, 100, 1000, 10_000)),
    )
}
CASES |= {
    case.name: case
    for case in (
        *(_as("C-core", CASES[name]) for name in ("paced", "single", "ranges")),
        _as("grpc-js", CASES["single"]),
    )
}
DEFAULT_CASES = tuple(case.name for case in CASES.values() if case.is_default)
