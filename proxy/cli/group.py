"""The `watchmux` commands as a click group; each command is imported only when called.

A command's module may import large libraries, and `watchmux --help` must be fast, so the group knows its commands by
name only. Every user error becomes one line on standard error: exit code 2 for a wrong request (flag, file, argument),
1 for a failure at run time.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import NamedTuple, cast

import click

from proxy.errors import FAILURE, INTERRUPTED, WRONG_REQUEST, Failed, complain

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _CommandEntry(NamedTuple):
    module: str
    help: str


COMMANDS = {
    "serve": _CommandEntry("proxy.cli.serve", "Run the proxy in front of etcd."),
    "store": _CommandEntry("proxy.cli.store", "Run the bundled etcd-compatible store standalone."),
    "demo": _CommandEntry("proxy.cli.demo", "Demonstrate the proxy with real processes, in half a minute."),
    "measure": _CommandEntry("proxy.cli.measure", "Measure the load on etcd without and with the proxy."),
    "status": _CommandEntry("proxy.cli.status", "Show the status of a running proxy."),
    "config": _CommandEntry("proxy.cli.config", "Print or check a configuration file."),
}


MEANT = dict.fromkeys(("start", "run", "proxy", "grpc-proxy", "gateway"), "serve") | {
    "etcd": "store",
    "server": "serve",
}
"""Names that users of etcd and other programs try, and the command that does it here."""


class LazyGroup(click.Group):
    """A group that imports a command when it is called, not when --help lists it."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; suggest one for a name that does not exist."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            import difflib  # for mistakes only

            close = MEANT.get(name) or next(iter(difflib.get_close_matches(name, COMMANDS, 1)), "")
            hint = f"Did you mean {close!r}?" if close else f"The commands are {', '.join(COMMANDS)}."
            ctx.fail(f"No such command {name!r}. {hint}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which a new user needs them."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        del ctx
        place = COMMANDS.get(cmd_name)
        if place is None:
            return None
        return cast(click.Command, importlib.import_module(place.module).command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, place.help) for name, place in COMMANDS.items()])


def _show_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from proxy.version import program_commit, program_version

        number, commit = program_version() or "(not installed)", program_commit() or "unknown"
        click.echo(f"watchmux {number} (commit {commit}), Python {sys.version.split()[0]}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version.",
)
def cli() -> None:
    """A proxy in front of etcd that merges the identical watches of many clients into one upstream watch.

    Clients connect to watchmux instead of etcd, without any other change; etcd serves one watch per watched range
    instead of one per client watch.

    \b
    Try it without an etcd:
      watchmux demo

    \b
    Run it in front of an etcd, and connect a client:
      watchmux serve --endpoints=127.0.0.1:2379 --listen-addr=127.0.0.1:23790
      etcdctl --endpoints=127.0.0.1:23790 watch --prefix /app/

    \b
    Measure what it saves your etcd:
      watchmux measure --upstream=127.0.0.1:2379
    """


def run(arguments: list[str], serve: Callable[..., int] | None = None) -> int:
    """Run the command line and return its exit code; errors are one line on standard error.

    `serve` receives the settings of `watchmux serve` (see `proxy.cli.apart`) and returns the exit code.
    """
    try:
        result = cli.main(arguments, prog_name="watchmux", standalone_mode=False, obj=serve)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return WRONG_REQUEST
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "watchmux"
        hint = _two_dashes(arguments) if isinstance(error, click.NoSuchOption) else ""
        complain(f"{error.format_message()}{hint} (see {path} --help)")
        return WRONG_REQUEST
    except click.ClickException as error:
        complain(error.format_message())
        return error.exit_code
    except Failed as error:
        complain(str(error))
        return error.code
    except (click.Abort, KeyboardInterrupt):
        complain("interrupted")
        return INTERRUPTED
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        # Any other file is read or written where its name is known.
        complain(f"cannot write the output: {os.strerror(error.errno).lower()}; write it elsewhere or make room")
        return FAILURE
    return result if isinstance(result, int) else 0


def _two_dashes(arguments: list[str]) -> str:
    """Return a hint for a flag with one dash, as etcd takes it too, to which click reacts by its first letter."""
    short = next((argument for argument in arguments if re.match(r"-[a-z]{2}", argument)), "")
    return f" Write -{short.partition('=')[0]}." if short else ""
