"""Samples of the proxy's process: memory, descriptors, threads, CPU, and the delay of its event loop's timers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import time
import urllib.request
from pathlib import Path

import msgspec

from tests.etcd.server import HOST
from tests.proxy_process import ProxyProcess
from tests.waiting import until

INSIDE = Path(__file__).parent / "inside"
HELD = Path(tempfile.gettempdir()) / f"watchmux-soak-held-{os.getpid()}"
"""Each process of the proxy appends its id."""
ENVIRONMENT = {"PYTHONPATH": str(INSIDE), "SOAK_HELD": str(HELD)}
"""The environment of the proxy."""

PARENT = "parent"
"""The process that was started, with --workers."""

DELAY = "watchmux_event_loop_delay_seconds"
GAUGES = (
    *("watches", "sessions", "trunks", "parked", "backfills", "lagging", "connections"),
    *("history_bytes", "upstream_streams"),
)
EVERY_S = 1.0


class Held(msgspec.Struct):
    """The process's own counts of its memory (inside/sitecustomize.py)."""

    garbage: int
    """Objects that only the preceding collection has freed."""
    objects: int
    blocks: int
    """Of Python's allocator."""
    malloc_bytes: int
    census: dict[str, int] = {}
    """Objects by holder and type; others than `objects`, also those that the collector does not track."""


class Sample(msgspec.Struct):
    """One sample of the proxy; with --workers the figures of its processes are sums."""

    at_s: float
    """Since the start of the run."""
    pid: int
    memory_bytes: int
    descriptors: int
    threads: int
    cpu_s: float
    """Since the start of its process."""
    processes: dict[str, Sample] = {}
    """At rest: the processes of --workers by name, without gauges and counters."""
    loop_delay_s: float = 0.0
    """An upper bound (a bucket's) of the longest timer delay since the previous sample."""
    gauges: dict[str, float] = {}
    counters: dict[str, float] = {}
    held: Held | None = None
    """At rest only."""


def read_metrics(port: int) -> dict[str, float]:
    """Read the proxy's /metrics."""
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in samples}


class Sampler:
    """Samples the proxy every second, over all of its processes."""

    def __init__(self, proxy: ProxyProcess, workers: int = 0) -> None:
        self._proxy = proxy
        self._workers = workers
        self._started = time.monotonic()
        self._buckets: dict[str, float] = {}
        self._pid = 0
        self.samples: list[Sample] = []

    @property
    def now_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            # Between two processes, or while one ends, no sample is possible.
            with contextlib.suppress(OSError, AssertionError, AttributeError, ValueError, IndexError):
                self.samples.append(await asyncio.to_thread(self.take))
            await asyncio.sleep(EVERY_S)

    def take(self) -> Sample:
        """Take one sample. Raises OSError when the proxy is down."""
        process = self._proxy.process
        assert process is not None
        metrics = read_metrics(self._proxy.metrics_port)
        sample = self._of(process.pid)
        if self._workers:
            self._add_processes(sample)
        sample.loop_delay_s = self._delay(process.pid, metrics)
        sample.gauges = {name: metrics[f"watchmux_{name}"] for name in GAUGES}
        sample.counters = {
            name.removeprefix("watchmux_"): value
            for name, value in metrics.items()
            if name.startswith("watchmux_") and name.partition("{")[0].endswith("_total")
        }
        return sample

    def _of(self, pid: int) -> Sample:
        """Sample one process. Raises OSError if it has ended."""
        home = Path(f"/proc/{pid}")
        status = dict(line.split(":", 1) for line in (home / "status").read_text().splitlines())
        return Sample(
            round(self.now_s, 2),
            pid,
            self._proxy.memory_bytes(pid),
            len(list((home / "fd").iterdir())),
            int(status["Threads"]),
            self._proxy.cpu_s(pid),
        )

    def _add_processes(self, sample: Sample) -> None:
        pids = {PARENT: sample.pid, **self._proxy.processes()}
        if len(pids) < self._workers + 2:
            raise ProcessLookupError("a process is not there yet")
        sample.processes = {name: self._of(pid) for name, pid in pids.items()}
        parts = sample.processes.values()
        sample.memory_bytes = sum(part.memory_bytes for part in parts)
        sample.descriptors = sum(part.descriptors for part in parts)
        sample.threads = sum(part.threads for part in parts)
        sample.cpu_s = sum(part.cpu_s for part in parts)

    def take_held(self, sample: Sample) -> None:
        """Have each process report its memory."""
        for each in sample.processes.values() or [sample]:
            path = Path(f"{HELD}.{each.pid}")
            path.unlink(missing_ok=True)
            os.kill(each.pid, signal.SIGUSR2)
            until(path.exists, "the proxy to say what it holds")
            each.held = msgspec.json.decode(path.read_bytes(), type=Held)
            path.unlink()

    def _delay(self, pid: int, metrics: dict[str, float]) -> float:
        now = {name: value for name, value in metrics.items() if name.startswith(f"{DELAY}_bucket")}
        before = self._buckets if pid == self._pid else {}
        self._buckets, self._pid = now, pid
        news = {name: value - before.get(name, 0.0) for name, value in now.items()}
        most = max(news.values(), default=0.0)
        bounds = [float(name.split('"')[1]) for name, value in news.items() if value >= most]
        return min(bounds, default=0.0) if most else 0.0
