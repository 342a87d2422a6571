"""`watchmux measure`: flags, start and exit code; what it measures is in proxy/measure.py."""

from __future__ import annotations

import click

from proxy.cli_errors import FAILURE, WRONG_REQUEST, Failed


@click.command(name="measure")
@click.option("--upstream", metavar="HOST:PORT", help="The etcd to measure. Without it the bundled store is started.")
@click.option(
    "--upstream-metrics", metavar="URL", help="Where its metrics are, if not below its client address (/metrics)."
)
@click.option("--proxy", metavar="HOST:PORT", help="The watchmux in front of it. Without it one is started.")
@click.option("--watches", default=1000, show_default=True, type=click.IntRange(1, 100_000), help="Client watches.")
@click.option("--ranges", default=10, show_default=True, type=click.IntRange(1, 1000), help="Different ranges watched.")
@click.option("--streams", default=200, show_default=True, type=click.IntRange(1, 10_000), help="gRPC watch streams.")
@click.option("--seconds", default=5.0, show_default=True, type=click.FloatRange(0.1, 600), help="How long to write.")
@click.option("--rate", default=50.0, show_default=True, type=click.FloatRange(0.1, 10_000), help="Writes per second.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    upstream: str | None,
    upstream_metrics: str | None,
    proxy: str | None,
    watches: int,
    ranges: int,
    streams: int,
    seconds: float,
    rate: float,
    as_json: bool,
) -> int:
    """Measure an etcd's load without and with the proxy: the same clients, the same writes, counted by etcd itself.

    Writes keys below /watchmux-load/ and deletes them afterwards. Exit code 1 if anything was lost, doubled or out of
    order through the proxy.

    \b
      watchmux measure                                     a store and a proxy of its own
      watchmux measure --upstream=127.0.0.1:2379           your etcd, and a proxy of its own
      watchmux measure --upstream=127.0.0.1:2379 --proxy=127.0.0.1:23790 --watches=5000 --json
    """
    import asyncio

    import msgspec
    from rich.console import Console

    from proxy.cli_load import first_endpoint, load_errors, metrics_url, shape_of
    from proxy.load.show import Bars
    from proxy.load.stage import Stage
    from proxy.measure import run_measure, show_measurement

    if proxy and not upstream:
        raise Failed("--proxy: name the etcd behind it too (--upstream): it is etcd that is measured", WRONG_REQUEST)
    if upstream_metrics and not upstream:
        raise Failed("--upstream-metrics: name the etcd too (--upstream)", WRONG_REQUEST)
    shape = shape_of(watches=watches, ranges=ranges, streams=streams, plain=True)
    upstream = first_endpoint("--upstream", upstream) if upstream else None
    proxy = first_endpoint("--proxy", proxy) if proxy else None
    url = metrics_url("--upstream-metrics", upstream_metrics) if upstream_metrics else None

    async def run() -> int:
        with Bars() as bars:
            async with Stage(upstream, url, proxy) as stage:
                measured = await run_measure(stage, shape, seconds, rate, bars)
        if as_json:
            click.echo(msgspec.json.format(msgspec.json.encode(measured)).decode())
        else:
            show_measurement(measured, Console())
        return 0 if measured.faultless else FAILURE

    with load_errors():
        return asyncio.run(run())
