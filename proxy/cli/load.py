"""Command-line code shared by `demo` and `measure`: the shape of the load, and one-line errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from proxy.errors import WRONG_REQUEST, Failed
from proxy.measuring.load.judge import NoTruth
from proxy.measuring.load.plan import Shape
from proxy.measuring.load.prometheus import NoMetrics
from proxy.measuring.load.run import LoadFailed
from proxy.measuring.load.writer import WriteFailed
from proxy.process.child import ChildFailed
from upstream.endpoints import parse_endpoints
from upstream.errors import BadEndpoint

STREAMS_PER_CHANNEL = 5
PROCESSES_MAX = 4


def shape_of(*, watches: int, ranges: int, streams: int, pause_s: float = 0.0, plain: bool = False) -> Shape:
    """Return the shape of a load: several streams share a connection, and each core runs a client process.

    Raises Failed.
    """
    if watches < streams:
        raise Failed(f"--watches={watches} is less than --streams={streams}: each stream needs a watch", WRONG_REQUEST)
    channels = max(1, streams // STREAMS_PER_CHANNEL)
    processes = min(PROCESSES_MAX, os.cpu_count() or 1, channels)
    return Shape(
        watches=watches,
        ranges=ranges,
        streams=streams,
        channels=channels,
        processes=processes,
        pause_s=pause_s,
        plain=plain,
    )


def first_endpoint(flag: str, text: str) -> str:
    """Return the first endpoint as HOST:PORT; load clients do not support TLS. Raises Failed."""
    try:
        endpoint = parse_endpoints(text)[0]
    except BadEndpoint as error:
        raise Failed(f"{flag}: {error}", WRONG_REQUEST) from None
    if endpoint.secure or endpoint.path:
        raise Failed(f"{flag}: {endpoint.text!r}: the load clients support plain TCP only, not TLS", WRONG_REQUEST)
    return endpoint.authority.decode()


def metrics_url(flag: str, text: str) -> str:
    """Return the URL of a metrics page from HOST:PORT or a URL. Raises Failed."""
    url = text if "://" in text else f"http://{text}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Failed(f"{flag}: {text!r} is not an address; write http://HOST:PORT/metrics", WRONG_REQUEST)
    return url


@contextmanager
def load_errors() -> Iterator[None]:
    """Turn the errors of a load into one line for the user."""
    try:
        yield
    except (ChildFailed, LoadFailed, WriteFailed, NoMetrics, NoTruth) as error:
        raise Failed(str(error)) from None
