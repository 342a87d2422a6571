"""`watchmux store`: flags and life of the bundled store; the store itself is in upstream/store/."""

from __future__ import annotations

import click

from proxy.cli_errors import WRONG_REQUEST, Failed
from proxy.config_values import BadValue, parse_address, parse_duration_s, parse_metrics_address


@click.command(name="store")
@click.option(
    "--listen-addr",
    default="127.0.0.1:2379",
    envvar="WATCHMUX_STORE_LISTEN_ADDR",
    show_default=True,
    metavar="HOST:PORT",
    help="Where clients connect. Port 0: any free one, printed.",
)
@click.option(
    "--listen-metrics-urls",
    envvar="WATCHMUX_STORE_LISTEN_METRICS_URLS",
    metavar="URL",
    help="Serve /metrics, /health and /version here, as http://HOST:PORT.",
)
@click.option(
    "--data-dir", envvar="WATCHMUX_STORE_DATA_DIR", metavar="DIRECTORY", help="Not there yet: keep the data here."
)
@click.option(
    "--watch-progress-notify-interval",
    "progress_notify",
    default="10m",
    show_default=True,
    metavar="DURATION",
    help="Tell quiet watches that asked for it how far they are, this often.",
)
@click.option("--parent-fd", type=int, default=None, hidden=True)
def command(
    listen_addr: str,
    listen_metrics_urls: str | None,
    data_dir: str | None,
    progress_notify: str,
    parent_fd: int | None,
) -> None:
    """Run the bundled etcd-compatible store on its own: for trying out, for tests, for small installations.

    Everything is kept in memory and gone when it ends.

    \b
      watchmux store --listen-addr=127.0.0.1:2379
      etcdctl --endpoints=127.0.0.1:2379 put greeting hello
    """
    if data_dir is not None:
        text = "--data-dir: keeping data on disk is not there yet; leave it out to keep everything in memory"
        raise Failed(text, WRONG_REQUEST)
    flag = "--listen-addr"
    try:
        address = parse_address(listen_addr, listening=True)
        flag = "--listen-metrics-urls"
        metrics = parse_metrics_address(listen_metrics_urls) if listen_metrics_urls else None
        flag = "--watch-progress-notify-interval"
        interval_s = parse_duration_s(progress_notify)
        if interval_s == 0:
            raise BadValue("it has to be longer than 0s")
    except BadValue as error:
        raise Failed(f"{flag}: {error}", WRONG_REQUEST) from None
    import uvloop

    from upstream.store.server import StoreSettings

    settings = StoreSettings(
        listen_addr=str(address),
        metrics_addr=str(metrics) if metrics else None,
        progress_notify_interval_s=interval_s,
    )
    uvloop.run(_run(settings, parent_fd))


async def _run(settings: object, parent_fd: int | None) -> None:
    import asyncio

    from proxy.child import Parent, Ready, on_signals
    from upstream.store.server import Store, StoreListenError, StoreSettings, join_address

    assert isinstance(settings, StoreSettings)
    leaving = asyncio.Event()
    on_signals(leaving.set)
    parent = await Parent.join(parent_fd, lambda _line: None, leaving.set)
    store = Store(settings)
    try:
        await store.start()
    except StoreListenError as error:
        raise Failed(str(error)) from None
    metrics = ""
    if settings.metrics_addr and store.metrics_port:
        metrics = join_address(parse_address(settings.metrics_addr, listening=True).host, store.metrics_port)
    parent.write_line(Ready(address=store.endpoint, metrics=metrics))
    if parent_fd is None:
        click.echo(
            f"the store serves at {store.endpoint}" + (f", its metrics at {metrics}" if metrics else ""), err=True
        )
    await leaving.wait()
    await store.stop()
    await parent.leave()
