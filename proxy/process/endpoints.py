"""Which endpoints are in force: decided in one place for all processes, without I/O.

New endpoints are examined before they are used (`Proxy.examine_endpoints`), by one process: with --workers by the hub.
Its answer decides for all processes: they all get the new endpoints, or none does. A hub that ends before it has
answered decides nothing: the next one examines them. A process that starts gets those in force.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class EndpointLists(NamedTuple):
    """--endpoints and --watch-endpoints."""

    calls: list[str]
    watches: list[str]


class Examination(NamedTuple):
    """Endpoints that are to be examined, and the number of the request."""

    number: int
    endpoints: EndpointLists


class ExaminationResult(NamedTuple):
    """Why the endpoints of an examination must not be used; "" if they may."""

    number: int
    problem: str


@dataclass(slots=True)
class EndpointsDecision:
    """The endpoints in force, and those that may replace them."""

    in_force: EndpointLists
    pending: Examination | None = None
    """To be examined by the process that does so, and again by the next one if it ends before it answers."""
    _count: int = 0

    def want(self, endpoints: EndpointLists) -> None:
        """Take the endpoints that are configured now, in place of those that were pending."""
        self._count += 1
        self.pending = None if endpoints == self.in_force else Examination(self._count, endpoints)

    def examined(self, result: ExaminationResult) -> EndpointLists | None:
        """Take an answer; return the endpoints that it was about, None if they are not pending any more.

        They are in force from now on unless the answer has a problem.
        """
        pending = self.pending
        if pending is None or result.number != pending.number:
            return None
        self.pending = None
        if not result.problem:
            self.in_force = pending.endpoints
        return pending.endpoints
