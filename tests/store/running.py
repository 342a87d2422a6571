"""A store that serves on a free port, in its own thread, for tests that use it over the wire."""

from __future__ import annotations

import asyncio
import threading
from typing import Self

from upstream.store.server import Store, StoreSettings

START_TIMEOUT_S = 30.0


class RunningStore:
    """Use as a context manager; raises what the store's start raises."""

    def __init__(self, settings: StoreSettings | None = None) -> None:
        self.settings = settings or StoreSettings(metrics_addr="127.0.0.1:0")
        self.endpoint = ""
        self.metrics_url = ""
        self.store: Store | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="store")

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(START_TIMEOUT_S)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        assert self.store is not None
        asyncio.run_coroutine_threadsafe(self.store.stop(grace_s=0.1), self._loop).result(START_TIMEOUT_S)
        self._end()

    async def _start(self) -> None:
        self.store = Store(self.settings)
        await self.store.start()
        self.endpoint = self.store.endpoint
        self.metrics_url = f"http://127.0.0.1:{self.store.metrics_port}"

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_TIMEOUT_S)
        self._loop.close()
