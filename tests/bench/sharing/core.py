"""Creates, requests for progress and restores: what the core decides for many clients at once."""

from __future__ import annotations

from functools import partial

from tests.bench.sharing.front import Figures, Front, Scenario
from tests.clients.restarting import PROGRAMS, starts_again


def restore(front: Front) -> Figures:
    """The store is restored from a snapshot under the watch of a real client."""
    figures: Figures = {}
    for library in PROGRAMS:
        again, _ = starts_again(library, partial(front.before), limit_s=6)
        figures[f"{library} started again"] = "yes" if again else "no"
    return figures


SCENARIOS: dict[str, Scenario] = {"restore": restore}
