"""Logging with structlog: readable on a terminal, otherwise one JSON object per line.

Other people's data passes through a proxy, so its log must never contain a value or a credential. Fields whose names
suggest one are blanked here, in one place, for all callers.

A line that cannot be written (the disk is full, the reader of a pipe has ended or takes nothing) is lost and counted:
the proxy serves clients with or without a log, and one reader that hangs must not stop them. The kernel's buffer of the
pipe (64 KiB) or socket (some 200 KiB) is the queue.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
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
    """Write each line in one piece, so that the lines of several processes in one file stay whole, and never wait.

    The first does not depend on Python's buffers, which PYTHONUNBUFFERED turns off. O_NONBLOCK is not set at the
    descriptor itself: it would change it for all processes that have it, such as the shell.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        """None: nothing is written."""
        self._socket: socket.socket | None = None
        self._opened: int | None = None
        self._before = ""
        """A newline if the last line was written in part."""
        try:
            self._fd = None if stream is None else stream.fileno()
        except (OSError, ValueError):
            self._fd = None  # a stream in memory
        if self._fd is not None:
            self._open(self._fd)

    def _open(self, fd: int) -> None:
        """Open a pipe or a terminal again, without waiting; writes wait if the system does not permit this."""
        try:
            mode = os.fstat(fd).st_mode
            if stat.S_ISSOCK(mode):
                self._socket = socket.socket(fileno=os.dup(fd))
            elif stat.S_ISFIFO(mode) or os.isatty(fd):
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self._fd = self._opened = os.open(f"/proc/self/fd/{fd}", flags)
        except OSError:
            pass

    def close(self) -> None:
        """Close what was opened here."""
        if self._socket is not None:
            self._socket.close()
        if self._opened is not None:
            os.close(self._opened)
        self._socket = self._opened = self._fd = self.stream = None

    def msg(self, line: str) -> None:
        global _lost
        try:
            if self._fd is not None:
                data = f"{self._before}{line}\n".encode("utf-8", "backslashreplace")
                if self._socket is not None:
                    sent = self._socket.send(data, socket.MSG_DONTWAIT)
                else:
                    sent = os.write(self._fd, data)
                self._before = "\n" if sent < len(data) else ""
                _lost += sent < len(data)
            elif self.stream is not None:
                self.stream.write(f"{line}\n")
        except (OSError, ValueError):
            _lost += 1

    debug = info = warn = warning = error = critical = exception = fatal = msg


_writer = _LineWriter(None)


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
    global _writer
    if _writer.stream is not target:
        _writer.close()
        _writer = _LineWriter(target)
    writer = _writer
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_level_number(level)),
        logger_factory=lambda *_: writer,
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
