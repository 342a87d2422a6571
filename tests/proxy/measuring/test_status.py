"""`watchmux status`: its exit code, and its live table while the proxy does not answer."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from proxy.admin.snapshot import Snapshot
from proxy.cli.group import run
from proxy.measuring import status
from proxy.measuring.load.target import Access
from tests.proxy_process import ProxyProcess
from tests.waiting import until


class Over(Exception):
    """The story is over."""


def test_the_exit_code_says_whether_the_proxy_serves(capsys: pytest.CaptureFixture[str]) -> None:
    with ProxyProcess("127.0.0.1:1") as proxy:
        address = f"127.0.0.1:{proxy.metrics_port}"
        assert run(["status", address]) == 1
        assert "not serving" in capsys.readouterr().out
        assert run(["status", address, "--json"]) == 1
    with ProxyProcess("") as proxy:
        until(lambda: proxy.metric("watchmux_upstream_reachable") == 1, "its store")
        assert run(["status", f"127.0.0.1:{proxy.metrics_port}"]) == 0


def test_a_failed_poll_does_not_end_the_live_table(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Snapshot(version="1.2.3", serving=True, uptime_s=1.0)
    answers: Iterator[Snapshot | Exception] = iter(
        [snapshot, status.NoStatus("gone"), status.NoStatus("gone"), snapshot]
    )
    titles: list[str] = []

    async def fetch(*_: Any) -> Snapshot:
        answer = next(answers, Over())
        if isinstance(answer, Exception):
            raise answer
        return answer

    def render(*arguments: Any, **named: Any) -> Any:
        table = shown(*arguments, **named)
        titles.append(str(table.title))
        return table

    shown = status.render
    monkeypatch.setattr(status, "fetch", fetch)
    monkeypatch.setattr(status, "render", render)
    monkeypatch.setattr(status, "REFRESH_S", 0.0)
    with pytest.raises(Over):
        asyncio.run(status.show_live("http://a:1", Console(file=io.StringIO()), Access()))
    assert ["STALE: 0s old; gone" in title for title in titles] == [False, True, True, False]


def test_no_watches_are_no_reduction() -> None:
    output = io.StringIO()
    Console(file=output, width=120).print(status.render(Snapshot(watches=0, trunks=3)))
    assert "0.0x" not in output.getvalue()
