"""`watchmux measure`: flags, start and exit code; the measurement itself is in proxy/measuring."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from proxy.cli.access import access_options
from proxy.cli.strict import StrictCommand
from proxy.errors import FAILURE, WRONG_REQUEST, Failed

if TYPE_CHECKING:
    from proxy.measuring.comparison import Comparison
    from proxy.measuring.load.target import ConnectionFiles
    from proxy.measuring.measure import Measurement
    from proxy.measuring.observe import Observation


@click.command(name="measure", cls=StrictCommand)
@click.option(
    "--upstream",
    metavar="HOST:PORT[,...]",
    help="The etcd to measure; with --observe all its members. Default: start the bundled store.",
)
@click.option(
    "--upstream-metrics",
    metavar="URL[,...]",
    help="Metrics URLs of etcd's members, if not /metrics at their client addresses.",
)
@click.option("--proxy", metavar="HOST:PORT", help="The watchmux in front of it. Default: start one.")
@click.option("--watches", default=1000, show_default=True, type=click.IntRange(1, 100_000), help="Client watches.")
@click.option("--ranges", default=10, show_default=True, type=click.IntRange(1, 1000), help="Distinct ranges watched.")
@click.option("--unique", is_flag=True, help="Each watch has a key of its own instead of one of --ranges.")
@click.option("--cover", is_flag=True, help="Start the proxy with a cover of the keys; implies --unique.")
@click.option("--streams", default=200, show_default=True, type=click.IntRange(1, 10_000), help="gRPC watch streams.")
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 86_400),
    help="Duration of the writes, or of --observe.  [default: 5, or 60]",
)
@click.option("--rate", default=50.0, show_default=True, type=click.FloatRange(0.1, 10_000), help="Writes per second.")
@click.option("--observe", is_flag=True, help="Generate no load: observe what a proxy in production saves its etcd.")
@click.option("--proxy-metrics", metavar="URL", help="The proxy's --metrics-addr, for --observe or with --proxy.")
@click.option("--report", metavar="FILE.html", help="Also write the result as one HTML page with charts.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@access_options("etcd user of the writes and watches; with --observe the HTTP user of the metrics pages")
def command(
    upstream: str | None,
    upstream_metrics: str | None,
    proxy: str | None,
    watches: int,
    ranges: int,
    unique: bool,
    cover: bool,
    streams: int,
    seconds: float | None,
    rate: float,
    observe: bool,
    proxy_metrics: str | None,
    report: str | None,
    as_json: bool,
    access: ConnectionFiles,
) -> int:
    """Measure the load on etcd without and with the proxy: same clients, same writes, counted by etcd itself.

    Writes keys under /watchmux-load/ and deletes them at the end, also after Ctrl-C; if it is killed, etcd removes them
    after two minutes. Says if other clients' traffic is in the numbers. Exit code 1 if any event was lost, duplicated
    or out of order through the proxy. With --observe it neither writes nor watches: it only reads the metrics pages.

    \b
      watchmux measure                            starts a store and a proxy
      watchmux measure --upstream=127.0.0.1:2379  your etcd; starts a proxy
      watchmux measure --upstream=127.0.0.1:2379 --watches=5000 \\
          --report=before-after.html
      watchmux measure --upstream=127.0.0.1:2379 --cover
      watchmux measure --upstream=https://etcd-0:2379 \\
          --cacert=ca.pem --cert=client.pem --key=client-key.pem
      watchmux measure --observe --proxy-metrics=127.0.0.1:9379 \\
          --upstream=etcd-0:2379,etcd-1:2379,etcd-2:2379
    """
    from proxy.cli.load import cover_of, metrics_urls, run_load, shape_of, targets_of
    from proxy.measuring.load.show import ProgressBars
    from proxy.measuring.load.stage import LoadStage
    from proxy.measuring.measure import compare, run_measure

    _check_together(upstream, upstream_metrics, proxy, observe, proxy_metrics, cover)
    if report:
        _check_writable(Path(report))
    etcds = targets_of("--upstream", upstream, access) if upstream else []
    urls = metrics_urls("--upstream-metrics", upstream_metrics) if upstream_metrics else []
    proxy_url = metrics_urls("--proxy-metrics", proxy_metrics)[0] if proxy_metrics else None
    if observe:
        pages = [*(urls or [target.url for target in etcds]), proxy_url or ""]
        return run_load(_observe(pages, access, 60.0 if seconds is None else seconds, report, as_json))
    if len(etcds) > 1 or len(urls) > 1:
        raise Failed("--upstream: give one member; only --observe reads all of them", WRONG_REQUEST)
    in_front = targets_of("--proxy", proxy, access)[0] if proxy else None
    shape = shape_of(watches=watches, ranges=ranges, streams=streams, plain=True, unique=unique or cover)
    prefix = cover_of(cover=cover, access=access)

    async def run() -> int:
        with ProgressBars() as bars:
            async with LoadStage(next(iter(etcds), None), next(iter(urls), None), in_front, proxy_url, prefix) as stage:
                measured = await run_measure(stage, shape, 5.0 if seconds is None else seconds, rate, bars)
        _show(measured, compare(measured), report, as_json)
        return 0 if measured.faultless else FAILURE

    return run_load(run())


def _check_together(
    upstream: str | None,
    upstream_metrics: str | None,
    proxy: str | None,
    observe: bool,
    proxy_metrics: str | None,
    cover: bool,
) -> None:
    problem = ""
    if observe and not proxy_metrics:
        problem = "--observe: requires --proxy-metrics=HOST:PORT, the proxy's --metrics-addr"
    elif observe and not (upstream or upstream_metrics):
        problem = "--observe: requires --upstream or --upstream-metrics"
    elif proxy_metrics and not (observe or proxy):
        problem = "--proxy-metrics: requires --observe or --proxy"
    elif proxy and not upstream:
        problem = "--proxy: requires --upstream, the etcd behind it: etcd is what is measured"
    elif cover and (observe or proxy):
        problem = "--cover: is for the proxy that is started here; start yours with its own --cover, and use --unique"
    elif upstream_metrics and not upstream and not observe:
        problem = "--upstream-metrics: requires --upstream"
    if problem:
        raise Failed(problem, WRONG_REQUEST)


def _check_writable(path: Path) -> None:
    """Check before the measurement that its report can be written."""
    try:
        path.open("a").close()
    except OSError as error:
        raise Failed(f"--report: cannot write {path}: {(error.strerror or '').lower()}", WRONG_REQUEST) from None


async def _observe(pages: list[str], access: ConnectionFiles, seconds: float, report: str | None, as_json: bool) -> int:
    """Observe; the last of `pages` is the proxy's."""
    from proxy.measuring.load.prometheus import MetricsPage
    from proxy.measuring.load.show import ProgressBars
    from proxy.measuring.observe import compare_observed, observe

    *etcds, proxy = (MetricsPage(page, access) for page in pages)
    try:
        with ProgressBars() as bars:
            seen = await observe(etcds, proxy, seconds, bars)
    finally:
        for page in (*etcds, proxy):
            await page.close()
    _show(seen, compare_observed(seen), report, as_json)
    return 0


def _show(result: Measurement | Observation, comparison: Comparison, report: str | None, as_json: bool) -> None:
    import msgspec
    from rich.console import Console

    from proxy.measuring.comparison import show_comparison
    from proxy.measuring.report import render_report
    from proxy.version import program_version

    if report:
        Path(report).write_text(render_report(comparison, program_version()), encoding="utf-8")
        click.echo(f"report written to {report}", err=True)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(result)).decode())
    else:
        show_comparison(comparison, Console())
