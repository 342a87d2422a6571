"""`watchmux store` as a process: durable with --data-dir, and measured by etcd's metric names."""

from __future__ import annotations

from pathlib import Path

from proxy.measuring.load.prometheus import MetricsPage
from proxy.process.child import Child, python_command
from tests.e2e.running import Etcd

COMMAND = ("store", "--listen-addr=127.0.0.1:0", "--listen-metrics-urls=http://127.0.0.1:0")


async def started(directory: Path) -> Child:
    return await Child.start("the store", python_command("proxy.cli", *COMMAND, f"--data-dir={directory}"))


async def test_written_data_survives_a_restart(tmp_path: Path) -> None:
    store = await started(tmp_path)
    revision = await Etcd(store.ready.address).put(b"greeting", b"hello")
    assert await store.stop() == 0
    store = await started(tmp_path)
    try:
        assert await Etcd(store.ready.address).revision() == revision
    finally:
        await store.stop()


async def test_its_metrics_suffice_for_a_measurement(tmp_path: Path) -> None:
    store = await started(tmp_path)
    page = MetricsPage(f"http://{store.ready.metrics}")
    try:
        cost = await page.cost()
        assert cost.cpu_s
        assert cost.memory_bytes
        assert cost.watchers == 0
    finally:
        await page.close()
        await store.stop()
