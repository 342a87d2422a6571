"""What ends a simulation that has found something."""

from __future__ import annotations


class SimulationFailure(AssertionError):
    """The proxy, or the store under it, did something that no client may see."""
