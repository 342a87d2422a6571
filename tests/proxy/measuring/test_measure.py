"""The measurement: on a real etcd the reduction matches the number of ranges; the report is complete."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest
from rich.console import Console

from proxy.cli.group import run
from proxy.measuring.comparison import show_comparison
from proxy.measuring.load.plan import LoadShape
from proxy.measuring.measure import Measurement, TrialCost, compare, others_of, reduction_of
from tests.etcd.server import EtcdServer
from tests.proxy_process import ProxyProcess

SMALL = "--watches=60 --ranges=5 --streams=12 --seconds=0.5".split()  # noqa: SIM905 - as one types it


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> Measurement:
    assert run(["measure", *SMALL, "--json", *arguments]) == 0
    return msgspec.json.decode(capsys.readouterr().out, type=Measurement)


def check(found: Measurement) -> None:
    assert found.direct.faultless
    assert found.proxied.faultless
    assert found.direct.watchers == 60
    assert found.direct.watch_streams == 12
    assert found.proxied.watchers == 5
    assert found.proxied.watch_streams == 1
    assert found.reduction["watchers"] == 12.0
    assert found.reduction["watch_streams"] == 12.0
    assert found.reduction["events_sent"] == 12.0
    assert found.direct.events_received == found.proxied.events_received
    assert others_of(found.direct) == others_of(found.proxied) == ""
    bytes_factor = found.reduction["bytes_sent"]
    assert bytes_factor is not None
    assert bytes_factor > 3


def test_a_real_etcd_and_a_proxy_that_is_started(etcd: EtcdServer, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(capsys, f"--upstream={etcd.endpoint}")
    check(found)
    assert found.direct.cpu_s is not None
    assert found.direct.memory_bytes
    assert [sample.cost.watchers for sample in found.direct.samples]
    assert etcd.ctl("get", "", "--prefix", "--keys-only").stdout.strip() == ""


def test_a_real_etcd_and_a_proxy_that_runs(etcd: EtcdServer, capsys: pytest.CaptureFixture[str]) -> None:
    with ProxyProcess(etcd.endpoint) as proxy:
        found = measured(
            capsys, f"--upstream={etcd.endpoint}", f"--upstream-metrics={etcd.url}/metrics", f"--proxy={proxy.endpoint}"
        )
        check(found)
        assert found.proxy == proxy.endpoint


@pytest.mark.parametrize(("flag", "watchers"), [pytest.param("--unique", 60, marks=pytest.mark.long), ("--cover", 1)])
def test_unique_keys_without_and_with_a_cover(
    etcd: EtcdServer, capsys: pytest.CaptureFixture[str], flag: str, watchers: int
) -> None:
    found = measured(capsys, f"--upstream={etcd.endpoint}", flag)
    assert found.direct.faultless
    assert found.proxied.faultless
    assert (found.direct.watchers, found.proxied.watchers) == (60, watchers)
    assert found.reduction["watchers"] == 60 / watchers
    # Every key has one watch, so a cover saves no events.
    assert found.direct.events_received == found.proxied.events_received == found.proxied.events_sent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--upstream=a:1 --proxy=b:2 --cover", "--cover: is for the proxy that is started here"),
        ("--upstream=a:1 --user=u:p --cover", "--cover: etcd checks it with the user of the proxy"),
    ],
)
def test_a_cover_that_cannot_be_had_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert run(["measure", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def side(**values: Any) -> TrialCost:
    defaults: dict[str, Any] = dict.fromkeys(TrialCost.__struct_fields__, 0)
    return TrialCost(**{**defaults, "complaints": [], "examples": [], "samples": [], **values})


def test_reductions_without_a_divisor_are_left_out() -> None:
    factors = reduction_of(side(watchers=100, bytes_sent=10, cpu_s=None), side(watchers=10, bytes_sent=0, cpu_s=None))
    assert factors["watchers"] == 10.0
    assert factors["bytes_sent"] is None
    assert factors["cpu_s"] is None


def test_the_table_shows_both_sides_and_every_fault() -> None:
    direct, proxied = side(watchers=1000, cpu_s=0.5), side(watchers=10, cpu_s=0.1, lost=2, examples=["reliable: x"])
    found = Measurement(
        upstream="etcd at 127.0.0.1:2379",
        proxy="127.0.0.1:23790",
        shape=LoadShape(),
        seconds=5,
        events_written=1,
        direct=direct,
        proxied=proxied,
        reduction=reduction_of(direct, proxied),
    )
    output = io.StringIO()
    show_comparison(compare(found), Console(file=output, width=120))
    text = output.getvalue()
    assert "1,000" in text
    assert "100x" in text
    assert "through the proxy: reliable: x" in text
    assert not found.faultless
