"""The course of a soak: waves of clients with faults, a rest after each, then the checks.

There are four waves. In the first the proxy itself is restarted as well. Before the second it is started again, and
stays the same process to the end, so that its state at rest after the last wave can be compared with that after the
second. Memory that the allocators keep for reuse is not a leak; memory in use that grows with use is one. So the check
uses the process's own counts of objects and bytes in use, which are exact to a few hundred objects; resident memory has
a coarse bound in addition, for memory that is not counted.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from coalesce.guarantees.checkers import Bookmark, Canceled, Opened, Received, Truth, check
from tests.e2e.churn import History
from tests.e2e.running import Etcd
from tests.etcd.server import EtcdServer
from tests.faults.relay import relay_to
from tests.proxy_process import ProxyProcess
from tests.soak import spool
from tests.soak.client import KINDS, Summary
from tests.soak.faults import COVERS, Faults, write_covers
from tests.soak.sampling import ENVIRONMENT, Sample, Sampler

SHARES = (0.25, 0.25, 0.25, 0.25)
"""The waves' shares of the time."""
QUIET_S = 3.0
"""The time without faults at the beginning of a wave."""
REST_S = 60.0
SETTLE_S = 150.0
GROWTH_MAX = {"objects": 3_000, "blocks": 6_000, "malloc_bytes": 1 << 20}
"""The allowed growth from the second wave to the last one: tables of a long-lived connection to etcd, label sets of
metrics. A wave has thousands of sessions and calls; one leaked object of each would exceed this."""
GARBAGE_MAX = 50_000
"""The number of objects that may wait for a collection: less than triggers one (proxy.server.GC_THRESHOLDS)."""
RESIDENT_GROWTH_MAX_BYTES = 24 << 20
"""The same for resident memory: fragmentation of the allocators settles after a few waves."""
LEAK_DESCRIPTORS = 3
"""Variation by connections to etcd."""
KNOBS = (
    *("--drain=2s", "--linger=1s", "--history-linger=2s", "--history-bytes-total-max=8MiB"),
    *("--dial-keepalive-time=5s", "--dial-keepalive-timeout=2s", "--log-level=warn"),
)
NOT_WATCHED = b"/z"
"""A key outside all watched ranges."""
EMPTY = ("watches", "sessions", "trunks", "parked", "backfills", "lagging", "connections", "history_bytes")


@dataclass
class Outcome:
    """The findings of a soak."""

    seed: int
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    fault_log: list[tuple[float, str]] = field(default_factory=list)
    watches: int = 0
    events: int = 0
    changes: int = 0
    """Events of etcd itself."""
    acknowledged: int = 0
    compacted: int = 0
    """Watches cancelled for it."""
    resumed: int = 0
    fragments: int = 0
    """Responses followed by further pieces."""
    bookmarks: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    rests: list[Sample] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    log: str = ""
    """Of the proxy."""


class Wave:
    """The client processes, one of each kind."""

    def __init__(self, endpoint: str, directory: Path, seed: int) -> None:
        self.directory = directory
        self._endpoint = endpoint
        self._seed = seed
        self._processes: dict[str, asyncio.subprocess.Process] = {}

    async def start(self) -> None:
        """Start the processes."""
        self.directory.mkdir(parents=True)
        for kind in KINDS:
            arguments = ["-m", "tests.soak.client", kind, self._endpoint, str(self.directory), str(self._seed)]
            pipe = asyncio.subprocess.PIPE
            self._processes[kind] = await asyncio.create_subprocess_exec(
                sys.executable, *arguments, stdin=pipe, stdout=pipe
            )

    async def settle(self, store: Etcd) -> int:
        """Have writers stop and watchers catch up; return the last revision."""
        await self._ask("callers", "settle 0")
        # Watches may start a little in the future.
        for number in range(40):
            revision = await store.put(b"/s/a/00", b"last %d" % number)
        await asyncio.gather(*(self._settle(kind, revision, store) for kind in KINDS if kind != "callers"))
        return revision

    async def _settle(self, kind: str, revision: int, store: Etcd) -> None:
        """Have watchers catch up; write outside all watched ranges only if etcd itself would otherwise send nothing."""
        while await self._ask(kind, f"settle {revision}") == "waits":
            revision = await store.put(NOT_WATCHED, b"")

    async def _ask(self, kind: str, what: str) -> str:
        process = self._processes[kind]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{what}\n".encode())
        async with asyncio.timeout(SETTLE_S):
            answer = (await process.stdout.readline()).decode().strip()
        assert answer in ("settled", "waits"), f"the {kind} clients ended: {await process.wait()}"
        return answer

    async def leave(self) -> None:
        """Close all clients."""
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.write(b"leave\n")
        async with asyncio.timeout(60):
            await asyncio.gather(*(process.wait() for process in self._processes.values()))

    def kill(self) -> None:
        """Kill the remaining processes."""
        for process in self._processes.values():
            if process.returncode is None:
                process.kill()


async def soak(
    minutes: float, seed: int, directory: Path, only: str = "", workers: int = 0, spared: str = "hub"
) -> Outcome:
    """Run for about so long (plus the rests between waves); clients write their records to `directory`.

    `only`: inject only the faults whose name contains this, to find the one that leaks. `workers`: of --workers, 0 =
    one process; then processes are killed one by one as well, after the first wave those that are not `spared`.
    """
    outcome = Outcome(seed)
    knobs = (*KNOBS, f"--workers={workers}") if workers else KNOBS
    started = time.monotonic()
    with EtcdServer() as etcd:
        async with relay_to(etcd.client_port) as upstream:
            config = directory / "watchmux.toml"
            write_covers(config, COVERS[0])
            proxy = ProxyProcess(upstream.endpoint, [*knobs, f"--config={config}"], ENVIRONMENT)
            await asyncio.to_thread(proxy.__enter__)
            history = History(etcd.client_port)
            store = Etcd(etcd.endpoint)
            try:
                async with relay_to(proxy.port) as clients:
                    faults = Faults(
                        etcd, proxy, upstream, clients, history, config, seed, only, spared if workers else ""
                    )
                    sampler = Sampler(proxy, workers)
                    await _waves(
                        minutes * 60, directory, outcome, faults, clients.endpoint, proxy, sampler, history, store
                    )
            finally:
                await history.stop()
                await store._channel.close()
                outcome.log = await asyncio.to_thread(proxy.log)
                await asyncio.to_thread(proxy.__exit__, None, None, None)
    outcome.seconds = time.monotonic() - started
    return outcome


async def _waves(
    seconds: float,
    directory: Path,
    outcome: Outcome,
    faults: Faults,
    endpoint: str,
    proxy: ProxyProcess,
    sampler: Sampler,
    history: History,
    store: Etcd,
) -> None:
    sampling = asyncio.create_task(sampler.run())
    zero = asyncio.get_running_loop().time() - sampler.now_s
    outcome.rests.append(await _rest(sampler))
    try:
        for number, share in enumerate(SHARES):
            if number == 1:
                faults.restarts = False
                await asyncio.to_thread(proxy.stop)
                await asyncio.to_thread(proxy.start)
                outcome.rests.append(await _rest(sampler))
            wave = Wave(endpoint, directory / f"wave{number}", outcome.seed + number)
            try:
                await wave.start()
                await _trouble(seconds * share, faults)
                last = await wave.settle(store)
                await wave.leave()
            finally:
                wave.kill()
            outcome.rests.append(await _rest(sampler))
            await history.reach(last)
            truth = Truth(history.changes, faults.compactions)
            await asyncio.to_thread(judge, wave.directory, number, truth, last, outcome)
    finally:
        sampling.cancel()
        outcome.samples = sampler.samples
        outcome.faults = faults.done
        outcome.fault_log = [(round(at - zero, 2), what) for at, what in faults.log]
        outcome.changes = len(history.changes)
    outcome.leaks = leaks(outcome.rests, faults.killed)
    ended = proxy.log().count('"msg": "process ended"')
    if ended > len(faults.killed):
        outcome.violations.append(f"{ended} processes ended, of which {len(faults.killed)} were killed")


async def _trouble(seconds: float, faults: Faults) -> None:
    """Let clients run for so long, with faults after a quiet beginning; all faults are ended at the end."""
    await asyncio.sleep(min(QUIET_S, seconds / 4))
    tasks = [asyncio.create_task(faults.run()), asyncio.create_task(faults.tend())]
    done, _ = await asyncio.wait(tasks, timeout=max(0.0, seconds - QUIET_S))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        # Only this cancel ends the faults.
        task.result()


async def _rest(sampler: Sampler) -> Sample:
    """Wait until the proxy holds no state of clients, for a minute at most; return a sample of it."""
    deadline = time.monotonic() + REST_S
    while True:
        await asyncio.sleep(1)
        try:
            sample = await asyncio.to_thread(sampler.take)
        except OSError:
            if time.monotonic() > deadline:
                raise
            # A process is being replaced.
            continue
        if time.monotonic() > deadline or not any(sample.gauges[name] for name in EMPTY):
            await asyncio.to_thread(sampler.take_held, sample)
            return sample


def leaks(rests: list[Sample], killed: Collection[int] = ()) -> list[str]:
    """Return the leaks of the proxy at rest, relative to its earlier rest, and in absolute terms.

    With --workers they are those of each process that was not `killed` (by id).
    """
    found = []
    for number, rest in enumerate(rests):
        held = {name: rest.gauges[name] for name in EMPTY if rest.gauges[name]}
        if held:
            found.append(f"at rest {number} it holds {held}")
    if not rests[-1].processes:
        return found + _growth(rests)
    for name in rests[-1].processes:
        each = [rest.processes[name] for rest in rests]
        if each[-len(SHARES) + 1].pid not in killed:
            found += [f"{name}: {line}" for line in _growth(each)]
    return found


def _growth(rests: list[Sample]) -> list[str]:
    """Return what has grown in one process."""
    found = []
    for before, after in itertools.pairwise(rests):
        if before.pid == after.pid and after.descriptors > before.descriptors + LEAK_DESCRIPTORS:
            found.append(f"descriptors went from {before.descriptors} to {after.descriptors}")
    # After the second wave, when all one-time allocations are done, and after the last one.
    before, after = rests[-len(SHARES) + 1], rests[-1]
    if before.pid != after.pid:
        found.append("the proxy did not live from one rest to the next")
    if after.threads > before.threads:
        found.append(f"threads went from {before.threads} to {after.threads}")
    if after.memory_bytes > before.memory_bytes + RESIDENT_GROWTH_MAX_BYTES:
        found.append(f"resident memory went from {before.memory_bytes >> 20} to {after.memory_bytes >> 20} MiB")
    if before.held is None or after.held is None:
        found.append("the proxy did not say what it holds")
        return found
    for name, most in GROWTH_MAX.items():
        was, now = getattr(before.held, name), getattr(after.held, name)
        if now > was + most:
            found.append(f"{name} in use went from {was} to {now}")
    if after.held.garbage > GARBAGE_MAX:
        found.append(f"{after.held.garbage} objects waited for a collection")
    return found


def judge(directory: Path, number: int, truth: Truth, last: int, outcome: Outcome) -> None:
    """Run the checkers on every watch of a wave, and on the acknowledged writes. Keeps the records with violations."""
    identities = {(change.mod_revision, change.key) for change in truth.changes}
    for kind in KINDS:
        summary = msgspec.json.decode((directory / f"{kind}.json").read_bytes(), type=Summary)
        outcome.endings.update(summary.endings)
        outcome.calls.update(summary.calls)
        outcome.violations += [f"wave {number}, {kind}: {fault}" for fault in summary.faults]
        outcome.acknowledged += len(summary.acknowledged)
        for revision, key in summary.acknowledged:
            if (revision, key.encode() if isinstance(key, str) else key) not in identities:
                outcome.violations.append(f"wave {number}: acknowledged put of {key!r} at {revision} is not there")
        path = directory / f"{kind}.spool"
        found = len(outcome.violations)
        for life in spool.read(path):
            _judge_life(life, truth, last, f"wave {number}, {kind}", outcome)
        if len(outcome.violations) == found:
            path.unlink()


def _judge_life(life: spool.Life, truth: Truth, last: int, where: str, outcome: Outcome) -> None:
    outcome.watches += 1
    outcome.events += life.events
    records = life.log.records
    outcome.resumed += sum(isinstance(record, Opened) for record in records[1:])
    outcome.compacted += sum(isinstance(record, Canceled) and record.compact_revision > 0 for record in records)
    outcome.fragments += sum(isinstance(record, Received) and record.fragment for record in records)
    outcome.bookmarks += sum(isinstance(record, Bookmark) for record in records)
    found = check(life.log, truth, None if life.left else last, safe_headers=True)
    asked = life.log.asked
    outcome.violations += [f"{where}, {asked}, {records[0]}: {violation}" for violation in found]
