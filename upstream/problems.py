"""Why endpoints cannot be used, for the log: each problem once until it is over, although two parts may meet it."""

from __future__ import annotations

from typing import Final

from upstream.errors import Logger

CALLS: Final = "calls"
WATCHES: Final = "watches"
"""The parts of the proxy that use endpoints: the pool and the watch client."""


class EndpointProblems:
    """Shared by the pool and the watch client, which usually have the same endpoints."""

    def __init__(self, log: Logger) -> None:
        self._log = log
        # By endpoint, the problem that each part has met last.
        self._met: dict[str, dict[str, str]] = {}

    def met(self, part: str, endpoint: str, problem: str) -> None:
        """Log a problem that a part has met, unless it is already known."""
        met = self._met.setdefault(endpoint, {})
        known = problem in met.values()
        met[part] = problem
        if not known:
            self._log.warning("cannot use this endpoint", endpoint=endpoint, problem=problem)

    def over(self, part: str, endpoint: str) -> None:
        """A part can use the endpoint, or does not try to any more."""
        met = self._met.get(endpoint, {})
        met.pop(part, None)
        if not met:
            self._met.pop(endpoint, None)
