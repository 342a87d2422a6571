"""Supervision of the processes of `--workers`: who starts, restarts, is killed and stops when. Pure: no I/O, no clock.

One hub and N workers (see `supervising.py`). A process that ends is restarted: at once, but with growing delays while
it ends again and again. A process that reports nothing for `SILENT_S` hangs: it is killed, and its end restarts it. At
a stop the workers leave first, since their clients need the hub until they are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from upstream.endpoints import Backoff

HUB: Final = "hub"

SILENT_S: Final = 15.0
"""A process that reports nothing for this time is killed. Processes report every 2.5 s: its event loop is blocked."""

LOOK_S_MAX: Final = 2.5
"""The parent looks at its processes at least this often."""

LATE_S: Final = 6.0
"""A worker that reports nothing for this time gets no new connections while others report."""

TOGETHER_S: Final = 5.0
"""How long connections wait at the start for all workers to serve: the first one would get all clients of a restart."""

RESTART_S_FIRST: Final = 0.25
RESTART_S_MAX: Final = 30.0
"""Delay of the second restart in a row, and the longest one; a process that lived that long is restarted at once."""

STOP_GRACE_S: Final = 5.0
"""How much longer than --drain a process may take to stop before it is killed."""


class Phase(Enum):
    """What all processes are to do."""

    RUN = "run"
    STOP_WORKERS = "the workers drain"
    STOP_HUB = "the hub stops"
    GONE = "no process is left"


@dataclass(frozen=True, slots=True)
class StartProcess:
    """Start this process."""

    name: str


@dataclass(frozen=True, slots=True)
class StopProcess:
    """Ask this process to stop (SIGTERM); it drains."""

    name: str


@dataclass(frozen=True, slots=True)
class KillProcess:
    """Kill this process: it hangs, or does not stop in time."""

    name: str


Action = StartProcess | StopProcess | KillProcess


@dataclass(slots=True)
class Supervised:
    """One process, across its restarts."""

    name: str
    backoff: Backoff
    start_at: float
    """When to start it, while it does not run."""

    running: bool = False
    ready: bool = False
    """It has reported that it is ready, in this life."""

    killed: bool = False
    heard_at: float = 0.0
    starts: int = 0
    problem: str = ""
    """Why it does not serve, as it reported; "" if it serves."""

    hung: str = ""
    """The evidence that it hangs, as its self-probe reported; "" if it does not."""

    @property
    def serving(self) -> bool:
        """Whether it serves clients (a worker) or the workers (the hub)."""
        return self.running and self.ready and not (self.problem or self.hung)


def worker(number: int) -> str:
    """Return the name of a worker; `number` counts from 1."""
    return f"worker-{number}"


@dataclass(slots=True)
class Supervision:
    """The state of all processes. Each method takes the time in seconds of any monotonic clock."""

    workers: int
    jitter: Callable[[], float]
    """Returns a number in [0, 1), for the delays of restarts."""

    drain_s: float = 10.0
    """--drain: how long a worker may take to stop."""

    phase: Phase = Phase.RUN
    failed: bool = False
    """A process ended before any process of its kind was ready: the settings cannot work."""

    was_ready: bool = False
    """All processes were ready at the same time."""

    served_together: bool = False
    """All workers served at the same time."""

    processes: dict[str, Supervised] = field(default_factory=dict)
    _kill_at: float = 0.0
    _together_until: float | None = None
    _looked_at: float | None = None
    _asked: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name in (HUB, *(worker(number + 1) for number in range(self.workers))):
            self.processes[name] = Supervised(name, Backoff(RESTART_S_FIRST, RESTART_S_MAX, self.jitter), 0.0)

    @property
    def _workers(self) -> list[Supervised]:
        return [process for process in self.processes.values() if process.name != HUB]

    # inputs

    def started(self, name: str, now: float) -> None:
        """A process was started."""
        process = self.processes[name]
        process.running, process.ready, process.killed = True, False, False
        process.problem = process.hung = ""
        process.heard_at = now
        process.starts += 1
        self._asked.discard(name)

    def reported(self, name: str, now: float, *, problem: str = "", hung: str = "") -> None:
        """A process reported that it is up, and why it does not serve, if so."""
        process = self.processes[name]
        if not process.ready:
            process.ready = True
            process.backoff.succeeded(now)
        process.heard_at = now
        process.problem, process.hung = problem, hung
        self.was_ready = self.was_ready or all(each.ready for each in self.processes.values())
        if name != HUB and self._together_until is None:
            self._together_until = now + TOGETHER_S
        if not self.served_together:
            self.served_together = all(each.serving for each in self._workers)

    def not_started(self, name: str, now: float) -> None:
        """A process could not be started: the machine has no process, memory or file descriptor left."""
        process = self.processes[name]
        process.start_at = now + process.backoff.failed(now)

    def ended(self, name: str, now: float) -> None:
        """A process has ended."""
        process = self.processes[name]
        if not process.ready and not self.was_ready and not process.killed:
            self.failed = True
            self.stop(now)
        process.running = process.ready = False
        process.start_at = now + process.backoff.failed(now)

    def stop(self, now: float) -> None:
        """Stop all processes."""
        if self.phase is Phase.RUN:
            self.phase = Phase.STOP_WORKERS
            self._kill_at = now + self.drain_s + STOP_GRACE_S

    # what to do

    def due(self, now: float) -> Iterator[Action]:
        """Yield what is to be done now. The caller does it, and reports starts and ends."""
        if self._looked_at is not None and now > self._looked_at + 2 * LOOK_S_MAX:
            # The parent itself was stopped (SIGSTOP): what was reported meanwhile may not be read yet.
            for process in self.processes.values():
                process.heard_at = now
        self._looked_at = now
        if self.phase is Phase.RUN:
            for number, process in enumerate(self.processes.values()):
                if not process.running and process.start_at <= now:
                    if self.was_ready or self._is_turn_of(number):
                        yield StartProcess(process.name)
                elif process.running and process.heard_at + SILENT_S <= now and not process.killed:
                    process.killed = True
                    yield KillProcess(process.name)
            return
        workers = [process for process in self._workers if process.running]
        if self.phase is Phase.STOP_WORKERS and not workers:
            self.phase = Phase.STOP_HUB
            self._kill_at = now + STOP_GRACE_S
        hub = self.processes[HUB]
        if self.phase is Phase.STOP_HUB and not hub.running:
            self.phase = Phase.GONE
        for process in workers if self.phase is Phase.STOP_WORKERS else [hub] if hub.running else []:
            if process.name not in self._asked:
                self._asked.add(process.name)
                yield StopProcess(process.name)
            elif self._kill_at <= now and not process.killed:
                process.killed = True
                yield KillProcess(process.name)

    def _is_turn_of(self, number: int) -> bool:
        """Whether a process may be started for the first time: after the hub, then the first worker, are ready.

        An error that concerns all of them is then reported once.
        """
        return all(process.ready for process in list(self.processes.values())[: min(number, 2)])

    def next_deadline(self) -> float | None:
        """Return when `due` may have something to do, if nothing happens until then."""
        if self.phase is not Phase.RUN:
            return None if self.phase is Phase.GONE else self._kill_at
        times = [
            process.heard_at + SILENT_S if process.running else process.start_at
            for number, process in enumerate(self.processes.values())
            if (not process.killed if process.running else self.was_ready or self._is_turn_of(number))
        ]
        return min(times, default=None)

    def takers(self, now: float) -> list[str]:
        """Return the workers that get new connections: those that serve, or if none does, all that are ready."""
        if self.phase is not Phase.RUN or self._together_until is None:
            return []
        if not self.served_together and now < self._together_until:
            return []
        workers = [process for process in self._workers if process.ready]
        serving = [process for process in workers if process.serving and now < process.heard_at + LATE_S]
        return [process.name for process in serving or workers]

    # what the whole is

    @property
    def hung(self) -> str:
        """The evidence that the whole hangs and needs a restart; "" if it does not.

        A single worker that hangs is restarted by this program; the service manager restarts the whole only if the hub
        hangs, or all workers do.
        """
        if self.processes[HUB].hung:
            return f"hub: {self.processes[HUB].hung}"
        workers = self._workers
        return workers[0].hung if all(process.hung for process in workers) else ""

    @property
    def reason(self) -> str:
        """Why the whole does not serve; "" if it does: the hub serves, and so does at least one worker."""
        if self.phase is not Phase.RUN:
            return "draining"
        hub = self.processes[HUB]
        workers = self._workers
        if any(process.serving for process in workers) and hub.serving:
            return ""
        if not hub.running or not hub.ready:
            return "the hub is starting"
        if hub.hung or hub.problem:
            return f"hub: {hub.hung or hub.problem}"
        problems = [process.hung or process.problem for process in workers if process.hung or process.problem]
        return problems[0] if problems else "no worker is ready"
