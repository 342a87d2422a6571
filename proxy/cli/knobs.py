"""The settings as click options, and the result of flags, environment and file together.

Options are generated from the settings (proxy/config), so flags, variables and file keys cannot diverge. The other
flags of `etcd grpc-proxy start` are known as well: its users change one word in their command line, so each flag is
either accepted with a log message, or refused with the reason, never an "unknown option".
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


def knob_options(function: Function) -> Function:
    """Add every setting as an option, `--config`, `--debug` and grpc-proxy's other flags."""
    for name in (*TAKEN, *REFUSED):
        # The value is optional, so that both switches and flags with a value are accepted.
        function = click.option(f"--{name}", _foreign(name), is_flag=False, flag_value="true", hidden=True)(function)
    for knob in reversed(knobs()):
        function = _option(knob)(function)
    function = click.option("--debug", is_flag=True, help="Same as --log-level=debug.")(function)
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
        help=f"{knob.about.text}{_default(knob)}",
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

    Raises Failed, with the exit code of a wrong request, for an invalid setting.
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
    notes = [f"--{flag} has no effect: {reason}" for flag, reason in TAKEN.items() if _foreign(flag) in given]
    return layer(above, below), notes + unknown_variables(os.environ)


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return a note for each unknown WATCHMUX_* variable: most likely a misspelling.

    Kubernetes sets such variables in every pod for a Service named watchmux; these are ignored.
    """
    known = [knob.env for knob in knobs()] + [CONFIG_ENV]
    foreign = tuple(ENV_PREFIX + name for name in ("SERVICE_", "PORT", "STORE_"))
    notes = []
    for name in sorted(environment):
        if name.startswith(ENV_PREFIX) and name not in known and not name.startswith(foreign):
            import difflib  # for mistakes only

            close = difflib.get_close_matches(name, known, 1)
            notes.append(f"unknown environment variable {name}" + (f"; did you mean {close[0]}?" if close else ""))
    return notes
