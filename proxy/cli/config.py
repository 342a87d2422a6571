"""`watchmux config`: print the commented example file, check a file, or print the settings in force.

The check uses the same code as `watchmux serve`, so that a deployment can refuse a bad file before it replaces a good
one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from proxy.cli.knobs import effective_of, knob_options
from proxy.cli.strict import StrictCommand
from proxy.config.file import ConfigError, merge_settings
from proxy.config.rendering import render_effective, render_example
from proxy.errors import WRONG_REQUEST, Failed


class _Command(StrictCommand):
    """The flags of `serve` are accepted, but not listed again."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the command's own options only."""
        own = [parameter for parameter in self.get_params(ctx) if "__" not in (parameter.name or "")]
        records = [record for parameter in own if (record := parameter.get_help_record(ctx)) is not None]
        with formatter.section("Options"):
            formatter.write_dl(records)


@click.command(name="config", cls=_Command)
@click.option("--check", "path", metavar="FILE.toml", help="Check this file instead; exit code 2 if it is invalid.")
@click.option("--without-files", is_flag=True, help="With --check: do not read the certificates that the file names.")
@click.option(
    "--effective",
    is_flag=True,
    help="Print the settings that `serve` would use with the same flags, variables and file, and the origin of each.",
)
@knob_options
@click.pass_context
def command(ctx: click.Context, /, path: str | None, without_files: bool, effective: bool, **_given: Any) -> None:
    """Print a configuration file with every setting at its default, check a file, or print the settings in force.

    A check reports all errors at once.

    \b
      watchmux config > watchmux.toml
      watchmux config --check watchmux.toml
      watchmux config --effective --config=watchmux.toml --listen-addr=:23790
      watchmux serve --config watchmux.toml
    """
    if effective:
        click.echo(render_effective(*effective_of(ctx, look_at_files=not without_files)), nl=False)
    elif path is None:
        click.echo(render_example(), nl=False)
    else:
        try:
            merge_settings({}, Path(path), [], look_at_files=not without_files)
        except ConfigError as error:
            raise Failed(str(error), WRONG_REQUEST) from None
        click.echo(f"{path}: valid")
