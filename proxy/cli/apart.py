"""`watchmux serve`, with the settings read by a short-lived fork.

Reading the command line, environment and file needs click and msgspec. The running proxy needs neither, but Python
never unloads a module, and together they are 2.8 MiB, a tenth of an idle proxy. So the fork reads the settings, prints
errors and help, and passes the settings back through a pipe; meanwhile this process loads the modules of the proxy. It
keeps its process id.

On SIGHUP the settings are read in this process, which then loads those modules: a serving process must not fork. They
are read in another thread, so that the clients do not wait for it (`proxy.process.reloading`).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import traceback
from typing import TYPE_CHECKING

from proxy.errors import INTERRUPTED, Failed, complain, flush_streams

if TYPE_CHECKING:
    from proxy.config.knobs import Settings

    Read = tuple[Settings, list[str], int | None]
    """The settings, notes for the log, and the socket inherited from a parent (see `proxy.process.child`)."""


def serve(arguments: list[str]) -> int:
    """Run `watchmux serve ...` and return its exit code; errors are one line on standard error."""
    # It would end the process. After the start it is a reload: what it announces may not have been read yet.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        read = _read_by_a_fork(arguments)
        if isinstance(read, int):
            return read
        settings, notes, parent_fd = read
        from proxy.process import running

        return running.run(settings, notes, parent_fd, lambda: _read_again(arguments))
    except Failed as error:
        complain(str(error))
        return error.code
    except KeyboardInterrupt:
        return INTERRUPTED


def _read_by_a_fork(arguments: list[str]) -> Read | int:
    """Return what the fork has read, or its exit code if there is nothing to serve (help, an error)."""
    reading, writing = os.pipe()
    fork = os.fork()
    if not fork:
        os.close(reading)
        os._exit(_hand_over(arguments, writing))
    os.close(writing)
    import uvloop  # noqa: F401  # loaded while the fork reads

    from proxy.process import running  # noqa: F401

    with open(reading, "rb") as pipe:
        handed = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
    if not handed:
        # Ended by a signal: the exit code is the one of a shell.
        return code if code >= 0 else 128 - code
    read: Read = pickle.loads(handed)
    return read


def _hand_over(arguments: list[str], writing: int) -> int:
    """Read the settings and write them into the pipe; return the fork's exit code. Never raises."""
    try:
        from proxy.cli.group import run

        def write(*read: object) -> int:
            # A signal may have ended the process that waits for the settings.
            with contextlib.suppress(BrokenPipeError), open(writing, "wb") as pipe:
                pipe.write(pickle.dumps(read))
            return 0

        return run(arguments, write)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        flush_streams()


def _read_again(arguments: list[str]) -> tuple[Settings, list[str]]:
    """Read the settings in this process. Raises Failed."""
    from proxy.cli.group import cli

    read: list[Read] = []

    def keep(settings: Settings, notes: list[str], parent_fd: int | None) -> int:
        read.append((settings, notes, parent_fd))
        return 0

    cli.main(arguments, prog_name="watchmux", standalone_mode=False, obj=keep)
    settings, notes, _ = read[0]
    return settings, notes
