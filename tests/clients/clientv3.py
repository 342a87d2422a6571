"""The Go program in `go/` as a process: its flags, and the JSON lines that it prints."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, Self

from tests.clients.golang import program
from tests.waiting import until

Line = dict[str, Any]


class Clientv3:
    """One run of a subcommand (`watch`, `load`) on `endpoints` (HOST:PORT[,...]). Use as a context manager."""

    def __init__(self, subcommand: str, endpoints: str, *flags: str) -> None:
        self._command = [str(program()), subcommand, f"--endpoints={endpoints}", *flags]
        self._process: subprocess.Popen[str] | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._lines: list[Line] = []

    def __enter__(self) -> Self:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, text=True)
        self._reader.start()
        return self

    def __exit__(self, error: object, *_rest: object) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join(10)
        if error is not None:
            sys.stderr.write(f"{' '.join(self._command[1:])} printed: {self._lines[-20:]}\n")
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for text in self._process.stdout:
            self._lines.append(json.loads(text))

    def lines(self, kind: str = "") -> list[Line]:
        """Return what it has printed so far, or the lines of one kind."""
        return [line for line in self._lines if not kind or line["kind"] == kind]

    def events(self) -> list[int]:
        """Return the revisions of all events of a watch so far."""
        return [revision for line in self.lines("response") for revision in line["revisions"]]

    def until(self, found: Callable[[Line], Any], what: str, timeout_s: float = 30.0) -> Line:
        """Return the first line that `found` accepts, as soon as it is printed."""
        return until(lambda: next((line for line in self.lines() if found(line)), None) or {}, what, timeout_s)

    def finish(self, timeout_s: float = 30.0) -> list[Line]:
        """Close its stdin, wait until it ends and return everything that it printed."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 30.0) -> list[Line]:
        """Wait until it ends by itself and return everything that it printed."""
        assert self._process is not None
        assert self._process.wait(timeout_s) == 0
        self._reader.join(timeout_s)
        return self.lines()

    def summary(self) -> Line:
        """Return the summary of a load that has ended."""
        return self.lines("summary")[0]
