"""`watchmux store`: flags, start and stop of the bundled store; the store itself is in upstream/store/."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from proxy.cli.strict import StrictCommand
from proxy.config.values import BadValue, parse_address, parse_duration_s, parse_metrics_address
from proxy.config.variables import problems_of
from proxy.errors import WRONG_REQUEST, Failed

if TYPE_CHECKING:
    from upstream.store.server import StoreSettings


@click.command(name="store", cls=StrictCommand)
@click.option(
    "--listen-addr",
    default="127.0.0.1:2379",
    envvar="WATCHMUX_STORE_LISTEN_ADDR",
    show_default=True,
    metavar="HOST:PORT",
    help="Address to listen on for clients. Port 0: any free port, printed at start.",
)
@click.option(
    "--listen-metrics-urls",
    envvar="WATCHMUX_STORE_LISTEN_METRICS_URLS",
    metavar="URL",
    help="URL for /metrics, /health and /version: http://HOST:PORT.",
)
@click.option(
    "--data-dir",
    envvar="WATCHMUX_STORE_DATA_DIR",
    metavar="DIRECTORY",
    help="Data directory (SQLite). Default: in memory only; all data is lost when the store stops.",
)
@click.option(
    "--watch-progress-notify-interval",
    "progress_notify",
    default="10m",
    show_default=True,
    metavar="DURATION",
    help="Interval of progress notifications for idle watches that requested progress_notify.",
)
@click.option("--parent-fd", type=int, default=None, hidden=True)
def command(
    listen_addr: str,
    listen_metrics_urls: str | None,
    data_dir: str | None,
    progress_notify: str,
    parent_fd: int | None,
) -> None:
    """Run the bundled etcd-compatible store standalone: for evaluation, tests and small installations.

    With --data-dir every write is on disk before it is acknowledged; without it, all data is in memory only.

    \b
      watchmux store --listen-addr=127.0.0.1:2379
      watchmux store --data-dir=/var/lib/watchmux-store
      etcdctl --endpoints=127.0.0.1:2379 put greeting hello
    """
    if problems := list(problems_of(os.environ)):
        raise Failed("\n".join(problems), WRONG_REQUEST)
    flag = "--listen-addr"
    try:
        address = parse_address(listen_addr, listening=True)
        flag = "--listen-metrics-urls"
        metrics = parse_metrics_address(listen_metrics_urls) if listen_metrics_urls else None
        flag = "--watch-progress-notify-interval"
        interval_s = parse_duration_s(progress_notify)
        if interval_s == 0:
            raise BadValue("must be longer than 0s")
    except BadValue as error:
        raise Failed(f"{flag}: {error}", WRONG_REQUEST) from None
    import uvloop

    from upstream.store.server import StoreSettings

    settings = StoreSettings(
        listen_addr=str(address),
        metrics_addr=str(metrics) if metrics else None,
        progress_notify_interval_s=interval_s,
        data_dir=Path(data_dir) if data_dir else None,
    )
    uvloop.run(_run(settings, parent_fd))


async def _run(settings: StoreSettings, parent_fd: int | None) -> None:
    import asyncio

    from proxy.process.child import ChildReady, Parent, on_signals
    from upstream.store.journal import StoreDataError
    from upstream.store.server import Store, StoreListenError, join_address

    leaving = asyncio.Event()
    on_signals(leaving.set)
    parent = await Parent.join(parent_fd, lambda _line: None, leaving.set)
    try:
        store = Store(settings)
        await store.start()
    except StoreListenError as error:
        raise Failed(str(error)) from None
    except StoreDataError as error:
        raise Failed(str(error)) from None
    metrics = ""
    if settings.metrics_addr and store.metrics_port:
        metrics = join_address(parse_address(settings.metrics_addr, listening=True).host, store.metrics_port)
    parent.write_line(ChildReady(address=store.endpoint, metrics=metrics))
    if parent_fd is None:
        where = f", data in {settings.data_dir}" if settings.data_dir else ", in memory only"
        where += f", metrics at {metrics}" if metrics else ""
        click.echo(f"the store serves at {store.endpoint}{where}", err=True)
    stopping = asyncio.ensure_future(leaving.wait())
    broken = asyncio.ensure_future(store.failure())
    await asyncio.wait([stopping, broken], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    failure = broken.result() if broken.done() else None
    broken.cancel()
    await store.stop()
    await parent.leave()
    if failure is not None:
        raise Failed(str(failure))
