"""`watchmux config`: print the commented example file, or check a configuration file.

The check uses the same code as `watchmux serve`, so that a deployment can refuse a bad file before it replaces a good
one.
"""

from __future__ import annotations

from pathlib import Path

import click

from proxy.config.file import ConfigError, layer, read_file, render_example
from proxy.errors import WRONG_REQUEST, Failed


@click.command(name="config")
@click.option("--check", "path", metavar="FILE.toml", help="Check this file instead; exit code 2 if it is invalid.")
@click.option("--without-files", is_flag=True, help="With --check: do not read the certificates that the file names.")
def command(path: str | None, without_files: bool) -> None:
    """Print a configuration file with every setting at its default, or check a file.

    \b
      watchmux config > watchmux.toml
      watchmux config --check watchmux.toml
      watchmux serve --config watchmux.toml
    """
    if path is None:
        click.echo(render_example(), nl=False)
        return
    try:
        layer({}, read_file(Path(path)), look_at_files=not without_files)
    except ConfigError as error:
        raise Failed(str(error), WRONG_REQUEST) from None
    click.echo(f"{path}: valid")
