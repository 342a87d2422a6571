"""The constants that bound a step, in the modules under simulation: in a part of the runs they are 1 to 3.

In production they are so large that a simulated world never reaches them, and work that is interrupted at a bound and
continued later would never be tested. `test_each_bound_is_small_in_some_runs` finds a constant that is missing here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from types import FunctionType
from typing import Any

from tests.sim.parts import Parts

SIMULATED = ("coalesce", "upstream.watching", "proxy.auth", "upstream.attempts")
"""The packages and modules in which constants are replaced."""

# The share of the seeds with small constants.
_SHARE = 0.25
_FEW = (1, 2, 3)
# Where one is too few: half of it must be at least 1.
_SOME = (2, 3)

SMALL: dict[tuple[str, str], tuple[int, ...]] = {
    ("coalesce.cover", "SCANNED_BATCHES_MAX"): _FEW,
    ("coalesce.cover", "_CHAINS"): _FEW,
    ("coalesce.cover", "_WALKED_PER_EVENT"): _FEW,
    ("coalesce.ending", "REMOVED_AT_ONCE"): _FEW,
    ("coalesce.joining", "SMALL_CREATE_BYTES"): _FEW,
    ("coalesce.model", "LISTED_MAX"): _FEW,
    ("coalesce.moving", "EXAMINED_MAX"): _FEW,
    ("coalesce.notifying", "WATCHES_PER_STEP"): _FEW,
    ("coalesce.progress", "TRUNKS_PER_LOOK_MAX"): _FEW,
    ("coalesce.progress_requests", "STREAMS_PER_REQUEST_MAX"): _SOME,
    ("coalesce.progress_requests", "UPSTREAMS_PER_REQUEST_MAX"): _FEW,
    ("coalesce.progress_requests", "_LOOKED_AT_MAX"): _FEW,
    ("coalesce.replay", "_REMEMBERED_MAX"): _FEW,
    ("coalesce.waiting", "_TARGETS_MAX"): _FEW,
    ("proxy.auth.admitted", "RANGES_MAX"): _FEW,
    ("proxy.auth.permission_checks", "CALLS_PER_TOKEN_MAX"): _FEW,
    ("proxy.auth.permission_checks", "RANGES_MAX"): _FEW,
    ("proxy.auth.permission_checks", "RANGE_BYTES_MAX"): _FEW,
    ("proxy.auth.permission_checks", "STANDINGS_MAX"): _FEW,
    ("proxy.auth.queries", "CHECKS_IN_FLIGHT_MAX"): _FEW,
    ("proxy.auth.restore", "LOOKED_AT"): _FEW,
    ("proxy.auth.restore", "TRIED_AT_ONCE"): _FEW,
    ("upstream.watching.registrations", "REGISTERED_MAX"): _FEW,
    ("upstream.watching.state", "LOST_MAX"): _FEW,
    ("upstream.watching.stream", "_PASSED_MAX"): _FEW,
    ("upstream.watching.streams", "LARGE_CREATE_BYTES"): _FEW,
    ("upstream.watching.streams", "WATCHES_PER_STREAM_MAX"): _FEW,
    # Last, so that the values drawn before stay the same.
    ("upstream.watching.feed", "WITHOUT_EVENTS_MAX"): _FEW,
    ("coalesce.waiting", "CHECKED_WATCHES_MAX"): _FEW,
    ("coalesce.waiting", "ANSWERED_SESSIONS_MAX"): _FEW,
    ("coalesce.placement", "SHARED_BY_MAX"): _FEW,
    ("coalesce.placement", "UPGRADED_MAX"): _FEW,
    ("coalesce.history", "EVICTED_MAX"): _FEW,
    ("coalesce.fanout", "SHARED_WATCHES_MAX"): (0, 0, 1),
    ("coalesce.fanout", "OWN_GROUP_WATCHES_MAX"): _FEW,
    ("coalesce.listing", "LISTED_MIN"): _FEW,
    ("coalesce.listing", "LISTED_WATCHES_MAX"): _FEW,
}
"""The values of each constant, by module and name."""


def draw(rng: random.Random) -> dict[tuple[str, str], int]:
    """Return the constants of a world that differ from the real ones: none of them, or some."""
    if rng.random() >= _SHARE:
        return {}
    return {where: rng.choice(values) for where, values in SMALL.items() if rng.random() < 0.7}


def draw_crowd(rng: random.Random) -> dict[tuple[str, str], int]:
    """Return the constants with which a session with a few watches of one range has own groups."""
    groups = {"SHARED_WATCHES_MAX": rng.choice((0, 0, 1)), "OWN_GROUP_WATCHES_MAX": rng.choice((1, 2, 3, 1000))}
    return {("coalesce.fanout", name): value for name, value in groups.items()}


@contextmanager
def replaced(parts: Parts, constants: Mapping[tuple[str, str], int]) -> Iterator[None]:
    """Replace constants in the modules of these parts, and in those that import them by name."""
    changed: list[tuple[dict[str, Any], str, Any]] = []
    for namespace in namespaces(parts) if constants else ():
        for (module, name), value in constants.items():
            if namespace["__name__"] == module or (name in namespace and (namespace["__name__"], name) not in SMALL):
                changed.append((namespace, name, namespace[name]))
                namespace[name] = value
    try:
        yield
    finally:
        for namespace, name, value in changed:
            namespace[name] = value


@lru_cache(maxsize=2)
def namespaces(parts: Parts) -> list[dict[str, Any]]:
    """Return the namespaces of the modules under simulation: the real ones, or those that belong to a mutant.

    A mutant's modules are in no list, so the functions of one module lead to the next.
    """
    roots = (parts.core, parts.watch_state, parts.choice, parts.feed, parts.lineage, parts.queries, parts.attempts)
    found = {id(vars(root)): vars(root) for root in roots}
    coming = list(found.values())
    while coming:
        for value in list(coming.pop().values()):
            for namespace in _namespaces_of(value):
                simulated = str(namespace.get("__name__")).startswith(SIMULATED)
                if simulated and id(namespace) not in found:
                    found[id(namespace)] = namespace
                    coming.append(namespace)
    return list(found.values())


def _namespaces_of(value: object) -> Iterator[dict[str, Any]]:
    """Yield the namespaces in which a function or the methods of a class are defined."""
    if isinstance(value, FunctionType):
        yield value.__globals__
    elif isinstance(value, type):
        for each in vars(value).values():
            function = getattr(each, "fget", each)
            if isinstance(function, FunctionType):
                yield function.__globals__
