"""A command that refuses what was given but is empty, such as `--endpoints=$ETCD` without an ETCD.

click takes an empty variable as one that is not set, and commands take an empty flag as one that was not given: both
would silently run with a default.
"""

from __future__ import annotations

import os

import click
from click.core import ParameterSource

from proxy.errors import WRONG_REQUEST, Failed


class EmptyOption(click.Option):
    """An option whose value may be empty: the prefix of all keys."""


class StrictCommand(click.Command):
    """A command whose options and variables must have a value where they are given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments. Raises Failed."""
        rest = super().parse_args(ctx, args)
        problems = list(empty_options(ctx))
        if problems:
            raise Failed("\n".join(problems), WRONG_REQUEST)
        return rest


def empty_options(ctx: click.Context) -> list[str]:
    """Return one line for each option of the command that is given but empty."""
    problems = []
    for parameter in ctx.command.get_params(ctx):
        value = ctx.params.get(parameter.name or "")
        texts = value if isinstance(value, tuple) else (value,)
        if ctx.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE:
            if isinstance(parameter, EmptyOption):
                continue
            if any(isinstance(text, str) and not text.strip(" ,") for text in texts):
                problems.append(f"{parameter.opts[-1]}: is empty; give it a value or remove it")
        elif isinstance(parameter.envvar, str) and not os.environ.get(parameter.envvar, "x").strip(" ,"):
            problems.append(f"{parameter.envvar}: is set but empty; give it a value or unset it")
    return problems
