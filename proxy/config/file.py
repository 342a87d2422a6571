"""Settings from their sources: flags and environment over the configuration file over the defaults.

All sources share the same checks. Every error is one line that names the origin of the value (a flag, a variable, a
line of the file), the problem and the remedy, and all errors are reported at once. A value that is given but empty is
an error: a setting that is meant to be unset is left out.
"""

from __future__ import annotations

import math
import operator
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from proxy.config.describing import ValueSyntax
from proxy.config.knobs import Knob, Settings, knobs, tables
from proxy.config.values import (
    COUNT_MAX,
    SECONDS_MAX,
    BadValue,
    check_readable,
    client_url,
    parse_duration_s,
    parse_listen_address,
    parse_metrics_address,
    parse_size_bytes,
    shortened,
    show_duration,
)

# The forms of Go's strconv.ParseBool, which etcd's flags take, and the usual words.
_TRUTH = {
    **dict.fromkeys(("true", "t", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "f", "0", "no", "off"), False),
}
_SAME_CHOICE = {"warning": "warn", "dpanic": "fatal", "panic": "fatal"}
"""Other names for a choice; those of the log levels are zap's, which etcd uses."""

_TOML_PLACE = re.compile(r"\s*\(at line (\d+), column (\d+)\)")
_FILE_CHARACTERS_MAX = 2**20
"""A device or a pipe may have no end."""
_LARGEST = {ValueSyntax.SECONDS: SECONDS_MAX}
_BOUNDS = {"ge": (">=", operator.ge), "gt": (">", operator.gt), "le": ("<=", operator.le)}


class ConfigError(ValueError):
    """Invalid settings; each line of the text is a complete message, including the origin of the value."""


class ConfiguredValue(msgspec.Struct, frozen=True):
    """A value and its origin: `--linger`, `WATCHMUX_LINGER`, `watchmux.toml:7: watch.linger_s`."""

    value: Any
    origin: str


def from_text(knob: Knob, text: str) -> Any:
    """Convert the text of a flag or variable to the setting's type.

    Raises BadValue.
    """
    match knob.kind:
        case ValueSyntax.SECONDS:
            return parse_duration_s(text)
        case ValueSyntax.BYTES:
            return parse_size_bytes(text)
        case ValueSyntax.COUNT:
            try:
                return int(text.replace("_", ""))
            except ValueError:
                raise BadValue(f"expected {expectation(knob)}, got {shortened(text)}") from None
        case ValueSyntax.SWITCH:
            return parse_switch(text)
        case ValueSyntax.CHOICE:
            return same_choice(knob, text)
        case ValueSyntax.ENDPOINTS:
            return [part.strip() for part in text.split(",")]
        case ValueSyntax.PREFIXES:
            return [text]
        case _:
            return text


def parse_switch(text: str) -> bool:
    """Parse a switch, in the forms that Go's flags take and the usual words. Raises BadValue."""
    if text.strip().lower() not in _TRUTH:
        raise BadValue(f"expected true or false, got {text!r}")
    return _TRUTH[text.strip().lower()]


def same_choice(knob: Knob, text: str) -> str:
    """Return the choice that is meant: in any case, or by another name; any other text is returned as it is."""
    plain = text.strip().lower()
    plain = _SAME_CHOICE.get(plain, plain)
    return next((choice for choice in knob.choices if choice.lower() == plain), text)


def expectation(knob: Knob, *, in_file: bool = False) -> str:
    """Describe the allowed values of a setting; a duration is one number in a file, with the unit in its key."""
    unit = "s" if knob.kind is ValueSyntax.SECONDS and not in_file else ""
    bounds = [f"{_BOUNDS[name][0]} {bound}{unit}" for name, bound in knob.about.bounds.items()]
    plain = {
        ValueSyntax.SECONDS: "a number of seconds" if in_file else "a duration",
        ValueSyntax.BYTES: "a whole number of bytes",
        ValueSyntax.COUNT: "a whole number",
        ValueSyntax.SWITCH: "true or false",
        ValueSyntax.CHOICE: "one of " + ", ".join(knob.choices),
        ValueSyntax.ENDPOINTS: 'a list of strings like ["127.0.0.1:2379"]',
        ValueSyntax.PREFIXES: 'a list of strings like ["/services/"]',
    }.get(knob.kind, "a string")
    return " ".join([plain, " and ".join(bounds)]).strip()


def check_value(knob: Knob, given: ConfiguredValue, *, look_at_files: bool = True) -> Any:
    """Return the value, checked and converted for its field of Settings.

    Raises ConfigError.
    """
    if _is_empty(given.value) and knob.kind is not ValueSyntax.PREFIXES:
        raise ConfigError(f"{given.origin}: is empty; give it a value or remove it")
    if knob.kind is ValueSyntax.CHOICE and isinstance(given.value, str):
        given = ConfiguredValue(same_choice(knob, given.value), given.origin)
    try:
        value = msgspec.convert(given.value, knob.type, strict=True)
        if isinstance(value, float) and not math.isfinite(value):
            raise msgspec.ValidationError
        if not all(_BOUNDS[name][1](value, bound) for name, bound in knob.about.bounds.items()):
            raise msgspec.ValidationError
        if isinstance(value, int | float) and value > (largest := _LARGEST.get(knob.kind, COUNT_MAX)):
            raise ConfigError(f"{given.origin}: {_shown(given.value)} is too large; the maximum is {largest}")
    except msgspec.ValidationError:
        in_file = given.origin.endswith(knob.path)
        shown = _shown(given.value)
        if knob.kind is ValueSyntax.SECONDS and not in_file:
            shown = repr(show_duration(given.value))
        raise ConfigError(f"{given.origin}: expected {expectation(knob, in_file=in_file)}, got {shown}") from None
    checks: dict[ValueSyntax, Callable[[Any], object]] = {
        ValueSyntax.ADDRESS: parse_listen_address,
        ValueSyntax.METRICS_ADDRESS: parse_metrics_address,
        ValueSyntax.CLIENT_URL: client_url,
        ValueSyntax.FILE: check_readable,
        ValueSyntax.ENDPOINTS: _check_endpoints,
        ValueSyntax.PREFIXES: _check_prefixes,
    }
    try:
        if value and knob.kind in checks and (look_at_files or knob.kind is not ValueSyntax.FILE):
            checks[knob.kind](value)
    except ValueError as error:
        raise ConfigError(f"{given.origin}: {error}") from None
    return value


def _is_empty(value: object) -> bool:
    """Whether a value is given but empty: nothing is left of it without spaces and commas."""
    if isinstance(value, list):
        return all(_is_empty(part) for part in value)
    return isinstance(value, str) and not value.strip(" ,")


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else shortened(value)


def _check_endpoints(endpoints: list[str]) -> None:
    from upstream.endpoints import parse_endpoints  # here: the example file and --help do not need `upstream`
    from upstream.errors import BadEndpoint

    try:
        parse_endpoints(endpoints)
    except BadEndpoint as error:
        raise BadValue(str(error)) from None


def _check_prefixes(prefixes: list[str]) -> None:
    repeated = next((prefix for place, prefix in enumerate(prefixes) if prefix in prefixes[:place]), None)
    if repeated is not None:
        raise BadValue(f"{repeated!r} is given twice; give each prefix once")


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n".join(problems))


def _read(path: Path, problems: list[str]) -> dict[str, ConfiguredValue]:
    """Read the file; append a line for each unknown table or key. Raises ConfigError for a file that is not TOML."""
    try:
        with path.open(encoding="utf-8-sig") as file:  # some editors begin a file with a byte order mark
            text = file.read(_FILE_CHARACTERS_MAX + 1)
        too_long = len(text) > _FILE_CHARACTERS_MAX
        document = {} if too_long else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read file: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file: byte {error.start} is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        place = _TOML_PLACE.search(str(error))
        where = f"{path}:{place.group(1)}" if place else str(path)
        reason = _TOML_PLACE.sub("", str(error))
        raise ConfigError(f"{where}: not TOML: {reason[:1].lower() + reason[1:]}") from None
    except (ValueError, RecursionError):
        # tomllib lets these through: int() refuses more than 4,300 digits, and nested values exhaust the stack.
        raise ConfigError(f"{path}: not TOML: a number has too many digits, or values are nested too deeply") from None
    if too_long:
        raise ConfigError(f"{path}: longer than {_FILE_CHARACTERS_MAX} characters; give a configuration file")
    given: dict[str, ConfiguredValue] = {}
    by_path = {knob.path: knob for knob in knobs()}
    for table, content in document.items():
        if table not in tables():
            problems.append(_unknown(path, text, table, isinstance(content, dict)))
            continue
        if not isinstance(content, dict):
            problems.append(f"{_place(path, text, '', table)}: {table} is a table; write [{table}] on its own line")
            continue
        for key, value in content.items():
            where = _place(path, text, table, key)
            name = f"{table}.{key}"
            if name not in by_path:
                known = [knob.key for knob in knobs() if knob.table == table]
                problems.append(f"{where}: unknown key {key!r} in [{table}]{_hint(key, known, table)}")
                continue
            given[name] = ConfiguredValue(value, f"{where}: {name}")
    return given


def _unknown(path: Path, text: str, name: str, is_table: bool) -> str:
    where = _place(path, text, "", name)
    if is_table:
        return f"{where}: unknown table [{name}]{_hint(name, list(tables()))}; known tables: {', '.join(tables())}"
    return f"{where}: unknown key {name!r} outside a table{_hint(name, [knob.key for knob in knobs()])}"


def _hint(wrong: str, known: list[str], table: str = "") -> str:
    """Suggest a correction: the same key in another table, or the closest spelling."""
    elsewhere = next((knob for knob in knobs() if knob.key == wrong and knob.table != table), None)
    if elsewhere is not None:
        return f"; it belongs in [{elsewhere.table}]"
    flagged = next((knob for knob in knobs() if wrong.replace("_", "-") == knob.flag.removeprefix("--")), None)
    if flagged is not None:
        return f"; did you mean {flagged.key!r}?"
    import difflib  # for mistakes only

    close = difflib.get_close_matches(wrong, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _place(path: Path, text: str, table: str, key: str) -> str:
    """Return FILE:LINE of a key, found by a simple line scan; FILE alone if the scan does not find it."""
    current = ""
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[\s*([\w.\"'-]+)\s*\]", line)
        if header:
            current = header.group(1).strip("\"'")
            if not table and current == key:
                return f"{path}:{number}"
        elif current == table and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]", line):
            return f"{path}:{number}"
    return str(path)


def merge_settings(
    above: Mapping[str, ConfiguredValue], path: Path | None, problems: list[str], *, look_at_files: bool = True
) -> tuple[Settings, dict[str, ConfiguredValue]]:
    """Build the settings; return them and all given values.

    `above` (flags and variables) overrides the file at `path`, which overrides the defaults. It maps `table.key` to a
    value of the setting's type. With `look_at_files` False, certificates need not exist, for checking a file on another
    machine. `problems` are those already found; ConfigError has them and those found here.
    """
    try:
        merged = {**(_read(path, problems) if path is not None else {}), **above}
    except ConfigError as error:
        raise ConfigError("\n".join([*problems, str(error)])) from None
    settings = _build(merged, problems, look_at_files)
    _raise(problems)
    return settings, merged


def _build(merged: Mapping[str, ConfiguredValue], problems: list[str], look_at_files: bool) -> Settings:
    """Check all values, then those that depend on each other, and append a line for each problem."""
    values: dict[str, dict[str, Any]] = {table: {} for table in tables()}
    wrong = set()
    for knob in knobs():
        given = merged.get(knob.path)
        if given is None:
            continue
        try:
            values[knob.table][knob.key] = check_value(knob, given, look_at_files=look_at_files)
        except ConfigError as error:
            problems.append(str(error))
            wrong.add(knob.path)
    settings = msgspec.convert(values, Settings, strict=True)
    problems += _check_together(settings, merged, wrong)
    if look_at_files and not problems:
        problems += _check_certificates(settings, merged)
    return settings


def _origin(path: str, given: Mapping[str, ConfiguredValue]) -> str:
    return given[path].origin if path in given else next(knob.flag for knob in knobs() if knob.path == path)


def _check_together(settings: Settings, given: Mapping[str, ConfiguredValue], wrong: set[str]) -> Iterator[str]:
    """Check combinations: settings that require each other, and one address used twice; yield the problems.

    `wrong`: values that were refused and say nothing here.
    """
    by_path = {knob.path: knob for knob in knobs()}
    upstream, listener = settings.upstream, settings.listener
    for first, second, values in (
        ("upstream.cert", "upstream.key", (upstream.cert, upstream.key)),
        ("upstream.user", "upstream.password", (upstream.user, upstream.password)),
        ("listener.cert_file", "listener.key_file", (listener.cert_file, listener.key_file)),
    ):
        if bool(values[0]) != bool(values[1]) and wrong.isdisjoint((first, second)):
            there, missing = (first, second) if values[0] else (second, first)
            yield f"{_origin(there, given)}: requires {by_path[missing].flag}"
    no_certificate = not listener.cert_file and "listener.cert_file" not in wrong
    if listener.trusted_ca_file and no_certificate:
        yield f"{_origin('listener.trusted_ca_file', given)}: requires --cert-file and --key-file"
    if listener.listen_addr.lower().startswith("unixs:") and no_certificate:
        yield f"{_origin('listener.listen_addr', given)}: unixs requires --cert-file and --key-file"
    unset = {"upstream.endpoints", "upstream.discovery_srv"}.isdisjoint(wrong | given.keys())
    if unset and not upstream.bundled_store:
        forbidden = _origin("upstream.bundled_store", given)
        yield f"no etcd is configured: give --endpoints=HOST:PORT[,...] ({forbidden} forbids the bundled store)"
    if settings.admin.metrics_addr:
        metrics = parse_metrics_address(settings.admin.metrics_addr)
        listen = parse_listen_address(listener.listen_addr)
        if metrics.port and metrics.port == listen.port and _overlap(metrics.host, listen.host):
            yield f"{_origin('admin.metrics_addr', given)}: {metrics} is --listen-addr; use another port"


def _overlap(one: str, other: str) -> bool:
    """Return whether two listen hosts are the same, or one of them means all interfaces."""
    return one == other or not {one, other}.isdisjoint(("", "0.0.0.0", "::"))


def _check_certificates(settings: Settings, given: Mapping[str, ConfiguredValue]) -> Iterator[str]:
    """Load all TLS files, so that a bad one is refused at start and not at the first handshake; yield the problems."""
    upstream, listener = settings.upstream, settings.listener
    if not (upstream.cert or upstream.cacert or listener.cert_file):
        return
    from upstream.errors import BadTls  # imported here because ssl costs 15 ms and memory
    from upstream.tls import client_context, server_context

    path = "upstream.cert" if upstream.cert else "upstream.cacert"
    try:
        client_context(upstream.cert or None, upstream.key or None, upstream.cacert or None)
    except BadTls as error:
        yield f"{_origin(path, given)}: {error}"
    try:
        if listener.cert_file:
            server_context(listener.cert_file, listener.key_file, listener.trusted_ca_file or None)
    except BadTls as error:
        yield f"{_origin('listener.cert_file', given)}: {error}"
