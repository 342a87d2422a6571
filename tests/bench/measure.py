"""One measurement: one case at one target, with target and load in separate processes."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Sequence
from typing import Any, Self

from tests.bench.cases import WORKERS, Case, Kind
from tests.bench.targets import PYTHON, Target
from tests.clients import golang
from tests.etcd.server import HOST
from tests.upstream.certificates import Certificates
from tests.waiting import until

Figures = dict[str, float]
Results = dict[str, dict[str, Figures]]
"""By case and target."""

SETTLED_S = 0.3


class _Child:
    """A process that is driven by lines on its pipes, and killed at the end."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def go(self) -> None:
        """Send it the command to continue."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def line(self) -> str:
        """Wait for its next line; empty: it has ended."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()


class Bystander(_Child):
    """A client with one watch of its own, whose key is written all the time; see tests/bench/bystander.py."""

    def __init__(self, target: Target, endpoint: str) -> None:
        super().__init__([PYTHON, "-m", "tests.bench.bystander", str(target.port), endpoint])

    def latest_ms(self) -> tuple[float, float, float]:
        """Return the largest delay of its events since the last call: at the target, at etcd, and the difference.

        The difference is the largest of the same event, so it is the target's, whatever etcd and the machine add.
        """
        self.go()
        at_target, at_etcd, later = map(float, self.line().split())
        return at_target, at_etcd, later


class Load(_Child):
    """The load generator, running against a target."""

    def __init__(self, case: Case, target: Target, files: Certificates) -> None:
        ports = ",".join(map(str, (target.port, *target.more_ports)))
        arguments = [case.name, case.profile, HOST, ports, files.client_cert, files.client_key]
        command = [PYTHON, "-m", "tests.bench.load", *arguments]
        if case.real:
            command = [
                *(str(golang.program()), "crowd", f"--endpoints={HOST}:{target.port}"),
                *(f"--connections={case.connections}", f"--streams={case.streams}", f"--watches={case.watches}"),
                *(f"--ranges={case.ranges}", f"--expected={case.expected()}"),
            ]
        super().__init__(command)

    def says(self) -> dict[str, Any]:
        """Wait for its next report."""
        line = self.line()
        if not line:
            raise AssertionError("the load generator ended early")
        said: dict[str, Any] = json.loads(line)
        return said


def write(case: Case, endpoint: str, first: int, count: int, rate: float) -> None:
    """Write directly to the store at `endpoint`."""
    arguments = [case.name, endpoint, str(first), str(count), str(rate)]
    try:
        subprocess.run([PYTHON, "-m", "tests.bench.writer", *arguments], check=True, timeout=case.limit_s)
    except subprocess.SubprocessError as error:
        raise AssertionError(f"the writer failed: {error}") from None


def rest(seconds: float) -> None:
    """Wait for a while."""
    subprocess.run(["sleep", str(seconds)], check=True)


def measure(case: Case, target: Target, endpoint: str, files: Certificates) -> Figures:
    """Run `case` at `target` once, writing at `endpoint`, and return its figures."""
    if case.behind:
        write(case, endpoint, 0, case.behind, 0)
    if case.call:
        write(case, endpoint, 0, 1, 0)
    rest(SETTLED_S)
    figures: Figures = {"base_mib": target.memory_mib()}
    before_s = target.cpu_s()
    each_s: list[float] = []
    with contextlib.ExitStack() as stack:
        bystander = stack.enter_context(Bystander(target, endpoint)) if case.keys else None
        load = stack.enter_context(Load(case, target, files))
        ready = load.says()
        if "created" in ready and ready["created"] < case.watch_count:
            raise AssertionError(f"{ready['created']:,} of {case.watch_count:,} watches were created")
        figures |= {name: ready[name] for name in ("create_s",) if name in ready}
        if case.kind is Kind.IDLE:
            figures["create_cpu_us"] = 1e6 * (target.cpu_s() - before_s) / case.watch_count
            figures |= _idle(case, target)
        elif case.kind is Kind.STORM:
            figures |= _storm(case, target, endpoint, load)
        else:
            if case.kind is not Kind.CATCH_UP:
                created_s = before_s
                before_s = _quiet(target)
                if bystander is not None:
                    figures["create_cpu_us"] = 1e6 * (before_s - created_s) / case.watch_count
                    figures["watch_kib"] = 1024 * (target.memory_mib() - figures["base_mib"]) / case.watch_count
                    names = ("late_create_ms", "etcd_late_create_ms", "later_create_ms")
                    figures |= dict(zip(names, bystander.latest_ms(), strict=True))
                each_s = target.cpu_each_s()
                if case.kind is Kind.FANOUT:
                    write(case, endpoint, case.behind, case.writes, case.rate)
                load.go()
            figures |= _told(case, load.says(), target.cpu_s() - before_s)
            if target.name == WORKERS:
                figures |= _by_process(case, [s - was for s, was in zip(target.cpu_each_s(), each_s, strict=True)])
        if bystander is not None:
            names = ("late_ms", "etcd_late_ms", "later_ms")
            figures |= dict(zip(names, bystander.latest_ms(), strict=True))
        figures["memory_mib"] = target.memory_mib()
        figures["pss_mib"] = target.pss_mib()
        figures["peak_mib"] = target.peak_mib()
    parts = case.watch_count or case.in_flight
    figures["kib_each"] = 1024 * (figures["memory_mib"] - figures["base_mib"]) / parts
    return figures


def _by_process(case: Case, spent_s: list[float]) -> Figures:
    """Return the CPU of a write (or call) in the parent, the hub and a worker, and the least busy worker's share."""
    parent_s, hub_s, *workers_s = spent_s
    mean_s = sum(workers_s) / len(workers_s)
    each = {"parent_us": parent_s, "hub_us": hub_s, "worker_us": mean_s}
    figures = {name: 1e6 * seconds / (case.writes or case.calls) for name, seconds in each.items()}
    return figures | {"least_share": min(workers_s) / mean_s}


def _quiet(target: Target) -> float:
    """Wait until the target has finished its work for the new clients; return its CPU seconds."""
    last_s = 0.0

    def still() -> bool:
        nonlocal last_s
        earlier_s, last_s = last_s, target.cpu_s()
        rest(0.1)
        return target.cpu_s() - earlier_s < 0.02

    until(still, f"{target.name} to be idle", 10)
    return target.cpu_s()


def _told(case: Case, told: dict[str, Any], spent_s: float) -> Figures:
    """Convert the load's counts to figures. It counts values, which only a share of the events have."""
    events_each = 1.0
    if case.mixed:
        events_each = case.expected() / case.expected(stamps=True)
    figures: Figures = {
        name: told[name] for name in ("p50_ms", "p99_ms", "p100_ms", "unread_p99_ms", "broken") if name in told
    }
    events = told["stamps"] * events_each
    figures["events"] = events
    figures["lost"] = told["lost"] if case.call else round(told["missing"] * events_each)
    figures["cpu_us"] = 1e6 * spent_s / max(1.0, events)
    if "events_s" in told:
        figures["events_s"] = told["events_s"]
    else:
        figures["events_s"] = told["stamps_s"] * events_each
        figures["load_cpu_s"] = told["load_cpu_s"]
    return figures


def _idle(case: Case, target: Target) -> Figures:
    """Measure the cost of an idle target."""
    before_s = _quiet(target)
    rest(case.idle_s)
    return {"idle_cpu_percent": 100 * (target.cpu_s() - before_s) / case.idle_s}


def _storm(case: Case, target: Target, endpoint: str, load: Load) -> Figures:
    """Wait until all clients have the writes, then have them reconnect at once from half of them."""
    write(case, endpoint, 0, case.writes, case.rate)
    load.go()
    first = load.says()
    before_s = _quiet(target)
    load.go()
    figures: Figures = {"create_s": load.says()["create_s"]}
    figures |= _told(case, load.says(), target.cpu_s() - before_s)
    figures["lost"] += first["missing"]
    return figures
