"""The settings as click options, and the result of flags, environment and file together.

Options are generated from the settings (proxy/config), so flags, variables and file keys cannot diverge. The other
flags of `etcd grpc-proxy start` are known as well: its users change one word in their command line, so each flag is
either accepted with a log message, or refused with the reason, never an "unknown option".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from proxy.cli.strict import EmptyOption, StrictCommand
from proxy.config.advice import advice
from proxy.config.describing import ValueSyntax
from proxy.config.file import ConfigError, ConfiguredValue, from_text, merge_settings, parse_switch
from proxy.config.knobs import Knob, Settings, knobs, tables
from proxy.config.values import BadValue, show_duration, show_size
from proxy.config.variables import CONFIG_ENV, problems_of
from proxy.errors import WRONG_REQUEST, Failed

Function = TypeVar("Function", bound=Callable[..., Any])

TAKEN = {
    "permit-without-stream": "connections to etcd always use keepalive",
    "max-send-bytes": "etcd enforces message sizes",
    "max-recv-bytes": "etcd enforces message sizes",
    "data-dir": "the proxy stores nothing on disk",
    "self-signed-cert-validity": "generating certificates is not supported",
    "experimental-serializable-ordering": "reads pass through to etcd unchanged",
    "experimental-enable-grpc-logging": "use --log-level=debug",
}
"""Flags of etcd's grpc-proxy that are accepted without effect, and why."""

REFUSED = {
    "resolver-prefix": "registering the proxy in etcd is not supported; configure its address in the clients",
    "resolver-ttl": "registering the proxy in etcd is not supported; configure its address in the clients",
    "endpoints-auto-sync-interval": "endpoints are not read from etcd; list all of them in --endpoints",
    "auto-tls": "generating certificates is not supported; set --cert-file and --key-file",
    "client-crl-file": "revocation lists are not supported yet",
    "listen-cipher-suites": "choosing cipher suites is not supported yet",
    "tls-max-version": "a maximum TLS version is not supported; clients may use TLS 1.3",
    "enable-pprof": "pprof is Go's profiler and is not supported",
    "experimental-leasing-prefix": "leasing is not supported: reads pass through to etcd unchanged",
}
"""Flags of etcd's grpc-proxy that are refused because the proxy does not implement them, and why."""


# As in Go, the value of a switch is optional and follows "=".
_SWITCH: dict[str, Any] = {"is_flag": False, "flag_value": "true"}


def knob_options(function: Function) -> Function:
    """Add every setting as an option, `--config`, `--debug` and grpc-proxy's other flags."""
    for name in (*TAKEN, *REFUSED):
        # The value is optional, so that both switches and flags with a value are accepted.
        function = click.option(f"--{name}", _foreign(name), is_flag=False, flag_value="true", hidden=True)(function)
    for knob in reversed(knobs()):
        function = _option(knob)(function)
    function = click.option("--debug", **_SWITCH, metavar="[true|false]", help="Same as --log-level=debug.")(function)
    return click.option("--config", envvar=CONFIG_ENV, metavar="FILE.toml", help="Read settings from this file.")(
        function
    )


def _foreign(flag: str) -> str:
    return "foreign_" + flag.replace("-", "_")


def _parameter(knob: Knob) -> str:
    return knob.path.replace(".", "__")


def _option(knob: Knob) -> Callable[[Function], Function]:
    switch = _SWITCH if knob.kind is ValueSyntax.SWITCH else {}
    choices = f"[{'|'.join(knob.choices)}]" if knob.choices else "[true|false]" if switch else ""
    return click.option(
        knob.flag,
        _parameter(knob),
        envvar=knob.env,
        # A list may be given in parts, as in etcd. Its variable is not split at spaces, as click would do.
        type=_WHOLE,
        multiple=knob.kind in (ValueSyntax.ENDPOINTS, ValueSyntax.PREFIXES),
        cls=EmptyOption if knob.kind is ValueSyntax.PREFIXES else click.Option,
        metavar=choices or knob.kind.value.upper(),
        help=f"{knob.about.text}{_default(knob)}",
        **switch,
    )


class _WholeText(click.types.StringParamType):
    def split_envvar_value(self, rv: str) -> list[str]:
        return [rv]


_WHOLE = _WholeText()


def _default(knob: Knob) -> str:
    if knob.default in ("", []) or knob.default is False:
        return ""
    match knob.kind:
        case ValueSyntax.SECONDS:
            shown = show_duration(knob.default)
        case ValueSyntax.BYTES:
            shown = show_size(knob.default)
        case ValueSyntax.SWITCH:
            shown = "true"
        case _:
            shown = str(knob.default)
    return f"  [default: {shown}]"


class KnobCommand(StrictCommand):
    """A command whose help groups the settings as the configuration file does, and states the precedence."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section per table, the command's own options last, and the order of precedence."""
        sections: dict[str, list[tuple[str, str]]] = {table: [] for table in tables()}
        own: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                table = (parameter.name or "").partition("__")[0]
                (sections[table] if "__" in (parameter.name or "") else own).append(record)
        for table, records in sections.items():
            if records:
                with formatter.section((tables()[table].__doc__ or table).strip().rstrip(".")):
                    formatter.write_dl(records, col_max=34)
        with formatter.section("Other options"):
            formatter.write_dl(own, col_max=34)
        formatter.write_paragraph()
        formatter.write_text(
            "Flags override environment variables, which override the configuration file. The environment variable of "
            "--listen-addr is WATCHMUX_LISTEN_ADDR, and likewise for every flag. `watchmux config` prints a file with "
            "all settings. Durations: 500ms, 10s, 1m30s. Sizes: 64MiB."
        )


def settings_of(ctx: click.Context) -> tuple[Settings, list[str]]:
    """Return the settings from a command's flags, environment and file, and notes for the log.

    Raises Failed, with the exit code of a wrong request and a line for each invalid setting.
    """
    settings, _ = effective_of(ctx)
    notes = [f"--{flag} has no effect: {reason}" for flag, reason in TAKEN.items() if _is_given(ctx, _foreign(flag))]
    return settings, [*notes, *advice(settings)]


def effective_of(
    ctx: click.Context, path: Path | None = None, *, look_at_files: bool = True
) -> tuple[Settings, dict[str, ConfiguredValue]]:
    """Return the settings and those values that are given, with their origins; `path`: the file, if not --config.

    Raises Failed, as `settings_of`.
    """
    problems = [f"--{flag}: {reason}" for flag, reason in REFUSED.items() if _is_given(ctx, _foreign(flag))]
    above = _above(ctx, problems)
    # An empty variable of a setting has been refused already, with the empty flags.
    problems += problems_of(os.environ)
    if path is None and _is_given(ctx, "config"):
        path = Path(ctx.params["config"])
    try:
        return merge_settings(above, path, problems, look_at_files=look_at_files)
    except ConfigError as error:
        raise Failed(str(error), WRONG_REQUEST) from None


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def _above(ctx: click.Context, problems: list[str]) -> dict[str, ConfiguredValue]:
    """Return the values of flags and variables; append a line for each that cannot be converted."""
    above: dict[str, ConfiguredValue] = {}
    for name, origin, knob in _given_knobs(ctx):
        value = ctx.params[name]
        try:
            if knob.kind is ValueSyntax.PREFIXES:
                # A flag is one prefix, with any characters; a variable separates several by commas.
                parts = value if origin == knob.flag else ",".join(value).split(",")
                above[knob.path] = ConfiguredValue(list(parts), origin)
            else:
                above[knob.path] = ConfiguredValue(
                    from_text(knob, value if isinstance(value, str) else ",".join(value)), origin
                )
        except BadValue as error:
            problems.append(f"{origin}: {error}")
    if _is_given(ctx, "debug"):
        try:
            if parse_switch(ctx.params["debug"]):
                above.setdefault("log.log_level", ConfiguredValue("debug", "--debug"))
        except BadValue as error:
            problems.append(f"--debug: {error}")
    return above


def _given_knobs(ctx: click.Context) -> Iterator[tuple[str, str, Knob]]:
    """Yield the parameter name, the origin and the knob of each setting that a flag or a variable sets."""
    for knob in knobs():
        name = _parameter(knob)
        if _is_given(ctx, name):
            variable = ctx.get_parameter_source(name) is ParameterSource.ENVIRONMENT
            yield name, knob.env if variable else knob.flag, knob
