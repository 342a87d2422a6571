"""The knobs as click options, and the settings that flags, environment and file give together.

Options are made from the knobs (proxy/config), so flags, variables and file keys cannot drift apart. Beside them stand
the flags of `etcd grpc-proxy start` that mean nothing here: its users change one word in their command line, so
each is either taken and named in the log, or refused with the reason, never an "unknown option".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from proxy.config.describing import Kind
from proxy.config.file import ConfigError, Given, from_text, layer, read_file
from proxy.config.knobs import Knob, Settings, knobs, tables
from proxy.config.values import ENV_PREFIX, BadValue, show_duration, show_size
from proxy.errors import WRONG_REQUEST, Failed

Function = TypeVar("Function", bound=Callable[..., Any])
CONFIG_ENV = "WATCHMUX_CONFIG"

TAKEN = {
    "permit-without-stream": "connections to etcd are always kept alive",
    "max-send-bytes": "etcd decides on sizes",
    "max-recv-bytes": "etcd decides on sizes",
    "data-dir": "nothing is kept on disk",
    "self-signed-cert-validity": "certificates are not made here",
    "experimental-serializable-ordering": "reads pass through to etcd untouched",
    "experimental-enable-grpc-logging": "use --log-level=debug",
}
"""Flags of etcd's grpc-proxy that change nothing here, and why."""

REFUSED = {
    "resolver-prefix": "registering the proxy in etcd is not there; give clients its address",
    "resolver-ttl": "registering the proxy in etcd is not there; give clients its address",
    "endpoints-auto-sync-interval": "endpoints are not read from etcd; name all of them in --endpoints",
    "auto-tls": "certificates are not made here; give --cert-file and --key-file",
    "client-crl-file": "revocation lists are not there yet",
    "listen-cipher-suites": "choosing cipher suites is not there yet",
    "tls-max-version": "TLS 1.3 is served to those who speak it; limiting it is not there",
    "enable-pprof": "that is Go's profiler",
    "experimental-leasing-prefix": "leasing is not there: reads pass through to etcd untouched",
}
"""Flags of etcd's grpc-proxy that would promise something not done here, and why."""


def knob_options(function: Function) -> Function:
    """Give a command every knob as an option, `--config`, `--debug` and grpc-proxy's other flags."""
    for name in (*TAKEN, *REFUSED):
        # The value is optional, so that switches and flags with a value are both taken.
        function = click.option(f"--{name}", _foreign(name), is_flag=False, flag_value="true", hidden=True)(function)
    for knob in reversed(knobs()):
        function = _option(knob)(function)
    function = click.option("--debug", is_flag=True, help="The same as --log-level=debug.")(function)
    return click.option("--config", envvar=CONFIG_ENV, metavar="FILE.toml", help="Read settings from this file.")(
        function
    )


def _foreign(flag: str) -> str:
    return "foreign_" + flag.replace("-", "_")


def _parameter(knob: Knob) -> str:
    return knob.path.replace(".", "__")


def _option(knob: Knob) -> Callable[[Function], Function]:
    switch: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if knob.kind is Kind.SWITCH else {}
    return click.option(
        knob.flag,
        _parameter(knob),
        envvar=knob.env,
        type=click.Choice(knob.choices) if knob.choices else str,
        metavar=None if knob.choices else "[true|false]" if switch else knob.kind.value.upper(),
        help=f"{knob.text}{_default(knob)}",
        hidden=knob.advanced,
        **switch,
    )


def _default(knob: Knob) -> str:
    if knob.default in ("", [], False):
        return ""
    match knob.kind:
        case Kind.SECONDS:
            shown = show_duration(knob.default)
        case Kind.BYTES:
            shown = show_size(knob.default)
        case _:
            shown = str(knob.default)
    return f"  [default: {shown}]"


class KnobCommand(click.Command):
    """A command whose help groups the knobs as the configuration file does, and tells how the sources are ranked."""

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
        with formatter.section("Options of the command"):
            formatter.write_dl(own, col_max=34)
        formatter.write_paragraph()
        formatter.write_text(
            "A flag goes before its environment variable, that before the configuration file, that before the default. "
            "The variable of --listen-addr is WATCHMUX_LISTEN_ADDR, and so for every flag; `watchmux config` prints a "
            "file with every knob, its unit and what it trades for what. Durations: 500ms, 10s, 1m30s. Sizes: 64MiB."
        )


def settings_of(ctx: click.Context) -> tuple[Settings, list[str]]:
    """Return the settings that a command's flags, environment and file give, and notes for the log.

    Raises Failed, with the exit code of a wrong request, for anything that cannot be used.
    """
    try:
        return _settings_of(ctx)
    except ConfigError as error:
        raise Failed(str(error), WRONG_REQUEST) from None


def _settings_of(ctx: click.Context) -> tuple[Settings, list[str]]:
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    given = {
        name: str(ctx.params[name])
        for name, source in sources.items()
        if source in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    }
    for flag, reason in REFUSED.items():
        if _foreign(flag) in given:
            raise ConfigError(f"--{flag}: {reason}")
    above: dict[str, Given] = {}
    for knob in knobs():
        name = _parameter(knob)
        if name not in given:
            continue
        origin = knob.env if sources[name] is ParameterSource.ENVIRONMENT else knob.flag
        try:
            above[knob.path] = Given(from_text(knob, given[name]), origin)
        except BadValue as error:
            raise ConfigError(f"{origin}: {error}") from None
    if "debug" in given:
        above.setdefault("log.log_level", Given("debug", "--debug"))
    below = read_file(Path(given["config"])) if "config" in given else {}
    notes = [f"--{flag} changes nothing here: {reason}" for flag, reason in TAKEN.items() if _foreign(flag) in given]
    return layer(above, below), notes + unknown_variables(os.environ)


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return a note for each variable that looks like ours and is none: most likely a mistake in spelling.

    Kubernetes gives every pod such variables for a Service that is called watchmux; those are passed over.
    """
    known = [knob.env for knob in knobs()] + [CONFIG_ENV]
    foreign = tuple(ENV_PREFIX + name for name in ("SERVICE_", "PORT", "STORE_"))
    notes = []
    for name in sorted(environment):
        if name.startswith(ENV_PREFIX) and name not in known and not name.startswith(foreign):
            import difflib  # for mistakes only

            close = difflib.get_close_matches(name, known, 1)
            notes.append(f"{name} is no variable of watchmux" + (f"; did you mean {close[0]}?" if close else ""))
    return notes
