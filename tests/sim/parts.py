"""The code under simulation: the modules of a world, each of which may be a mutant of the real one."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import coalesce
from coalesce import invariants
from proxy.auth import queries as queries
from upstream import attempts
from upstream.store import errors, recorder, state, watch_batch, watch_requests, watchable
from upstream.watching import choice, feed, lineage
from upstream.watching import state as watch_state


@dataclass(frozen=True, slots=True)
class StoreModules:
    """The pure modules of the bundled store that a member uses by name; they import the others."""

    errors: ModuleType = errors
    recorder: ModuleType = recorder
    state: ModuleType = state
    watch_batch: ModuleType = watch_batch
    watch_requests: ModuleType = watch_requests
    watchable: ModuleType = watchable


@dataclass(frozen=True, slots=True)
class Parts:
    """The core, the bundled store, and the decision modules of the watch client and the engine."""

    core: ModuleType = coalesce
    # Of this core: it examines the classes of objects.
    invariants: ModuleType = invariants
    store: StoreModules = StoreModules()
    watch_state: ModuleType = watch_state
    choice: ModuleType = choice
    feed: ModuleType = feed
    lineage: ModuleType = lineage
    queries: ModuleType = queries
    attempts: ModuleType = attempts


REAL = Parts()
