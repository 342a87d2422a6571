"""`watchmux status`: flags; the output is in proxy/measuring/status.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from proxy.cli.access import access_options
from proxy.cli.strict import StrictCommand
from proxy.config.values import BadValue, parse_address
from proxy.errors import FAILURE, WRONG_REQUEST, Failed

if TYPE_CHECKING:
    from proxy.measuring.load.target import ConnectionFiles


@click.command(name="status", cls=StrictCommand)
@click.argument("address", metavar="HOST:PORT", envvar="WATCHMUX_METRICS_ADDR")
@click.option("--watch", "live", is_flag=True, help="Refresh until interrupted.")
@click.option("--clients", "of_clients", is_flag=True, help="Show the client connections instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the status, or the clients, as JSON.")
@access_options("User for HTTP basic authentication")
def command(address: str, live: bool, of_clients: bool, as_json: bool, access: ConnectionFiles) -> int:
    """Show the status of a running proxy; HOST:PORT is its --metrics-addr.

    Exit code 1 if the proxy does not serve or does not answer. --watch goes on while it does not answer.

    The metrics address is plain HTTP. If a TLS server is in front of it, give https://HOST:PORT and what it demands.

    \b
      watchmux serve --endpoints=127.0.0.1:2379 --metrics-addr=127.0.0.1:9379
      watchmux status 127.0.0.1:9379
      watchmux status 127.0.0.1:9379 --watch
      watchmux status 127.0.0.1:9379 --clients
      watchmux status https://watchmux.example.com:443 --cacert=ca.pem --user=ops
    """
    try:
        scheme, _, place = address.rpartition("://")
        if scheme not in ("", "http", "https"):
            raise BadValue(f"{address!r}: unknown scheme {scheme!r}; use HOST:PORT, http:// or https://")
        # The log and the scrape configuration name a page of it.
        url = f"{scheme or 'http'}://{parse_address(place.partition('/')[0])}"
    except BadValue as error:
        raise Failed(str(error), WRONG_REQUEST) from None
    if live and as_json:
        raise Failed("--watch and --json cannot be combined", WRONG_REQUEST)
    if live and of_clients:
        raise Failed("--watch and --clients cannot be combined", WRONG_REQUEST)
    import asyncio

    from rich.console import Console

    from proxy.measuring.status import NoStatus, show_clients, show_live, show_once

    console = Console()
    try:
        if of_clients:
            asyncio.run(show_clients(url, console, access, as_json=as_json))
            return 0
        if live:
            asyncio.run(show_live(url, console, access))
            return 0
        return 0 if asyncio.run(show_once(url, console, access, as_json=as_json)) else FAILURE
    except NoStatus as error:
        raise Failed(str(error)) from None
