"""Child processes: how they report that they are ready, and how they exit with their parent.

`serve` starts the bundled store; `demo` and `measure` start a store, a proxy and load clients, each in its own process.
Parent and child share one socket pair. The child writes one JSON line when it is ready (with its ports, which the
system has chosen), and reads from the socket until EOF: when the parent exits for any reason, the child exits too. The
parent stops a child by its process id: SIGTERM, then SIGKILL after a timeout.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from proxy.config.values import ENV_PREFIX

READY_LIMIT_S = 15.0
"""How long to wait until a child is ready (seconds)."""

LINE_BYTES_MAX = 64 * 1024 * 1024
"""Bound of a line from the parent: the reports of all workers."""

STOP_LIMIT_S = 5.0
"""How long a child may take to exit after SIGTERM before it is killed (seconds)."""

_PR_SET_PDEATHSIG = 1
"""prctl(2)."""

_OUTPUT_BYTES_MAX = 4000
"""How much of the end of a child's output is read for an error message (bytes)."""


@dataclass(frozen=True, kw_only=True)
class ChildReady:
    """The first message of a child: its addresses, as HOST:PORT; "" if it does not have one."""

    address: str = ""
    metrics: str = ""


class ChildFailed(Exception):
    """A child process did not start, or exited by itself; the text is one line with the last line of its output."""


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs a module of this program in another process.

    With -P, files of the current directory are not imported: a `click.py` there is not meant.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def _environment() -> dict[str, str]:
    """Return the environment of a child: without this process's settings, and with this process's program.

    A checkout is found by -m only from its own directory; an installed program needs no help.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    if os.path.basename(root) not in ("site-packages", "dist-packages"):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    return environment


class Child:
    """One child process, seen from the parent."""

    def __init__(
        self,
        name: str,
        process: asyncio.subprocess.Process,
        pipe: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        output: IO[bytes],
    ) -> None:
        self.name = name
        self.process = process
        self.ready = ChildReady()
        self._reader, self._writer = pipe
        self._output = output

    @classmethod
    async def start(cls, name: str, command: Sequence[str]) -> Child:
        """Start `command` with `--parent-fd=N` appended and wait until it is ready.

        `name` is for messages ("the bundled store"). Environment variables that configure the parent are not passed on:
        the command contains all settings of the child. Raises ChildFailed.
        """
        ours, theirs = socket.socketpair()
        pipe = await asyncio.open_unix_connection(sock=ours)
        import tempfile  # loads many modules and is needed only here

        output = tempfile.TemporaryFile(prefix="watchmux-child-")  # noqa: SIM115 - closed by stop()
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                f"--parent-fd={theirs.fileno()}",
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_environment(),
                start_new_session=True,  # the parent handles Ctrl-C and stops its children in its own order
            )
        except OSError as error:
            pipe[1].close()
            output.close()
            raise ChildFailed(f"cannot start {name}: {error.strerror or error}") from None
        finally:
            theirs.close()
        child = cls(name, process, pipe, output)
        import msgspec  # not needed without children or a parent

        try:
            async with asyncio.timeout(READY_LIMIT_S):
                child.ready = msgspec.json.decode(await child.read_line(), type=ChildReady)
        except TimeoutError:
            words = child.last_words() or "no output"
            await child.stop(0)
            raise ChildFailed(f"{name} was not ready after {READY_LIMIT_S:g} s: {words}") from None
        except BaseException:
            await child.stop(0)
            raise
        return child

    async def read_line(self) -> bytes:
        """Return the next line from the child.

        Raises ChildFailed, with the last line of its output, if the child exited instead.
        """
        line = b""
        with contextlib.suppress(ConnectionError):
            line = await self._reader.readline()
        if line.endswith(b"\n"):
            return line
        await self.process.wait()
        raise ChildFailed(f"{self.name} ended: {self.last_words()}")

    def write_line(self, message: object) -> None:
        """Send the child one JSON line."""
        self._writer.write(_line(message))

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    def running(self) -> bool:
        """Whether the process is still running."""
        return self.process.returncode is None

    def last_words(self) -> str:
        """Return the last line of its standard output or error, or its exit code."""
        # pread: the child writes through the same open file, so the file position must not change.
        size = os.fstat(self._output.fileno()).st_size
        tail = os.pread(self._output.fileno(), _OUTPUT_BYTES_MAX, max(size - _OUTPUT_BYTES_MAX, 0))
        lines = [line.strip() for line in tail.decode(errors="replace").splitlines() if line.strip()]
        if lines:
            return lines[-1].removeprefix("watchmux: ")
        return f"exit code {self.process.returncode}" if not self.running() else ""

    async def stop(self, limit_s: float = STOP_LIMIT_S) -> int:
        """Stop the process by its id and return its exit code; kill it after `limit_s` seconds."""
        if self.running() and limit_s > 0:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), limit_s)
        if self.running():
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
        code = await self.process.wait()
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        self._output.close()
        return code


def end_with(parent: int) -> None:
    """Let the kernel kill this process when the process `parent`, which has forked it, ends: prctl(2), Linux only."""
    import ctypes  # only with --workers

    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class Parent:
    """The parent, seen from a child; a process started by hand has none."""

    def __init__(self, pipe: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None) -> None:
        self._pipe = pipe
        self._listening: asyncio.Task[None] | None = None

    @classmethod
    async def join(cls, fd: int | None, line: Callable[[bytes], None], gone: Callable[[], None]) -> Parent:
        """Open the socket inherited at `fd` (None: started by hand; all methods then do nothing).

        `line` is called with each line from the parent, `gone` once when the parent has exited.
        """
        if fd is None:
            return cls(None)
        pipe = await asyncio.open_unix_connection(sock=socket.socket(fileno=fd), limit=LINE_BYTES_MAX)
        parent = cls(pipe)
        parent._listening = asyncio.create_task(parent._listen(line, gone))
        return parent

    async def _listen(self, line: Callable[[bytes], None], gone: Callable[[], None]) -> None:
        assert self._pipe is not None
        with contextlib.suppress(ConnectionError):
            while text := await self._pipe[0].readline():
                line(text)
        gone()

    def write_line(self, message: object) -> None:
        """Send the parent one JSON line; the first one must be a `ChildReady`."""
        if self._pipe is not None:
            self._pipe[1].write(_line(message))

    @property
    def unsent_bytes(self) -> int:
        """Bytes of messages that the parent has not taken yet: it is stopped."""
        return 0 if self._pipe is None else self._pipe[1].transport.get_write_buffer_size()

    async def leave(self) -> None:
        """Send what is still queued and close the socket."""
        if self._listening is not None:
            self._listening.cancel()
        if self._pipe is not None:
            with contextlib.suppress(ConnectionError):
                await self._pipe[1].drain()
                self._pipe[1].close()
                await self._pipe[1].wait_closed()


def _line(message: object) -> bytes:
    import msgspec  # as above

    return msgspec.json.encode(message) + b"\n"


def on_signals(leave: Callable[[], None]) -> None:
    """Call `leave` from the running event loop on each SIGTERM and SIGINT."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave)
