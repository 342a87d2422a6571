"""`watchmux status`: flags; the output is in proxy/measuring/status.py."""

from __future__ import annotations

import click

from proxy.config.values import BadValue, parse_address
from proxy.errors import WRONG_REQUEST, Failed


@click.command(name="status")
@click.argument("address", metavar="HOST:PORT", envvar="WATCHMUX_METRICS_ADDR")
@click.option("--watch", "live", is_flag=True, help="Refresh until interrupted.")
@click.option("--json", "as_json", is_flag=True, help="Print the status as JSON.")
def command(address: str, live: bool, as_json: bool) -> None:
    """Show the status of a running proxy; HOST:PORT is its --metrics-addr.

    \b
      watchmux serve --endpoints=127.0.0.1:2379 --metrics-addr=127.0.0.1:9379
      watchmux status 127.0.0.1:9379
      watchmux status 127.0.0.1:9379 --watch
    """
    try:
        url = f"http://{parse_address(address.removeprefix('http://').rstrip('/'))}"
    except BadValue as error:
        raise Failed(str(error), WRONG_REQUEST) from None
    if live and as_json:
        raise Failed("--watch and --json cannot be combined", WRONG_REQUEST)
    import asyncio

    from rich.console import Console

    from proxy.measuring.status import NoStatus, show_live, show_once

    console = Console()
    try:
        asyncio.run(show_live(url, console) if live else show_once(url, console, as_json=as_json))
    except NoStatus as error:
        raise Failed(str(error)) from None
