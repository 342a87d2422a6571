"""`watchmux demo`: flags, start and exit code; the demo itself is in proxy/measuring/demo.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from proxy.cli.access import access_options
from proxy.cli.strict import StrictCommand
from proxy.errors import FAILURE

if TYPE_CHECKING:
    from proxy.measuring.load.target import ConnectionFiles


@click.command(name="demo", cls=StrictCommand)
@click.option("--endpoints", metavar="HOST:PORT[,...]", help="Use this etcd instead of the bundled store.")
@click.option("--watches", default=1000, show_default=True, type=click.IntRange(1, 100_000), help="Client watches.")
@click.option("--ranges", default=10, show_default=True, type=click.IntRange(1, 1000), help="Distinct ranges watched.")
@click.option("--unique", is_flag=True, help="Each watch has a key of its own instead of one of --ranges.")
@click.option("--cover", is_flag=True, help="Start the proxy with a cover of the keys; implies --unique.")
@click.option("--streams", default=200, show_default=True, type=click.IntRange(1, 10_000), help="gRPC watch streams.")
@click.option(
    "--seconds", default=5.0, show_default=True, type=click.FloatRange(0.1, 600), help="Duration of the writes."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@access_options("etcd user of the writes and watches")
def command(
    endpoints: str | None,
    watches: int,
    ranges: int,
    unique: bool,
    cover: bool,
    streams: int,
    seconds: float,
    as_json: bool,
    access: ConnectionFiles,
) -> int:
    """Demonstrate watchmux with real processes, in half a minute.

    Starts a store, a proxy and client processes on this machine, opens watches through the proxy (some in the past,
    some with filters or prev_kv, one slow), writes for a while, and compares the events of every client with the
    store's own history. Exit code 1 if any event was lost, duplicated or out of order. Its keys, under /watchmux-load/,
    are removed at the end, also after Ctrl-C; if it is killed, etcd removes them after two minutes.

    \b
      watchmux demo
      watchmux demo --endpoints=127.0.0.1:2379    with your own etcd
      watchmux demo --endpoints=https://etcd-0:2379 \\
          --cacert=ca.pem --cert=client.pem --key=client-key.pem
      watchmux demo --watches=5000 --seconds=10
      watchmux demo --cover                       every watch has its own key
    """
    import msgspec
    from rich.console import Console

    from proxy.cli.load import cover_of, run_load, shape_of, targets_of
    from proxy.measuring.demo import SLOW_S, run_demo, show_result
    from proxy.measuring.load.show import ProgressBars
    from proxy.measuring.load.stage import LoadStage

    shape = shape_of(watches=watches, ranges=ranges, streams=streams, pause_s=SLOW_S, unique=unique or cover)
    prefix = cover_of(cover=cover, access=access)
    upstream = targets_of("--endpoints", endpoints, access)[0] if endpoints else None

    async def run() -> int:
        with ProgressBars() as bars:
            bars.step("Starting the proxy" if upstream else "Starting a store and a proxy", 1)
            async with LoadStage(upstream, cover=prefix) as stage:
                result = await run_demo(stage, shape, seconds, bars, endpoints)
        if as_json:
            click.echo(msgspec.json.format(msgspec.json.encode(result)).decode())
        else:
            show_result(result, Console())
        return 0 if result.faultless else FAILURE

    return run_load(run())
