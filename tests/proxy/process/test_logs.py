"""The log: two formats, levels, and no secrets."""

from __future__ import annotations

import io
import json
import os
import pty
import socket
from collections.abc import Callable

import pytest

from proxy import logs


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def lines_of(level: str, style: str) -> io.StringIO:
    """Configure the log for a new stream."""
    stream = io.StringIO()
    logs.configure(level, style, stream)
    return stream


def test_json_off_a_terminal() -> None:
    stream = lines_of("info", "auto")
    logs.logger("engine").info("watch opened", key=b"/a/\xff", revision=7)
    line = json.loads(stream.getvalue())
    assert line["msg"] == "watch opened"
    assert line["level"] == "info"
    assert line["component"] == "engine"
    assert line["key"] == "/a/\\xff"
    assert line["revision"] == 7
    assert line["ts"].endswith("Z")


def test_console_when_asked() -> None:
    stream = lines_of("info", "console")
    logs.logger("engine").warning("etcd is gone", endpoint="127.0.0.1:1")
    assert "etcd is gone" in stream.getvalue()
    assert "{" not in stream.getvalue()


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_no_color_is_respected(no_color: str, coloured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    stream = Terminal()
    logs.configure("info", "auto", stream)
    logs.logger("engine").info("serving")
    assert ("\x1b[" in stream.getvalue()) is coloured


@pytest.mark.parametrize(("level", "expected"), [("debug", 4), ("info", 3), ("warn", 2), ("error", 1)])
def test_only_messages_of_the_level_are_logged(level: str, expected: int) -> None:
    stream = lines_of(level, "json")
    log = logs.logger("x")
    log.debug("1")
    log.info("2")
    log.warning("3")
    log.error("4")
    assert len(stream.getvalue().splitlines()) == expected


def test_a_logger_made_before_follows_a_later_configure() -> None:
    log = logs.logger("early")
    stream = lines_of("info", "json")
    log.info("hello")
    assert json.loads(stream.getvalue())["msg"] == "hello"


@pytest.mark.parametrize("field", sorted(logs.SECRET_FIELDS))
@pytest.mark.parametrize("style", ["json", "console"])
def test_secrets_are_blanked(field: str, style: str) -> None:
    stream = lines_of("debug", style)
    logs.logger("x").info("created", **{field: b"hunter2"})
    assert "hunter2" not in stream.getvalue()


@pytest.mark.parametrize(("level", "style"), [("loud", "json"), ("info", "xml")])
def test_unknown_settings_are_refused(level: str, style: str) -> None:
    with pytest.raises(ValueError, match="use one of"):
        logs.configure(level, style)


def test_a_line_is_written_in_one_piece() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # As standard error with PYTHONUNBUFFERED: what is written is not gathered.
    with ours, theirs, io.TextIOWrapper(io.FileIO(theirs.fileno(), "w", closefd=False), write_through=True) as stream:
        logs.configure("info", "json", stream)
        logs.logger("x").info("whole")
        assert ours.recv(4096).endswith(b'"msg": "whole"}\n')


def test_a_line_that_cannot_be_written_is_lost_and_counted() -> None:
    before = logs.lines_lost()
    with open("/dev/full", "w") as full:
        logs.configure("info", "json", full)
        logs.logger("x").error("the disk is full")
        logs.logger("x").exception("the disk is full")
    assert logs.lines_lost() == before + 2


def _written_until_lost(stream: io.TextIOWrapper) -> int:
    """Log lines that nothing reads until one is lost; return how many were written."""
    logs.configure("info", "json", stream)
    before, log = logs.lines_lost(), logs.logger("x")
    for count in range(10_000):
        log.info("nothing reads this line")
        if logs.lines_lost() > before:
            return count
    raise AssertionError("no line was lost")


@pytest.mark.parametrize("make", [os.pipe, pty.openpty], ids=["pipe", "terminal"])
def test_a_log_that_is_not_read_blocks_nothing(make: Callable[[], tuple[int, int]]) -> None:
    reader, writer = make()
    with open(writer, "w") as stream:
        assert _written_until_lost(stream) > 1
        assert os.get_blocking(writer)  # others have this descriptor too
        received = b""
        while b"read again" not in received:
            received = received[-20:] + os.read(reader, 1 << 20)
            logs.logger("x").info("read again")
    os.close(reader)


def test_a_log_socket_that_is_not_read_blocks_nothing() -> None:
    ours, theirs = socket.socketpair()  # as to journald
    with ours, theirs, open(theirs.fileno(), "w", closefd=False) as stream:
        assert _written_until_lost(stream) > 1
        assert os.get_blocking(theirs.fileno())


def test_a_line_after_a_torn_one_is_whole() -> None:
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        logs.configure("info", "json", stream)
        logs.logger("x").info("long", text="x" * (1 << 17))
        os.read(reader, 1 << 17)
        logs.logger("x").info("whole")
        torn, line = os.read(reader, 1 << 17).split(b"\n", 1)
        assert torn == b""
        assert json.loads(line)["msg"] == "whole"
    os.close(reader)


def test_changed_settings_leave_no_descriptor_open() -> None:
    reader, writer = os.pipe()
    with open(writer, "w") as stream, open("/dev/null", "w") as other:
        logs.configure("info", "json", other)
        before = len(os.listdir("/proc/self/fd"))
        logs.configure("info", "json", stream)
        logs.configure("debug", "json", stream)
        assert len(os.listdir("/proc/self/fd")) == before + 1
        logs.configure("debug", "json", other)
        assert len(os.listdir("/proc/self/fd")) == before
    os.close(reader)


def test_without_standard_error_nothing_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    logs.configure()
    logs.logger("x").info("hello")
