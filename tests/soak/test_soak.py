"""The soak itself: it can fail, its verdicts are right, and a short one finds nothing."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from coalesce.guarantees import PUT, Change, Truth
from proto.pb import kv_pb2, rpc_pb2
from tests.proxy.scenario import run
from tests.soak import report, spool
from tests.soak.client import KINDS, Summary
from tests.soak.run import EMPTY, Outcome, judge, leaks, soak
from tests.soak.sampling import Sample

LAST = 6
CHANGES = [Change(PUT, b"/s/a/01", b"%d" % number, 2, number, number - 1, 0) for number in range(2, LAST + 1)]


def response(change: Change) -> bytes:
    """The response with one event."""
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
    """Judge a wave with one watch that got these changes."""
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
def test_what_is_wrong_is_found(tmp_path: Path, got: list[Change], guarantee: str) -> None:
    assert any(guarantee in violation for violation in judged(tmp_path, got, []).violations)


def test_a_lost_write_and_a_clients_complaint_are_violations(tmp_path: Path) -> None:
    outcome = judged(tmp_path, CHANGES, [(3, b"/s/a/01"), (4, b"/s/b/01")], "a stream ended INTERNAL")
    assert sum("acknowledged put" in violation for violation in outcome.violations) == 1
    assert sum("INTERNAL" in violation for violation in outcome.violations) == len(KINDS)


def rest(memory_mib: int = 60, descriptors: int = 17, threads: int = 5, watches: int = 0, pid: int = 1) -> Sample:
    """A sample of a proxy at rest."""
    gauges = dict.fromkeys(EMPTY, 0.0) | {"watches": float(watches)}
    return Sample(0.0, pid, memory_mib << 20, descriptors, threads, 1.0, gauges=gauges)


@pytest.mark.parametrize(
    ("after", "leak"),
    [
        (rest(), ""),
        (rest(memory_mib=71), ""),
        (rest(memory_mib=73), "memory went"),
        (rest(descriptors=21), "descriptors went"),
        (rest(threads=6), "threads went"),
        (rest(watches=1), "holds"),
        (rest(pid=2), "did not live"),
    ],
)
def test_leaks_are_told(after: Sample, leak: str) -> None:
    found = leaks([rest(), after])
    assert [leak in each for each in found] == [True] * bool(leak)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_short_soak(tmp_path: Path) -> None:
    outcome = run(soak(1.0, 3, tmp_path / "made"), 380)
    print(report.write(outcome, tmp_path / "out"))  # noqa: T201 - shown when it fails
    assert outcome.violations == []
    assert outcome.leaks == []
    assert sum(outcome.faults.values()) >= 5
    assert outcome.events > 10_000
    assert (tmp_path / "out/samples.json").exists()
