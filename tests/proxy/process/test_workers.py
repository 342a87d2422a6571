"""--workers: several processes that are one proxy, with real processes and a real etcd."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from coalesce.limits import CoreLimits
from proxy.admin.aggregate import (
    MAXIMA,
    OF_ALL,
    OF_THE_HUB,
    AllProcesses,
    ParentMessage,
    ProcessReport,
    merged,
    with_ended,
)
from proxy.admin.snapshot import CoverState, Snapshot
from proxy.config.knobs import Settings
from proxy.process import shares
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct
from tests.e2e.scenario import run
from tests.etcd.server import HOST, EtcdServer
from tests.faults.scene import PREFIX, PREFIX_END, Writer, reached
from tests.proxy_process import ProxyProcess
from tests.waiting import until, until_async

WATCHERS = "etcd_debugging_mvcc_watcher_total"


@pytest.fixture
def served(etcd: EtcdServer, tmp_path: Path) -> Iterator[ProxyProcess]:
    """A proxy with two workers."""
    files = {"TMPDIR": str(tmp_path)}
    with ProxyProcess(etcd.endpoint, ["--workers=2", "--drain=1s"], files) as proxy:
        until(lambda: len(proxy.processes()) == 3, "all processes")
        yield proxy


async def test_workers_share_one_upstream_watch_and_one_page(etcd: EtcdServer, served: ProxyProcess) -> None:
    clients = [await RawClient.connect(served.port) for _ in range(24)]
    streams = [await client.open_watch(PREFIX, PREFIX_END) for client in clients]
    async with direct(etcd) as calls:
        revision = await calls.put(PREFIX + b"1", b"1")
    for stream in streams:
        assert (await stream.next()).events[0].kv.mod_revision == revision
    assert etcd.metrics()[WATCHERS] == 1
    await until_async(lambda: served.overview()["now"]["events_delivered_total"] == 24, "the sums")
    shown = served.overview()
    assert shown["now"]["watches"] == shown["now"]["connections"] == 24
    assert shown["now"]["trunks"] == 1
    await until_async(
        lambda: [trunk["watches"] for trunk in served.overview()["trunks"]] == [24], "the watches of the range"
    )
    assert shown["now"]["serving"]
    assert served.process is not None
    parent = served.process.pid
    usual = _samples(ProcessCollector(pid=lambda: parent, registry=CollectorRegistry()).collect())
    page = await asyncio.to_thread(_page, f"http://{HOST}:{served.metrics_port}/metrics")
    exported = _samples(text_string_to_metric_families(page))
    assert [name for name in usual if not exported.get(name)] == []
    assert exported["process_start_time_seconds"] == usual["process_start_time_seconds"]
    shares = {each["name"]: each["watches"] for each in shown["processes"]}
    assert shares["worker-1"] + shares["worker-2"] == 24
    # Connections that closed since the last report still count for a worker.
    assert min(shares["worker-1"], shares["worker-2"]) >= 6
    for client in clients:
        await client.close()


def _page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def _samples(families: Iterable[Metric]) -> dict[str, float]:
    return {sample.name: sample.value for family in families for sample in family.samples}


@pytest.mark.long
async def test_500_watches_of_four_workers_are_one_at_etcd(etcd: EtcdServer) -> None:
    with ProxyProcess(etcd.endpoint, ["--workers=4", "--drain=1s"]) as proxy:
        until(lambda: len(proxy.processes()) == 5, "all processes")
        clients = [await RawClient.connect(proxy.port) for _ in range(500)]
        streams = [await client.open_watch(PREFIX, PREFIX_END) for client in clients]
        assert etcd.metrics()[WATCHERS] == 1
        async with direct(etcd) as calls:
            revision = await calls.put(PREFIX + b"1", b"1")
        for stream in streams:
            assert (await stream.next()).events[0].kv.mod_revision == revision
        await until_async(lambda: proxy.overview()["now"]["watches"] == 500, "the sums")
        parts = [each["watches"] for each in proxy.overview()["processes"] if each["name"] != "hub"]
        assert sum(parts) == 500
        assert min(parts) >= 120
        for client in clients:
            await client.close()


class Counters(threading.Thread):
    """Reads the counters of a page all the time, and finds those that fall."""

    def __init__(self, port: int, path: str) -> None:
        super().__init__(daemon=True)
        self.seen: dict[tuple[str, str], float] = {}
        """The last value by name and labels."""
        self._url = f"http://{HOST}:{port}{path}"
        self._falls: list[str] = []
        self._stopped = threading.Event()
        self._read()
        self.start()

    def stop(self) -> list[str]:
        """Read once more; return what has fallen."""
        self._stopped.set()
        self.join()
        self._read()
        return self._falls

    def run(self) -> None:
        while not self._stopped.wait(0.05):
            # A process that is killed breaks its connections.
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._read()

    def _read(self) -> None:
        families = text_string_to_metric_families(_page(self._url))
        for family in families:
            for sample in family.samples if family.type in ("counter", "histogram") else ():
                key = sample.name, " ".join(sample.labels.values())
                if sample.value < self.seen.get(key, 0):
                    self._falls.append(f"{key}: {self.seen[key]} to {sample.value}")
                self.seen[key] = sample.value


def test_killed_processes_are_replaced_and_no_event_is_lost(etcd: EtcdServer, served: ProxyProcess) -> None:
    async def scenario() -> None:
        writer = Writer(etcd.endpoint, 0.005)
        await writer.more(5)
        clients = [await RawClient.connect(served.port) for _ in range(8)]
        streams = [await client.open_watch(PREFIX, PREFIX_END, 1) for client in clients]
        before = served.processes()
        falls = [Counters(served.metrics_port, "/metrics"), Counters(served.port, "/proxy/metrics")]
        os.kill(before["hub"], signal.SIGKILL)
        await writer.more(20)
        await until_async(lambda: served.processes().get("hub") not in (None, before["hub"]), "another hub")
        await writer.more(20)
        # The workers carry their clients over.
        for stream in streams:
            await until_async(lambda s=stream: reached(s, writer.last), "the newest event")  # type: ignore[misc]
            assert not stream.raw.over
        delivered = served.overview()["now"]["events_delivered_total"]
        os.kill(before["worker-1"], signal.SIGKILL)
        await until_async(lambda: served.processes().get("worker-1") not in (None, before["worker-1"]), "a worker")
        assert served.overview()["now"]["events_delivered_total"] >= delivered
        for stream in streams:
            if stream.raw.over:
                continue
            await until_async(lambda s=stream: reached(s, writer.last), "the newest event")  # type: ignore[misc]
        async with await RawClient.connect(served.port) as client:
            again = await client.open_watch(PREFIX, PREFIX_END, 1)
            await until_async(lambda: reached(again, writer.last), "everything from the beginning")
        last = await writer.stop()
        assert last
        for counters in falls:
            assert await asyncio.to_thread(counters.stop) == []
            assert counters.seen["watchmux_process_cpu_seconds_total", "worker-1"] > 0
            assert counters.seen["process_cpu_seconds_total", ""] > 0
        for client in clients:
            await client.close()

    run(scenario())
    assert "process restarted" in served.log()


def test_a_signal_drains_all_processes(served: ProxyProcess) -> None:
    pids = served.processes().values()
    assert served.stop() == 0
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert served.log().count('"msg": "stopped"') == 4


def test_all_processes_end_with_the_parent(served: ProxyProcess, tmp_path: Path) -> None:
    """Also one that hangs; the parent can be started again at once, and leaves no files."""
    before = served.processes()
    os.kill(before["worker-1"], signal.SIGSTOP)
    served.kill()
    assert not list(tmp_path.iterdir())
    served.start()
    until(lambda: not [pid for pid in before.values() if _runs(pid)], "all processes to end")
    until(lambda: len(served.processes()) == 3, "all processes")


def _runs(pid: int) -> bool:
    """Whether a process runs: one that nobody waits for counts as ended."""
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--workers=2"], "--workers needs --endpoints"),
        (
            ["--workers=2", "--endpoints=127.0.0.1:1", f"--cert-file={__file__}", f"--key-file={__file__}"],
            "certificate",
        ),
        (["--workers=-1"], "workers"),
    ],
)
def test_a_start_that_cannot_work_is_one_clear_error(flags: list[str], error: str) -> None:
    command = [sys.executable, "-m", "proxy.cli", "serve", "--listen-addr=127.0.0.1:0", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode != 0
    errors = [line for line in ended.stderr.splitlines() if line.startswith("watchmux: ")]
    assert len(errors) == 1
    assert error in errors[0]
    assert "Traceback" not in ended.stderr


def test_an_address_in_use_is_not_shared_with_others(served: ProxyProcess) -> None:
    command = [sys.executable, "-m", "proxy.cli", "serve", "--workers=2", f"--listen-addr={served.endpoint}"]
    ended = subprocess.run(
        [*command, "--endpoints=127.0.0.1:1"], capture_output=True, text=True, timeout=30, check=False
    )
    assert ended.returncode != 0
    assert "it is in use" in ended.stderr


def test_a_unix_socket_is_shared_by_all_workers(etcd: EtcdServer, tmp_path: Path) -> None:
    path = tmp_path / "clients"
    command = [sys.executable, "-m", "proxy.cli", "serve", "--workers=2", f"--listen-addr=unix://{path}"]
    proxy = subprocess.Popen([*command, f"--endpoints={etcd.endpoint}"], stderr=subprocess.DEVNULL)
    try:
        until(path.exists, "the socket")
        ctl = subprocess.run(
            [str(etcd.binary.etcdctl), f"--endpoints=unix://{path}", "--command-timeout=15s", "put", "a", "b"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            env={**os.environ, "ETCDCTL_API": "3"},
        )
        assert ctl.stdout == "OK\n"
        proxy.terminate()
        assert proxy.wait(20) == 0
        assert not path.exists()
    finally:
        proxy.kill()
        proxy.wait()


def test_limits_of_the_whole_are_divided() -> None:
    settings = Settings()
    one, hub = shares.worker_settings(settings, 4, "http+unix:///h"), shares.hub_settings(settings, 4, "/h")
    assert one.watch.watches_max == CoreLimits().watches_max * 3 // 10
    assert one.listener.connections_max == 6000
    assert one.watch.trunks_max == CoreLimits().trunks_max
    memory = 4 * one.watch.history_bytes_total_max + hub.watch.history_bytes_total_max
    assert CoreLimits().history_bytes_total_max - 5 < memory <= CoreLimits().history_bytes_total_max
    assert hub.watch.watches_per_session_max > one.watch.trunks_max


def test_sums_are_of_workers_and_never_decrease() -> None:
    names = {field.name for field in fields(Snapshot)}
    assert names >= OF_THE_HUB | MAXIMA | OF_ALL
    hub = Snapshot(address="unix:///hub", watches=2, trunks=1, events_received_total=5, probes_total=3, lagging_s=9.0)
    parts = [Snapshot(address=":1", watches=n, trunks=7, calls_total=n, probes_total=1, lagging_s=n) for n in (3, 4)]
    whole = merged(hub, parts)
    assert (whole.watches, whole.trunks, whole.events_received_total, whole.calls_total) == (7, 1, 5, 7)
    # Probes as creates, which include them: those of the workers.
    assert (whole.probes_total, whole.lagging_s, whole.address) == (2, 4, ":1")
    ended = None
    for part in parts:
        part.refusals_total = {"watches_max": 1}
        ended = with_ended(ended, _report("worker-1", part))
    assert ended is not None
    left = merged(hub, [ended.snapshot])
    assert (left.watches, left.calls_total, left.refusals_total) == (0, 7, {"watches_max": 2})
    assert ended.delivery_counts == [2]


def _report(name: str, snapshot: Snapshot) -> ProcessReport:
    return ProcessReport(name=name, pid=1, cpu_s=1, memory_bytes=1, snapshot=snapshot, delivery_counts=[1])


def test_a_new_hub_continues_the_counters_of_the_last_one() -> None:
    of_hub, of_worker = Snapshot(events_received_total=5), Snapshot(calls_total=2)
    known = AllProcesses([_raw("hub", of_hub), _raw("worker-1", of_worker)])
    # What the hub has counted since is shown when the parent has it.
    assert known.snapshot(Snapshot(events_received_total=6)).events_received_total == 5
    after = AllProcesses([_raw("worker-1", of_worker)], {"hub": with_ended(None, _report("hub", of_hub))})
    shown = after.snapshot(Snapshot())
    assert (shown.events_received_total, shown.calls_total) == (5, 2)
    after.learn(ParentMessage(reports=[_raw("hub", Snapshot(events_received_total=1)), _raw("worker-1", of_worker)]))
    assert after.snapshot(Snapshot(events_received_total=3)).events_received_total == 6
    assert after.views()[0].cpu_s == 2


def _raw(name: str, snapshot: Snapshot) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(_report(name, snapshot)))


def test_covers_have_the_watches_of_the_workers() -> None:
    hub = Snapshot(covers=[CoverState(cover="/a/", branches=1, upstream_watches=1, events_total=9, refused_total=1)])
    parts = [
        Snapshot(covers=[CoverState(cover="/a/", branches=n, watches=n, events_total=9, unwanted_events_total=5)])
        for n in (2, 3)
    ]
    gone = with_ended(None, _report("worker-1", parts[0]))
    assert merged(hub, [gone.snapshot, *parts]).covers == [
        CoverState(
            cover="/a/",
            branches=5,
            watches=5,
            upstream_watches=1,
            events_total=27,
            unwanted_events_total=15,
            refused_total=1,
        )
    ]
