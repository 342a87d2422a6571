"""`watchmux status`: its exit code, and its live table while the proxy does not answer."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from proxy.admin.snapshot import Snapshot
from proxy.admin.views import Clients, ClientView
from proxy.cli.group import run
from proxy.measuring import status
from proxy.measuring.load.target import ConnectionFiles
from tests.proxy_process import ProxyProcess
from tests.waiting import until


class Over(Exception):
    """The story is over."""


def test_the_exit_code_says_whether_the_proxy_serves(capsys: pytest.CaptureFixture[str]) -> None:
    with ProxyProcess("127.0.0.1:1") as proxy:
        address = f"127.0.0.1:{proxy.metrics_port}"
        until(lambda: proxy.overview()["now"]["endpoint_problems"], "the proxy to try its etcd")
        assert run(["status", address]) == 1
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "not serving" in shown
        assert "endpoint unusable 127.0.0.1:1: connection refused; check that etcd runs and" in shown
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
        asyncio.run(status.show_live("http://a:1", Console(file=io.StringIO()), ConnectionFiles()))
    assert ["STALE: 0 s old; gone" in title for title in titles] == [False, True, True, False]


def printed(table: Table, width: int) -> str:
    output = io.StringIO()
    Console(file=output, width=width).print(table)
    return output.getvalue()


def test_the_clients_fit_into_60_columns() -> None:
    client = ClientView(
        peer="192.168.100.100:50000",
        user_agent="grpc-go/1.71.1",
        tls="TLSv1.3",
        age_s=4e5,
        streams=100_000,
        sessions=100_000,
        watches=1_000_000,
        lagging=1,
        behind_s=1000.0,
        behind_revisions=5,
        unsent_bytes=7,
        sent_bytes=10**10,
        received_bytes=None,
    )
    text = printed(status.render_clients(Clients(connections=1, clients=[client])), 60)
    assert "1 of 1 client connection" in text
    assert "\u2026" not in text
    for whole in (
        client.peer,
        "grpc-go/1.71.1,",
        "connected",
        "5 days",
        "1,000.0 s",
        "1,000,000",
        "9.3 GiB",
        "received",
    ):
        assert whole in text, text


def test_the_status_counts_what_clients_did() -> None:
    """The self-probes are not in it; a single thing is not in the plural."""
    now = Snapshot(sessions=1, connections=1, trunks=1, creates_total=7, creates_refused_total=5, probes_total=4)
    text = " ".join(printed(status.render(now), 120).split())
    assert "on 1 stream, 1 connection │" in text
    assert "1 trunk, 0 backfills" in text
    assert "watches opened │ 2" in text
    assert "refused │ 1" in text


def test_the_status_is_whole_on_40_columns() -> None:
    problem = "127.0.0.1:12379: connection refused"
    text = printed(status.render(Snapshot(endpoints=["127.0.0.1:12379"], endpoint_problems=[problem])), 40)
    assert "\u2026" not in text


def test_the_status_shows_certificates_that_expire() -> None:
    now = time.time()
    for expires_at, shown in ((now - 5, "expired"), (now + 2.5 * 86400, "2 days")):
        text = " ".join(printed(status.render(Snapshot(certificate_expiry_s={"listener": expires_at})), 120).split())
        assert f"certificate │ {shown} │ of --cert-file, which clients check: renew the file" in text
    assert "certificate" not in printed(status.render(Snapshot(certificate_expiry_s={"upstream": now + 8e6})), 120)


def test_no_watches_are_no_reduction() -> None:
    assert "0.0x" not in printed(status.render(Snapshot(watches=0, trunks=3)), 120)
