"""Logging with structlog: readable on a terminal, otherwise one JSON object per line.

Other people's data passes through a proxy, so its log must never contain a value or a credential. Fields whose names
suggest one are blanked here, in one place, for all callers.

A line that cannot be written (the disk is full, the reader of the pipe has ended) is lost and counted: the proxy serves
clients with or without a log.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO, cast

_UNLOADED = "rich" not in sys.modules
if _UNLOADED:
    # If rich is installed, structlog imports it for tracebacks on a console. That costs 4 MiB of memory, even if the
    # log is JSON. While the entry is None the import fails, and structlog prints plain tracebacks.
    sys.modules["rich"] = None  # type: ignore[assignment]  # the documented way to make an import fail

import structlog  # noqa: E402
from structlog.typing import FilteringBoundLogger, Processor  # noqa: E402

if _UNLOADED:
    del sys.modules["rich"]  # other modules may import it

LEVELS = ("debug", "info", "warn", "error", "fatal")
"""Level names, the same as those of etcd's --log-level."""

STYLES = ("auto", "console", "json")

SECRET_FIELDS = frozenset(
    {"authorization", "metadata", "password", "prev_kv", "prev_value", "secret", "token", "user_password", "value"}
)

TALKATIVE = ("hpack", "hpack.hpack", "hpack.table")
"""Loggers of libraries that are kept at WARNING."""


_process = ""
_lost = 0


def lines_lost() -> int:
    """Return how many lines could not be written."""
    return _lost


class _LineWriter:
    """Write each line in one piece, so that the lines of several processes in one file stay whole.

    That does not depend on Python's buffers, which PYTHONUNBUFFERED turns off.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        try:
            self._fd = None if stream is None else stream.fileno()
        except (OSError, ValueError):
            self._fd = None  # a stream in memory

    def msg(self, line: str) -> None:
        global _lost
        try:
            if self._fd is not None:
                data = f"{line}\n".encode("utf-8", "backslashreplace")
                _lost += os.write(self._fd, data) < len(data)
            elif self._stream is not None:
                self._stream.write(f"{line}\n")
        except (OSError, ValueError):
            _lost += 1

    debug = info = warn = warning = error = critical = exception = fatal = msg


def name_process(name: str) -> None:
    """Put the name of this process, one of several, into each line from the next `configure` on."""
    global _process
    _process = name


def _add_process(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["process"] = _process
    return event


def configure(level: str = "info", style: str = "auto", stream: TextIO | None = None) -> None:
    """Set up logging for the process.

    `level`: one of LEVELS. `style`: one of STYLES; auto means console on a terminal and json elsewhere. `stream`:
    the output, standard error when None. Raises ValueError for an unknown level or style.
    """
    if level not in LEVELS:
        raise ValueError(f"log level {level!r} is unknown: use one of {', '.join(LEVELS)}")
    if style not in STYLES:
        raise ValueError(f"log style {style!r} is unknown: use one of {', '.join(STYLES)}")
    # These libraries would log header fields, tokens included, if the root logger were set to DEBUG.
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    target = sys.stderr if stream is None else stream
    terminal = target is not None and target.isatty()  # None: it was closed when the program started
    readable = style == "console" or (style == "auto" and terminal)
    processors: list[Processor] = [structlog.processors.add_log_level, blank_secrets, show_bytes]
    if _process:
        processors.append(_add_process)
    if readable:
        processors += [
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(
                colors=terminal and not os.environ.get("NO_COLOR"),
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
    else:
        processors += [
            structlog.processors.TimeStamper(fmt="iso", key="ts"),
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("msg"),
            structlog.processors.JSONRenderer(sort_keys=False),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_level_number(level)),
        logger_factory=lambda *_: _LineWriter(target),
        cache_logger_on_first_use=False,
    )


def _level_number(level: str) -> int:
    return {"warn": logging.WARNING, "fatal": logging.CRITICAL}.get(level) or int(getattr(logging, level.upper()))


def logger(component: str) -> FilteringBoundLogger:
    """Return a logger whose lines carry the name of a component of the program.

    It is lazy: a logger made at import time follows a later `configure`.
    """
    return cast(FilteringBoundLogger, structlog.get_logger(component=component))


def blank_secrets(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Blank every field that could hold a key's value or a credential."""
    for name in event:
        if name in SECRET_FIELDS:
            event[name] = "***"
    return event


def show_bytes(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Turn bytes (keys) into text that is safe for a terminal and for JSON, cut at 200 bytes."""
    for name, value in event.items():
        if isinstance(value, bytes):
            event[name] = value[:200].decode("utf-8", "backslashreplace")
    return event
