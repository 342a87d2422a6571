"""A listener that records its notifications, and a context manager that runs a watch client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from proto.scan import Header, WatchResponse
from tests.upstream.stories import Opened
from tests.waiting import until_async
from upstream.endpoints import parse_endpoints
from upstream.interfaces import Cork
from upstream.settings import UpstreamSettings
from upstream.watching.client import WatchClient
from upstream.watching.stream import OpenedWatch


class RecordedLog:
    """A logger that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, object]]] = []

    def info(self, event: str, **fields: object) -> None:
        self.lines.append((event, fields))

    def warning(self, event: str, **fields: object) -> None:
        self.lines.append((event, fields))

    def problems(self) -> list[str]:
        """Return the problems of endpoints, in order."""
        return [str(fields["problem"]) for _, fields in self.lines if "problem" in fields]


class Recorder:
    """A WatchListener that records what each watch received."""

    def __init__(self) -> None:
        self.responses: dict[int, list[WatchResponse]] = {}
        self.proven: dict[int, list[int]] = {}
        self.losses: list[tuple[OpenedWatch, int, str]] = []
        self.leaderless = 0
        self.breaks = 0
        self.resumes = 0
        self.headers: list[Header] = []
        self.others: list[int] = []

    def received(self, watch: OpenedWatch, response: WatchResponse) -> None:
        self.responses.setdefault(id(watch), []).append(response)

    def progressed(self, watches: Iterable[OpenedWatch], header: Header, number: int) -> None:  # noqa: ARG002
        for watch in watches:
            self.proven.setdefault(id(watch), []).append(header.revision)

    def lost(self, watch: OpenedWatch, status: int, text: str) -> None:
        self.losses.append((watch, status, text))

    def no_leader(self) -> None:
        self.leaderless += 1

    def header_seen(self, header: Header) -> None:
        self.headers.append(header)

    def other_history(self, header: Header) -> None:
        self.others.append(header.revision)

    def broken(self) -> None:
        self.breaks += 1

    def resumed(self) -> None:
        self.resumes += 1

    async def open(self, client: WatchClient, *watches: Opened) -> None:
        """Open watches, and wait until all of them are created."""
        for watch in watches:
            client.open(watch)
        await until_async(lambda: all(map(self.created, watches)), "the watches")

    def of(self, watch: Opened) -> list[WatchResponse]:
        """Return all responses of a watch."""
        return self.responses.get(id(watch), [])

    def created(self, watch: Opened) -> bool:
        """Whether a watch has been created."""
        return any(response.created for response in self.of(watch))

    def revisions(self, watch: Opened) -> list[int]:
        """Return the revisions of all events a watch has received."""
        return [event.revision for response in self.of(watch) for event in response.events]

    def progress(self, watch: Opened) -> int:
        """Return the last revision proven for a watch, 0 before the first."""
        return self.proven.get(id(watch), [0])[-1]


@asynccontextmanager
async def watching(
    endpoints: str,
    listener: Recorder,
    settings: UpstreamSettings | None = None,
    log: RecordedLog | None = None,
    on_problem: Callable[[], None] | None = None,
    cork: Cork | None = None,
) -> AsyncIterator[WatchClient]:
    """Run a watch client."""
    client = WatchClient(parse_endpoints(endpoints), listener, settings, log=log, on_problem=on_problem, cork=cork)
    client.start()
    try:
        yield client
    finally:
        await client.stop()
