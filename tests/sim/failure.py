"""The exception that ends a simulation with a finding."""

from __future__ import annotations


class SimulationFailure(AssertionError):
    """The proxy, or the store under it, broke its contract with the clients."""
