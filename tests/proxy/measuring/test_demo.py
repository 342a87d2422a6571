"""The demo: faultless on the bundled store and on a real etcd, bounded and honest when something breaks."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from proxy.cli import demo as cli_demo
from proxy.cli.group import run
from proxy.cli.load import shape_of
from proxy.measuring.demo import DemoResult, run_demo, show_result
from proxy.measuring.load.judge import RunVerdict
from proxy.measuring.load.plan import LoadShape
from proxy.measuring.load.prometheus import ServingCost
from proxy.measuring.load.stage import LoadStage
from proxy.measuring.load.trial import Trial
from tests.etcd.server import EtcdServer
from tests.waiting import until
from upstream.watching.stream import StreamKind
from upstream.watching.streams import STREAMS_MAX

SMALL = "--watches=60 --ranges=5 --streams=12 --seconds=0.5".split()  # noqa: SIM905 - as one types it


def test_the_bundled_store_serves_one_watcher_for_each_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", *SMALL]) == 0
    text = capsys.readouterr().out
    assert "Every one of the 60 histories equals the store's." in text
    assert "12x" in text


def test_a_real_etcd_counts_one_watcher_for_each_range(etcd: EtcdServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", *SMALL, f"--endpoints={etcd.endpoint}", "--json"]) == 0
    result = msgspec.json.decode(capsys.readouterr().out, type=DemoResult)
    assert result.faultless
    assert result.trial.watchers == 5
    # One for the live watches of all clients, and a few backfills.
    assert 1 <= result.trial.watch_streams <= 1 + STREAMS_MAX[StreamKind.CATCH_UP]
    assert result.trial.verdict.watches == 60
    assert result.trial.verdict.events > 300
    assert result.trial.lists == 12
    assert 1 <= result.trial.list_ranges <= 12, "identical lists in flight share one"
    # The demo's clients and proxy are gone, and so are its keys.
    until(lambda: etcd.watchers() == 0, "etcd to have no watchers of the demo")
    assert etcd.ctl("get", "", "--prefix", "--keys-only").stdout.strip() == ""


@pytest.mark.long  # `measure` with a cover runs in `make test`
def test_unique_keys_below_a_cover_cost_one_watcher(etcd: EtcdServer, capsys: pytest.CaptureFixture[str]) -> None:
    """One cover with prev_kv, and perhaps one without, whose watches have not moved to the first yet."""
    assert run(["demo", *SMALL, "--cover", f"--endpoints={etcd.endpoint}", "--json"]) == 0
    result = msgspec.json.decode(capsys.readouterr().out, type=DemoResult)
    assert result.faultless
    assert result.trial.verdict.watches == 60
    assert result.trial.watchers in (1, 2)


class KillWhileWriting:
    """Shows nothing, and kills the proxy of a stage when the writes begin."""

    def __init__(self, stage: LoadStage) -> None:
        self._stage = stage

    def step(self, text: str, total: float) -> None:
        assert total > 0
        if text == "Writing":
            proxy = self._stage.children[1]
            asyncio.get_running_loop().call_later(0.3, os.kill, proxy.pid, signal.SIGKILL)

    def at(self, value: float, text: str = "") -> None:
        del value, text

    def warn(self, text: str) -> None:
        del text


def test_a_proxy_that_dies_is_a_fault_and_not_a_hang() -> None:
    async def broken() -> DemoResult:
        async with LoadStage() as stage:
            shape = shape_of(watches=60, ranges=5, streams=12, pause_s=0.2)
            return await run_demo(stage, shape, 1.0, KillWhileWriting(stage))

    result = asyncio.run(broken())
    assert not result.faultless
    assert result.trial.verdict.lost
    assert any("UNAVAILABLE" in text for text in result.trial.complaints)


def test_interrupting_it_leaves_nothing_behind() -> None:
    demo = subprocess.Popen(
        [sys.executable, "-m", "proxy.cli", "demo", *SMALL, "--seconds=60"], stderr=subprocess.PIPE, text=True
    )
    try:
        children = until(
            lambda: found if len(found := _children(demo.pid)) >= 3 else None, "its processes to start", 60
        )
        demo.send_signal(signal.SIGINT)
        _, errors = demo.communicate(timeout=60)
    finally:
        demo.kill()
        demo.wait(10)
    assert demo.returncode == 130
    assert errors.strip().splitlines()[-1] == "watchmux: interrupted"
    assert not [pid for pid in children or [] if Path(f"/proc/{pid}").exists()]


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(number) for number in text.split()]


def result_with(verdict: RunVerdict, complaints: list[str]) -> DemoResult:
    cost = ServingCost(
        watchers=0, watch_streams=0, slow_watchers=0, events_sent=0, bytes_sent=0, cpu_s=None, memory_bytes=None
    )
    trial = Trial(
        before=cost,
        watching=cost,
        after=cost,
        verdict=verdict,
        written=1,
        opened_s=0.1,
        complaints=complaints,
    )
    shape = LoadShape(watches=60, ranges=5, streams=12)
    return DemoResult(trial=trial, shape=shape, seconds=1.0, upstream_name="the bundled store")


@pytest.mark.parametrize(
    ("verdict", "complaints", "shown"),
    [
        (RunVerdict(lost=3, examples=["reliable: b'a' is missing"]), [], "reliable: b'a' is missing"),
        (RunVerdict(duplicated=1), [], "duplicated"),
        (RunVerdict(out_of_order=1), [], "out of order"),
        (RunVerdict(wrong=1), [], "otherwise wrong"),
        (RunVerdict(), ["a stream ended: UNAVAILABLE: gone"], "a stream ended: UNAVAILABLE: gone"),
    ],
)
def test_any_fault_is_shown_and_is_exit_code_1(
    verdict: RunVerdict, complaints: list[str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = result_with(verdict, complaints)
    output = io.StringIO()
    show_result(result, Console(file=output, width=120))
    assert shown in output.getvalue()
    assert "are not what the store's history says" in output.getvalue()

    async def pretend(*_arguments: object) -> DemoResult:
        return result

    monkeypatch.setattr("proxy.measuring.demo.run_demo", pretend)
    monkeypatch.setattr(LoadStage, "_start_store", lambda _stage: asyncio.sleep(0))
    assert run(["demo", *SMALL]) == 1


def test_the_json_says_everything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def pretend(*_arguments: object) -> DemoResult:
        return result_with(RunVerdict(watches=60), [])

    monkeypatch.setattr("proxy.measuring.demo.run_demo", pretend)
    monkeypatch.setattr(LoadStage, "_start_store", lambda _stage: asyncio.sleep(0))
    assert cli_demo.command.main([*SMALL, "--json"], standalone_mode=False) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trial"]["verdict"]["watches"] == 60
