"""The soak itself: it can fail, its checks are right, and a short soak finds nothing."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import msgspec
import pytest

from coalesce.guarantees.checkers import PUT, Change, Truth
from proto.pb import kv_pb2, rpc_pb2
from tests.e2e.running import direct, proxy_for
from tests.e2e.scenario import run
from tests.etcd.server import EtcdServer
from tests.soak import callers, client, report, spool
from tests.soak.client import KINDS, Clients, Summary
from tests.soak.faults import COVERS_CHANGED
from tests.soak.run import EMPTY, NOT_WATCHED, SHARES, Outcome, judge, leaks, soak
from tests.soak.sampling import INSIDE, Held, Sample
from tests.soak.watcher import CHANNEL, WRITE_FAILED, Habits, Seen, Stream
from tests.waiting import until_async

LAST = 6
CHANGES = [Change(PUT, b"/s/a/01", b"%d" % number, 2, number, number - 1, 0) for number in range(2, LAST + 1)]


def response(change: Change) -> bytes:
    """Return the response with one event."""
    kv = kv_pb2.KeyValue(
        key=change.key,
        value=change.value,
        create_revision=change.create_revision,
        mod_revision=change.mod_revision,
        version=change.version,
    )
    header = rpc_pb2.ResponseHeader(revision=change.mod_revision)
    return rpc_pb2.WatchResponse(header=header, events=[kv_pb2.Event(kv=kv)]).SerializeToString()


def judged(directory: Path, got: list[Change], acknowledged: list[tuple[int, bytes]], fault: str = "") -> Outcome:
    """Check a wave with one watch that got these changes."""
    for kind in KINDS:
        records = spool.Spool(directory / f"{kind}.spool")
        if kind == "steady":
            number = records.plan(spool.WatchPlan(b"/s/", b"/s/e"))
            records.note(number, spool.Kind.OPENED, b"2")
            created = rpc_pb2.WatchResponse(header=rpc_pb2.ResponseHeader(revision=LAST), created=True)
            records.note(number, spool.Kind.RESPONSE, created.SerializeToString())
            for change in got:
                records.note(number, spool.Kind.RESPONSE, response(change))
        records.close()
        summary = Summary({}, {}, [fault] if fault else [], acknowledged if kind == "callers" else [])
        (directory / f"{kind}.json").write_bytes(msgspec.json.encode(summary))
    outcome = Outcome(0)
    judge(directory, 0, Truth(CHANGES), LAST, outcome)
    return outcome


def test_a_good_wave_has_no_violations(tmp_path: Path) -> None:
    outcome = judged(tmp_path, CHANGES, [(3, b"/s/a/01")])
    assert not list(tmp_path.glob("*.spool"))
    assert (outcome.violations, outcome.events, outcome.watches) == ([], len(CHANGES), 1)


@pytest.mark.parametrize(
    ("got", "guarantee"),
    [
        (CHANGES[:2] + CHANGES[3:], "reliable"),
        (CHANGES[:-1], "resumable"),
        ([*CHANGES, CHANGES[-1]], "unique"),
        ([CHANGES[0]._replace(value=b"wrong"), *CHANGES[1:]], "matching"),
    ],
    ids=["a gap", "the last one missing", "one twice", "another value"],
)
def test_each_violation_is_found(tmp_path: Path, got: list[Change], guarantee: str) -> None:
    assert any(guarantee in violation for violation in judged(tmp_path, got, []).violations)
    # The records are kept, to find the cause.
    assert [path.name for path in tmp_path.glob("*.spool")] == ["steady.spool"]


def test_lost_writes_and_client_faults_are_violations(tmp_path: Path) -> None:
    outcome = judged(tmp_path, CHANGES, [(3, b"/s/a/01"), (4, b"/s/b/01")], "a stream ended INTERNAL")
    assert sum("acknowledged put" in violation for violation in outcome.violations) == 1
    assert sum("INTERNAL" in violation for violation in outcome.violations) == len(KINDS)


def stream_of(clients: Clients, channel: grpc.aio.Channel, *keys: bytes) -> Stream:
    """Add a stream with a watch from now of each key; it requests progress every few hundredths of a second."""
    plans = iter([spool.WatchPlan(key) for key in keys])
    stream = Stream(channel, clients._spool, clients._seen, Habits(turn_s=0.05), lambda: next(plans))
    for _ in keys:
        stream.add()
    clients.streams.append(stream)
    return stream


@pytest.mark.parametrize(("text", "faults"), [(WRITE_FAILED, 0), (f"x ({callers.ANSWER_BROKEN})", 0), ("a bug", 1)])
def test_a_write_on_a_broken_connection_is_no_fault(text: str, faults: int) -> None:
    """grpc.aio reports INTERNAL for it, also to callers that keep a lease alive."""

    async def broken(caller: callers.Caller) -> None:
        caller.stopping = True
        metadata = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, metadata, metadata, details=text)

    async def scenario() -> int:
        seen = Seen()
        async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
            await callers.Caller(channel, seen, Counter()).run(broken, 0.0)
        return len(seen.faults)

    assert run(scenario()) == faults


@pytest.mark.parametrize("proxied", [False, True], ids=["etcd itself", "watchmux"])
def test_a_stream_resumed_above_the_newest_revision_waits(etcd: EtcdServer, tmp_path: Path, proxied: bool) -> None:
    async def scenario(endpoint: str) -> None:
        clients = Clients("narrow", endpoint, tmp_path)
        async with direct(etcd) as store, grpc.aio.insecure_channel(endpoint, options=CHANNEL) as channel:
            stream = stream_of(clients, channel, b"/s/a/00", b"/s/c/00")
            busy, quiet = stream.watches
            clients._tasks.append(asyncio.create_task(stream.run()))
            await until_async(lambda: busy.next_revision and quiet.next_revision, "two watches")
            revision = await store.put(b"/s/a/00", b"the newest")
            await until_async(lambda: busy.next_revision > revision, "the event")
            stream._call.cancel()
            await until_async(lambda: busy.start_revision > revision and len(stream._by_id) == 2, "both watches again")
            assert not await clients.settle(revision)
            await until_async(lambda: stream.asked >= 5, "requests for progress")
            assert (stream.told, quiet.next_revision <= revision) == ([], True)
            newer = await store.put(NOT_WATCHED, b"")
            assert await clients.settle(newer)
            assert stream.told[0] == newer
            await clients.leave()
        assert clients._seen.faults == []

    async def through_a_proxy() -> None:
        async with proxy_for(etcd) as proxy:
            await scenario(f"127.0.0.1:{proxy.port}")

    run(through_a_proxy() if proxied else scenario(etcd.endpoint))


def test_missing_progress_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> list[str]:
        clients = Clients("narrow", "", tmp_path)
        async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
            for starts in ((LAST, LAST), (LAST + 1, LAST)):
                stream = stream_of(clients, channel, b"/s/a/00", b"/s/c/00")
                for watch, start in zip(stream.watches, starts, strict=True):
                    watch.start_revision = watch.next_revision = start
            # etcd would send nothing on the second, but on the first.
            assert await clients.settle(LAST)
            await clients.leave()
        return clients._seen.faults

    monkeypatch.setattr(client, "SETTLE_S", 0.0)
    faults = run(scenario())
    assert [f"needing [({LAST}, {LAST}), ({LAST}, {LAST})]" in fault for fault in faults] == [True]


@dataclass
class Rest:
    """The figures of a proxy at rest."""

    memory_mib: int = 60
    descriptors: int = 17
    threads: int = 5
    watches: int = 0
    pid: int = 2
    objects: int = 52_000
    blocks: int = 210_000
    malloc_mib: float = 11.0
    garbage: int = 5_000

    def sample(self) -> Sample:
        """Return a sample with these figures."""
        gauges = dict.fromkeys(EMPTY, 0.0) | {"watches": float(self.watches)}
        held = Held(self.garbage, self.objects, self.blocks, int(self.malloc_mib * 2**20))
        memory = self.memory_mib << 20
        return Sample(0.0, self.pid, memory, self.descriptors, self.threads, 1.0, gauges=gauges, held=held)


FIRST = [Rest(50, pid=1), Rest(75, pid=1), Rest(50)]
"""Rests before the first wave that is compared: another process, then a new one."""


@pytest.mark.parametrize(
    ("waves", "leak"),
    [
        ([Rest(), Rest(), Rest()], ""),
        # As measured: the allocators keep freed memory.
        ([Rest(58), Rest(68), Rest(80, objects=52_400, blocks=210_900, malloc_mib=11.2)], ""),
        # One-time allocations of any kind are done by the second wave.
        ([Rest(90, objects=90_000, blocks=400_000, malloc_mib=40)] * 3, ""),
        ([Rest(58), Rest(58), Rest(59, objects=56_000)], "objects in use went from 52000 to 56000"),
        ([Rest(58), Rest(58), Rest(58, blocks=217_000)], "blocks in use"),
        ([Rest(58), Rest(59), Rest(60, malloc_mib=12.5)], "malloc_bytes in use"),
        ([Rest(58), Rest(70), Rest(83)], "resident memory went from 58 to 83"),
        ([Rest(), Rest(), Rest(garbage=60_000)], "waited for a collection"),
        ([Rest(), Rest(), Rest(descriptors=21)], "descriptors went"),
        ([Rest(), Rest(), Rest(threads=6)], "threads went"),
        ([Rest(), Rest(), Rest(watches=1)], "holds"),
        ([Rest(), Rest(), Rest(pid=3)], "did not live"),
    ],
)
def test_leaks_are_reported(waves: list[Rest], leak: str) -> None:
    assert len(waves) == len(SHARES) - 1
    found = leaks([each.sample() for each in [*FIRST, *waves]])
    assert [leak in each for each in found] == [True] * bool(leak)


def test_the_report_lists_what_has_grown() -> None:
    rests = [each.sample() for each in (*FIRST, Rest(), Rest(), Rest())]
    for rest, count in zip(rests, (900, 1, 1, 5, 7, 9), strict=True):
        assert rest.held is not None
        rest.held.census = {"Slot[list] > Connections": count, "Pool > Slot": 1}
    assert report.grown(rests) == {"Slot[list] > Connections": 4}
    assert report.grown(rests[:3]) == {}


def test_the_census_names_types_and_holders() -> None:
    """In a process of its own, as in the proxy: it walks everything."""
    code = (
        "import runpy, sys\n"
        "class Pool: pass\n"
        "class Slot: pass\n"
        "pool = Pool()\n"
        "pool.slots = [Slot() for _ in range(3)]\n"
        "print(runpy.run_path(sys.argv[1])['census']()['Pool[list] > Slot'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(INSIDE / "sitecustomize.py")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "3", done


def test_the_report_lists_the_findings(tmp_path: Path) -> None:
    outcome = Outcome(7, 1200.0, violations=["wave 1, steady: a gap"], rests=[each.sample() for each in FIRST])
    outcome.faults.update({"etcd compacted": 3})
    outcome.leaks = ["objects in use went from 1 to 2"]
    told = report.write(outcome, tmp_path / "out")
    (tmp_path / "images").mkdir()
    report.write_docs(outcome, tmp_path)
    for text in (told, (tmp_path / "out/report.md").read_text(), (tmp_path / "evidence/soak.md").read_text()):
        assert "20.0 minutes, seed 7" in text
        assert "Violations: 1. Leaks: 1." in text
        assert "- wave 1, steady: a gap" in text
        assert "- objects in use went from 1 to 2" in text
        assert "| etcd compacted | 3 |" in text
        assert text.count("| 11.0 | 52000 | 210000 | 5000 |") == len(FIRST)


def test_leaks_are_those_of_each_process_that_lived() -> None:
    def whole(growth: int, pid: int) -> Sample:
        sample = Rest().sample()
        sample.processes = {"hub": Rest(objects=52_000 + growth).sample(), "worker-1": Rest(pid=pid).sample()}
        return sample

    rests = [*[whole(0, 7)] * (len(SHARES) + 1), whole(4_000, 8)]
    assert leaks(rests, {7}) == ["hub: objects in use went from 52000 to 56000"]
    assert "worker-1: the proxy did not live from one rest to the next" in leaks(rests)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_short_soak_finds_no_violation_and_no_leak(tmp_path: Path) -> None:
    outcome = run(soak(1.0, 3, tmp_path / "made"), 380)
    print(report.write(outcome, tmp_path / "out"))  # noqa: T201 - shown when it fails
    assert outcome.violations == []
    assert outcome.leaks == []
    assert sum(outcome.faults.values()) >= 5
    assert outcome.faults[COVERS_CHANGED] >= len(SHARES)
    assert any(name.startswith("cover_events_total") for name in report.went_through(outcome.samples))
    assert outcome.events > 10_000
    assert (tmp_path / "out/samples.json").exists()


@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_short_soak_with_workers(tmp_path: Path) -> None:
    outcome = run(soak(1.5, 3, tmp_path / "made", "killed", workers=2, spared="worker"), 480)
    print(report.write(outcome, tmp_path / "out"))  # noqa: T201 - shown when it fails
    assert (outcome.violations, outcome.leaks) == ([], [])
    assert outcome.faults["hub killed"] + outcome.faults["worker killed"] >= 3
