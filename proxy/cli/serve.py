"""`watchmux serve`: flags and help; starting and stopping the proxy is in proxy/process/serving.py.

The process stays small: it never loads grpcio, loads the web server only with --metrics-addr, and TLS only with
certificates. For the same reason the bundled store, used without endpoints, is a separate process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from proxy.cli.knobs import KnobCommand, knob_options, settings_of


@click.command(name="serve", cls=KnobCommand)
@knob_options
@click.option("--parent-fd", type=int, default=None, hidden=True)
@click.pass_context
def command(ctx: click.Context, /, parent_fd: int | None, **_given: Any) -> int:
    """Run the proxy in front of etcd; the flags are those of `etcd grpc-proxy start`.

    \b
      watchmux serve --endpoints=127.0.0.1:2379
      watchmux serve --endpoints=https://etcd-0:2379,https://etcd-1:2379 \\
          --cacert=ca.pem --listen-addr=:23790
      watchmux serve --config=watchmux.toml --metrics-addr=127.0.0.1:9379
      watchmux serve             (without an etcd: starts the bundled store)

    Clients connect to --listen-addr. Calls other than watches pass through to etcd unchanged. SIGTERM and SIGINT drain
    the proxy: clients reconnect elsewhere, open calls may finish within --drain. SIGHUP reloads the configuration file:
    log level, limits and endpoints change at once; the log names changes that need a restart. Certificate files are
    reloaded when they change.
    """
    settings, notes = settings_of(ctx)
    # Another process runs the proxy: see `proxy.cli.apart`.
    serve: Callable[..., int] = ctx.obj
    return serve(settings, notes, parent_fd)
