"""A durable store as a process of its own, so that it can be killed: `python -m tests.store.process DIRECTORY`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from upstream.store.server import Store, StoreSettings


async def run(directory: Path) -> None:
    """Serve until killed; the first line printed is the endpoint."""
    store = Store(StoreSettings(data_dir=directory))
    await store.start()
    print(store.endpoint, flush=True)  # noqa: T201  # the parent reads it
    await store.failure()


class StoreProcess:
    """Use as a context manager; leaving it kills the process with SIGKILL."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.endpoint = ""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.store.process", str(self._directory)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.endpoint = self._process.stdout.readline().strip()
        assert self.endpoint, "the store did not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1])))
