"""`watchmux serve`: from settings to a running proxy, and in good order back.

The process stays small: gRPC's library is never loaded here, the web server only with --metrics-addr, TLS only with
certificates. The bundled store, where no endpoints are given, is a process of its own for the same reason.
"""

from __future__ import annotations

from typing import Any

import click

from proxy.cli.knobs import KnobCommand, knob_options, settings_of


@click.command(name="serve", cls=KnobCommand)
@knob_options
@click.option("--parent-fd", type=int, default=None, hidden=True)
@click.pass_context
def command(ctx: click.Context, /, parent_fd: int | None, **_given: Any) -> int:
    """Stand in front of etcd and share its watches; the flags are those of `etcd grpc-proxy start`.

    \b
      watchmux serve --endpoints=127.0.0.1:2379
      watchmux serve --endpoints=https://etcd-0:2379,https://etcd-1:2379 --cacert=ca.pem --listen-addr=:23790
      watchmux serve --config=watchmux.toml --metrics-addr=127.0.0.1:9379
      watchmux serve                              (no etcd at hand: starts the bundled store and fronts it)

    Point clients at --listen-addr. Calls other than watches pass through to etcd untouched. SIGTERM and SIGINT drain:
    clients are sent elsewhere, open calls may end within --drain. SIGHUP reads the configuration file again: log level,
    limits and endpoints change at once, what else has changed is named in the log. Certificates are read again by
    themselves.
    """
    settings, notes = settings_of(ctx)
    if ctx.obj is not None:
        # Somebody else serves: see `proxy.cli.apart`.
        code: int = ctx.obj(settings, notes, parent_fd)
        return code
    import uvloop

    from proxy.process.serving import serve

    return uvloop.run(serve(settings, notes, parent_fd, lambda: settings_of(ctx)))
