"""One process of several, as its parent drives it."""

from __future__ import annotations

import asyncio
import base64
import pickle
import socket
from dataclasses import replace

import msgspec
import pytest

from proxy.admin.aggregate import ParentMessage
from proxy.admin.monitor import Monitor
from proxy.config.knobs import Settings
from proxy.listening.sockets import Listening
from proxy.process.child import Parent
from proxy.process.member import ProcessPlace, ReportingProcess
from proxy.process.reloading import Reloading
from tests.e2e.running import proxy_for
from tests.waiting import until_async


async def test_settings_that_arrive_during_the_start_are_applied() -> None:
    settings = Settings()
    changed = replace(settings, watch=replace(settings.watch, watches_max=7))
    message = ParentMessage(settings=base64.b64encode(pickle.dumps(changed)).decode())
    applied: list[Settings] = []
    process = ReportingProcess(ProcessPlace("worker-1", Listening([])))
    process.came(msgspec.json.encode(message))
    assert not applied
    async with proxy_for("127.0.0.1:1") as proxy:
        process.start(proxy, Parent(None), Reloading(settings, applied.append), Monitor(proxy, "here:1"))
        assert applied == [changed]
        process.stop()


async def test_a_stopped_parent_gets_no_more_reports() -> None:
    """They would fill the memory of the processes; the parent kills none of them, and may go on later."""
    ours, theirs = socket.socketpair()
    process = ReportingProcess(ProcessPlace("worker-1", Listening([])))
    async with proxy_for("127.0.0.1:1") as proxy:
        parent = await Parent.join(theirs.detach(), process.came, lambda: None)
        parent.write_line("x" * (1 << 22))
        unsent = parent.unsent_bytes
        assert unsent
        process.start(proxy, parent, Reloading(Settings(), lambda _: None), Monitor(proxy, "here:1"))
        for _ in range(5):
            await asyncio.sleep(0)
            proxy.health.on_change()
            assert parent.unsent_bytes == unsent
        process.stop()
        ours.close()
        await parent.leave()


@pytest.mark.parametrize("turns", range(4))
async def test_a_process_that_leaves_right_after_news_reports_no_more(turns: int) -> None:
    process = ReportingProcess(ProcessPlace("worker-1", Listening([])))
    async with proxy_for("127.0.0.1:1") as proxy:
        process.start(proxy, Parent(None), Reloading(Settings(), lambda _: None), Monitor(proxy, "here:1"))
        reports = process._report_task
        assert reports is not None
        await until_async(lambda: proxy.health.on_change == process._news.set and not process._news.is_set(), "a try")
        proxy.health.on_change()
        for _ in range(turns):
            await asyncio.sleep(0)
        process.stop()
        await asyncio.wait([reports], timeout=5)
        assert reports.cancelled()
