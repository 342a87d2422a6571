"""A store in its own process, so that it can be killed.

`python -m tests.store.process DIRECTORY COMMIT_INTERVAL_S FILE_BYTES_MAX`; an empty DIRECTORY means in memory.
"""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Self

import uvloop

from upstream.store.recorder import StoreDataError
from upstream.store.server import Store, StoreSettings


async def run(settings: StoreSettings) -> str:
    """Serve until the store fails, and return the reason; prints the endpoint first."""
    store = Store(settings)
    await store.start()
    print(store.endpoint, flush=True)  # noqa: T201  # the parent reads it
    failure = await store.failure()
    await store.stop()
    return str(failure)


def limit_files(bytes_max: int) -> None:
    """Limit the size of files that this process writes, as if the disk were full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_max, bytes_max))


class StoreProcess:
    """Use as a context manager; leaving it kills the process with SIGKILL."""

    def __init__(self, directory: Path | None, commit_interval_s: float = 0.0, file_bytes_max: int = 0) -> None:
        """Without a directory the store is in memory; `file_bytes_max` 0 = unlimited."""
        self._options = [str(directory or ""), str(commit_interval_s), str(file_bytes_max)]
        self.endpoint = ""
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.begin()
        self.wait_started()
        return self

    def begin(self) -> None:
        """Start the process without waiting for it to serve."""
        command = [sys.executable, "-m", "tests.store.process", *self._options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_started(self) -> None:
        """Wait until it serves."""
        assert self.process is not None
        assert self.process.stdout is not None
        self.endpoint = self.process.stdout.readline().strip()
        assert self.endpoint, f"the store did not start: {self.kill()}"

    def wait_ended(self) -> tuple[int, str]:
        """Wait until it exits by itself; return its exit code and its stderr."""
        assert self.process is not None
        code = self.process.wait(20)
        return code, self.kill()

    def kill(self) -> str:
        """Kill it; return its stderr."""
        assert self.process is not None
        self.process.kill()
        return self.process.communicate()[1]

    def __exit__(self, *_error: object) -> None:
        self.kill()


if __name__ == "__main__":
    directory, commit_interval_s, file_bytes_max = sys.argv[1:]
    if int(file_bytes_max):
        limit_files(int(file_bytes_max))
    try:
        data_dir = Path(directory) if directory else None
        # Under uvloop, as the program runs it.
        sys.exit(uvloop.run(run(StoreSettings(data_dir=data_dir, commit_interval_s=float(commit_interval_s)))))
    except StoreDataError as error:
        sys.exit(str(error))
