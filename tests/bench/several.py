"""The tables of watchmux with several processes: what was measured with two workers, and what follows for more.

Calculated from two fan-outs (`FEW`, `MANY`): an event costs each process a fixed part, which its wake-up and the work
for any number of clients take, and a part for each delivery.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.bench.cases import CASES, FLOOR, FLOOR_WORKERS, LEVELS, OURS, TWICE, WORKERS, WORKERS_AT
from tests.bench.measure import Figures, Results

CPU_MAX = {"burst": 1.25, "paced": 1.25, "single": 1.25}
"""The wanted CPU of two workers, times that of one process."""
LEAST_SHARE = 0.8
"""The wanted CPU of the least busy worker, times the mean."""
LATER_MS_MAX = 0.5
"""How much later than with one process p50 may be."""
FEW, MANY = (f"scale-{watches}" for watches in WORKERS_AT)
ALONE = "single"
"""A case with a connection for each client."""
CORES = (2, 4, 8, 16)
CLIENTS = (500, 10_000)


def measured_of(results: Results) -> str:
    """Return the table of two workers compared with one process; empty if they were not measured."""
    rows = []
    for case, by_target in results.items():
        if not case.startswith("scale-") and WORKERS in by_target and OURS in by_target:
            rows.append(_row(case, by_target))
    if not rows:
        return ""
    heads = (
        *("case", "CPU us, one process", "two workers", "two levels", "two processes that share nothing"),
        *("the floor: hub and two workers, times one", "us a write: parent + hub + each worker"),
        *("least busy worker", "p50 ms, one process", "two workers", "PSS MiB, one process", "two workers"),
    )
    return "\n".join([f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1), *rows]) + "\n"


def _row(case: str, by_target: dict[str, Figures]) -> str:
    one, two = by_target[OURS], by_target[WORKERS]
    cpu = _judged(two["cpu_us"] / one["cpu_us"], CPU_MAX.get(case))
    missed = two["p50_ms"] - one["p50_ms"] > LATER_MS_MAX and case in CPU_MAX
    cells = (
        f"{one['cpu_us']:.2f}",
        f"{two['cpu_us']:.2f} ({cpu})",
        _compared(by_target, LEVELS, OURS),
        _compared(by_target, TWICE, OURS),
        _compared(by_target, FLOOR_WORKERS, FLOOR),
        " + ".join(f"{two[name]:.0f}" for name in ("parent_us", "hub_us", "worker_us")),
        f"{two['least_share']:.2f}{'' if two['least_share'] >= LEAST_SHARE else ' **missed**'}",
        f"{one['p50_ms']:.2f}",
        f"{two['p50_ms']:.2f}{' **missed**' if missed else ''}",
        f"{one['pss_mib']:.1f}",
        f"{two['pss_mib']:.1f}",
    )
    return f"| {case} | {' | '.join(cells)} |"


def _compared(by_target: dict[str, Figures], name: str, base: str) -> str:
    """Return the CPU of a target, and how many times that of another it is; empty if one was not measured."""
    if name not in by_target or base not in by_target:
        return ""
    cpu_us = by_target[name]["cpu_us"]
    return f"{cpu_us:.2f} ({cpu_us / by_target[base]['cpu_us']:.2f})"


def _judged(value: float, most: float | None) -> str:
    if most is None:
        return f"{value:.2f}"
    return f"{value:.2f} of {most:.2f}{'' if value <= most else ' **missed**'}"


class Line(NamedTuple):
    """The CPU us of an event: a fixed part, and a part for each delivery."""

    fixed: float
    each: float

    def at(self, deliveries: float) -> float:
        """Return the us of an event with so many deliveries."""
        return self.fixed + self.each * deliveries


def _through(few: float, many: float, unit: float = 1.0) -> Line:
    """Return the line through the us of an event of both fan-outs; `unit`: the part of the deliveries they are for."""
    at_few, at_many = (CASES[name].watch_count * unit for name in (FEW, MANY))
    each = (many - few) / (at_many - at_few)
    return Line(few - each * at_few, each)


class Costs(NamedTuple):
    """What an event costs one process; with workers, the hub and the parent, and each worker."""

    one: Line
    hub: float
    worker: Line

    def of(self, workers: int, clients: float) -> float:
        """Return the us of all processes."""
        return self.hub + workers * self.worker.at(clients / workers)

    def clients_for(self, ratio: float, workers: int) -> float:
        """Return from how many clients on all take at most `ratio` times the CPU of one process; may be infinite."""
        saved = ratio * self.one.each - self.worker.each
        return (
            max(0.0, self.hub + workers * self.worker.fixed - ratio * self.one.fixed) / saved
            if saved > 0
            else float("inf")
        )

    def speedup(self, cores: int, clients: int) -> float:
        """Return how many times the events of one process a worker on each core delivers, the hub on one of them."""
        writes = min(cores / self.of(cores, clients), 1 / self.hub, 1 / self.worker.at(clients / cores))
        return writes * self.one.at(clients)


def costs_of(results: Results) -> dict[str, Costs]:
    """Return the costs with shared connections, and with a connection for each client; empty if not measured."""
    few, many = results.get(FEW, {}), results.get(MANY, {})
    if not all(name in found for name in (OURS, WORKERS) for found in (few, many)):
        return {}
    us = [found[OURS]["cpu_us"] * CASES[name].watch_count for found, name in ((few, FEW), (many, MANY))]
    hub = sum(found[WORKERS][name] for found in (few, many) for name in ("hub_us", "parent_us")) / 2
    shared = Costs(_through(*us), hub, _through(few[WORKERS]["worker_us"], many[WORKERS]["worker_us"], 0.5))
    costs = {"50 streams on a connection": shared}
    alone = results.get(ALONE, {})
    if OURS in alone and WORKERS in alone:
        clients = CASES[ALONE].watch_count
        one = (alone[OURS]["cpu_us"] * clients - shared.one.fixed) / clients
        worker = (alone[WORKERS]["worker_us"] - shared.worker.fixed) / (clients / 2)
        costs["a connection for each stream"] = Costs(
            Line(shared.one.fixed, one), hub, Line(shared.worker.fixed, worker)
        )
    return costs


def calculated_of(results: Results) -> str:
    """Return the tables of what follows for other fan-outs and more cores; empty if not measured."""
    costs = costs_of(results)
    if not costs:
        return ""
    lines = [
        "| us of CPU of an event that comes alone | one process | hub and parent | each worker |",
        "|---|---:|---:|---:|",
    ]
    for what, cost in costs.items():
        worker = f"{cost.worker.fixed:.0f} + {cost.worker.each:.2f} a delivery"
        lines.append(f"| {what} | {cost.one.fixed:.0f} + {cost.one.each:.2f} a delivery | {cost.hub:.0f} | {worker} |")
    heads = [f"{cores} workers" for cores in CORES]
    lines += ["", f"| calculated | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for what, cost in costs.items():
        from_on = [_clients(cost.clients_for(1.25, cores)) for cores in CORES]
        lines.append(f"| {what}: 1.25 times the CPU of one process from | {' | '.join(from_on)} |")
        for clients in CLIENTS:
            times = [f"{cost.speedup(cores, clients):.1f}" for cores in CORES]
            lines.append(f"| {what}: events a second, times one process, {clients:,} clients | {' | '.join(times)} |")
    return "\n".join(lines) + "\n"


def _clients(count: float) -> str:
    return "never" if count == float("inf") else f"{count:,.0f} clients"
