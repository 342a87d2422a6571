"""A command that refuses values which click lets pass: empty ones, text that is not UTF-8, and `nan`.

click takes an empty variable as one that is not set, and commands take an empty flag as one that was not given: both
would silently run with a default. Arguments that are not UTF-8 become surrogates, which no later step can encode.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import click
from click.core import ParameterSource

from proxy.errors import WRONG_REQUEST, Failed


class EmptyOption(click.Option):
    """An option whose value may be empty: the prefix of all keys."""


class StrictCommand(click.Command):
    """A command whose options and variables must have a value where they are given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments. Raises Failed."""
        try:
            rest = super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx  # click's parser does not name the command
            raise
        problems = [*empty_options(ctx), *unusable_options(ctx)]
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


def unusable_options(ctx: click.Context) -> Iterator[str]:
    """Yield one line for each option or argument that is not UTF-8, or whose number is `nan`."""
    for parameter in ctx.command.get_params(ctx):
        value = ctx.params.get(parameter.name or "")
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, float) and math.isnan(part):
                yield f"{_origin(ctx, parameter)}: nan is not a number"
            elif isinstance(part, str) and not _is_utf8(part):
                yield f"{_origin(ctx, parameter)}: {part!r} is not UTF-8 text"


def _origin(ctx: click.Context, parameter: click.Parameter) -> str:
    if ctx.get_parameter_source(parameter.name or "") is ParameterSource.ENVIRONMENT:
        return str(parameter.envvar)
    return parameter.opts[-1] if isinstance(parameter, click.Option) else parameter.human_readable_name


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
