"""Command-line code shared by `demo` and `measure`: the load's shape, targets, signals, and one-line errors."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from proxy.config.values import BadValue, parse_address
from proxy.errors import WRONG_REQUEST, Failed
from proxy.measuring.load.judge import NoTruth
from proxy.measuring.load.plan import ROOT, LoadShape
from proxy.measuring.load.prometheus import NoMetrics
from proxy.measuring.load.run import LoadFailed
from proxy.measuring.load.target import ConnectionFiles, LoadTarget, LoginFailed
from proxy.measuring.load.writer import WriteFailed
from proxy.process.child import ChildFailed
from upstream.endpoints import parse_endpoints
from upstream.errors import BadEndpoint, BadTls

Function = TypeVar("Function", bound=Callable[..., Any])
STREAMS_PER_CHANNEL = 5
PROCESSES_MAX = 4


def cover_of(*, cover: bool, access: ConnectionFiles) -> bytes | None:
    """Return the cover of the proxy that is started. Raises Failed if etcd would refuse it."""
    if cover and access.user:
        problem = "--cover: etcd checks it with the user of the proxy, and the one that is started has none; start one"
        raise Failed(f"{problem} with `watchmux serve --user=NAME --cover={ROOT.decode()}`", WRONG_REQUEST)
    return ROOT if cover else None


def shape_of(
    *, watches: int, ranges: int, streams: int, pause_s: float = 0.0, plain: bool = False, unique: bool = False
) -> LoadShape:
    """Return the shape of a load: several streams share a connection, and each core runs a client process.

    There are at most as many streams as watches.
    """
    streams = min(streams, watches)
    channels = max(1, streams // STREAMS_PER_CHANNEL)
    processes = min(PROCESSES_MAX, os.cpu_count() or 1, channels)
    return LoadShape(
        watches=watches,
        ranges=watches if unique else ranges,
        streams=streams,
        channels=channels,
        processes=processes,
        pause_s=pause_s,
        plain=plain,
        unique=unique,
    )


def targets_of(flag: str, text: str, access: ConnectionFiles) -> list[LoadTarget]:
    """Return every endpoint as a target. Raises Failed."""
    try:
        endpoints = parse_endpoints(text)
    except BadEndpoint as error:
        raise Failed(f"{flag}: {error}", WRONG_REQUEST) from None
    configured = bool(access.cacert or access.cert)
    for endpoint in endpoints:
        if endpoint.path:
            raise Failed(
                f"{flag}: {endpoint.text!r}: unix sockets are not supported here; give HOST:PORT", WRONG_REQUEST
            )
    return [
        LoadTarget(address=endpoint.authority.decode(), secure=endpoint.uses_tls(configured), access=access)
        for endpoint in endpoints
    ]


def metrics_urls(flag: str, text: str) -> list[str]:
    """Return the URLs of metrics pages from HOST:PORT or URLs, separated by commas. Raises Failed."""
    urls = []
    for part in text.split(","):
        url = part.strip() if "://" in part else f"http://{part.strip()}"
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Failed(f"{flag}: {part!r} is not an address; write http://HOST:PORT/metrics", WRONG_REQUEST)
        if "://" not in part:
            # Only a URL may leave out the port, which is HTTP's own then.
            _check_address(flag, part.partition("/")[0])
        urls.append(url)
    return urls


def _check_address(flag: str, text: str) -> None:
    try:
        parse_address(text)
    except BadValue as error:
        raise Failed(f"{flag}: {error}", WRONG_REQUEST) from None


def run_load(work: Coroutine[Any, Any, int]) -> int:
    """Run the load. SIGINT, SIGTERM and SIGHUP end it after it has removed its keys; a second one ends it at once.

    Returns its exit code. Raises Failed.
    """

    async def run() -> int:
        task, loop = asyncio.ensure_future(work), asyncio.get_running_loop()
        came: list[int] = []

        def end(number: int) -> None:
            came.append(number)
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, end, number)
        try:
            return await task
        except asyncio.CancelledError:
            if not came:
                raise
            name = "interrupted" if came[0] == signal.SIGINT else f"ended by {signal.Signals(came[0]).name}"
            raise Failed(name, 128 + came[0]) from None

    with load_errors():
        return asyncio.run(run())


@contextmanager
def load_errors() -> Iterator[None]:
    """Turn the errors of a load into one line for the user."""
    try:
        yield
    except (BadTls, ChildFailed, LoadFailed, LoginFailed, WriteFailed, NoMetrics, NoTruth) as error:
        raise Failed(str(error)) from None
