"""A small public API: watch keys of an etcd from asyncio, with the proxy's own watch client, which resumes watches.

    async with EtcdWatcher("127.0.0.1:2379") as watcher:
        async for response in watcher.watch(b"config/", range_end=b"config0"):
            for event in response.events:
                print(event.kv.key, event.kv.value)

A watch continues through restarts of etcd and from one endpoint to another: no event is lost or repeated. It is read
only as fast as the loop over it consumes it.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Final, Self

from proto.pb import rpc_pb2
from proto.scan import Header, WatchResponse, encode_response
from upstream.endpoints import parse_endpoints
from upstream.errors import CallFailed, Logger
from upstream.settings import UpstreamSettings
from upstream.watching.client import WatchClient
from upstream.watching.stream import OpenedWatch

# Queued responses at which reading from etcd is paused, and at which it is resumed.
_WAITING_MAX: Final = 64
_WAITING_LOW: Final = 16


class Compacted(Exception):
    """A watch needs a revision that etcd has compacted: it has lost events. Read the keys again, then watch again."""

    def __init__(self, compact_revision: int) -> None:
        super().__init__(f"the revisions below {compact_revision} have been compacted")
        # The oldest revision that can still be watched.
        self.compact_revision = compact_revision


class _Watch:
    """One watch: an OpenedWatch, and the queue of its reader."""

    def __init__(self, key: bytes, range_end: bytes, start_revision: int | None, prev_kv: bool, token: bytes | None):
        self.key = key
        self.range_end = range_end
        self.start_revision = start_revision
        self.prev_kv = prev_kv
        # A stream of its own, so that a slow reader holds up no other watch.
        self.is_backfill = True
        self.watchers = 1
        self.token = token
        self.waiting: deque[WatchResponse] = deque()
        self.paused = False
        # Why no more responses follow; None while the watch is open.
        self.error: Exception | None = None
        self.changed = asyncio.Event()


class EtcdWatcher:
    """Watches at one etcd cluster; use it as an async context manager."""

    def __init__(
        self,
        endpoints: str | Sequence[str],
        *,
        tls: ssl.SSLContext | None = None,
        token: str | None = None,
        settings: UpstreamSettings | None = None,
        log: Logger | None = None,
    ) -> None:
        """`endpoints` as etcdctl takes them; `tls` from `upstream.tls.client_context`; `token` from Auth.Authenticate.

        Raises BadEndpoint.
        """
        self._token = None if token is None else token.encode()
        self._client = WatchClient(parse_endpoints(endpoints), _Listener(self), settings, tls, log)
        self._watches: dict[int, _Watch] = {}

    async def __aenter__(self) -> Self:
        self._client.start()
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._client.stop()
        for watch in list(self._watches.values()):
            self._end(watch, CallFailed(1, "the watcher was closed"))

    async def watch(
        self,
        key: bytes,
        *,
        range_end: bytes = b"",
        start_revision: int | None = None,
        prev_kv: bool = False,
    ) -> AsyncIterator[rpc_pb2.WatchResponse]:
        """Yield responses with events of `key`, or of the keys from it up to `range_end`, from `start_revision` or from
        now.

        The first response has no events: it is `created`, and its header's revision is "now". Waits while no etcd
        answers. Raises Compacted when a compaction removed events of the watch, CallFailed when etcd refuses the watch.
        """
        watch = _Watch(key, range_end, start_revision, prev_kv, self._token)
        self._watches[id(watch)] = watch
        self._client.open(watch)
        try:
            while True:
                while watch.waiting:
                    response = watch.waiting.popleft()
                    if watch.paused and len(watch.waiting) <= _WAITING_LOW:
                        watch.paused = False
                        self._client.resume(watch)
                    yield _decoded(response)
                if watch.error is not None:
                    raise watch.error
                watch.changed.clear()
                await watch.changed.wait()
        finally:
            self._client.close(watch)
            self._watches.pop(id(watch), None)

    def _end(self, watch: _Watch, error: Exception) -> None:
        watch.error = watch.error or error
        watch.changed.set()

    def _received(self, watch: _Watch, response: WatchResponse) -> None:
        if response.canceled:
            self._end(watch, Compacted(response.compact_revision))
        elif response.events or response.created:
            watch.waiting.append(response)
            watch.changed.set()
            if len(watch.waiting) >= _WAITING_MAX and not watch.paused:
                watch.paused = True
                self._client.pause(watch)


class _Listener:
    """Passes the watch client's notifications to the watches."""

    def __init__(self, watcher: EtcdWatcher) -> None:
        self._watcher = watcher

    def received(self, watch: OpenedWatch, response: WatchResponse) -> None:
        assert isinstance(watch, _Watch)
        self._watcher._received(watch, response)

    def lost(self, watch: OpenedWatch, status: int, text: str) -> None:
        assert isinstance(watch, _Watch)
        self._watcher._end(watch, CallFailed(status, text))

    def progressed(self, watches: Iterable[OpenedWatch], header: Header, number: int) -> None: ...

    def no_leader(self) -> None: ...

    def header_seen(self, header: Header) -> None: ...

    def other_history(self, header: Header) -> None:  # noqa: ARG002 - WatchListener's signature
        for watch in list(self._watcher._watches.values()):
            self._watcher._end(watch, CallFailed(10, "the store was restored or replaced"))

    def broken(self) -> None: ...

    def resumed(self) -> None: ...


def _decoded(response: WatchResponse) -> rpc_pb2.WatchResponse:
    events = b"".join([event.encoded for event in response.events])
    return rpc_pb2.WatchResponse.FromString(
        encode_response(response.header, response.watch_id, created=response.created, events=events)
    )
