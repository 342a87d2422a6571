"""The list of client connections for operators: who is connected, with how many watches, and how far behind.

Nothing is counted for it per event: the kernel counts each connection's bytes (TCP_INFO), and the rest is state that
the proxy has anyway. The work of making the list is bounded, and divided among turns of the event loop.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Iterable
from heapq import nlargest
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Final, TypeVar

from coalesce import report
from proxy.admin.views import ClientView
from proxy.listening.connection import ServerConnection

if TYPE_CHECKING:
    from coalesce.model import Session
    from proxy.server import Proxy

LOOKED_AT: Final = 10_000
"""Connections, and watch streams, that are examined to find those to show."""

PART: Final = 200
"""How many of them are examined in one turn, at 3 us each."""

VIEWS_PART: Final = 50
"""Clients of whom all is read in one turn, at 12 us each."""

T = TypeVar("T")

TCP_INFO_BYTES: Final = 136
"""Size of struct tcp_info up to tcpi_bytes_received (Linux 4.1, include/uapi/linux/tcp.h)."""

_BYTE_COUNTS: Final = struct.Struct("=QQ")
_BYTE_COUNTS_AT: Final = 120


async def clients(proxy: Proxy, now: float, at_most: int) -> list[ClientView]:
    """Return the clients that lag longest, then those with the most watches and streams; `at_most` of them.

    `now`: the loop's time.
    """
    sessions: dict[ServerConnection, list[Session]] = {}
    async for calls in _in_turns(islice(proxy.watches.calls, LOOKED_AT), PART):
        for call in calls:
            if call.session is not None and call.connection.of_client:
                sessions.setdefault(call.connection, []).append(call.session)

    def weight(connection: ServerConnection) -> tuple[float, int, int]:
        own = sessions.get(connection, ())
        since = min((one.lagging_since for one in own if one.lagging_since is not None), default=now)
        return now - since, sum(len(one.watches) for one in own), len(connection.h2.streams)

    found: list[tuple[tuple[float, int, int], ServerConnection]] = []
    async for connections in _in_turns(islice(proxy.listener.connections, LOOKED_AT), PART):
        found = nlargest(at_most, found + [(weight(one), one) for one in connections], key=itemgetter(0))
    views: list[ClientView] = []
    async for shown in _in_turns(found, VIEWS_PART):
        views += [_view(one, sessions.get(one, []), now) for _, one in shown]
    return views


async def _in_turns(items: Iterable[T], part: int) -> AsyncIterator[list[T]]:
    """Yield the items that there are now, `part` of them in each turn of the event loop."""
    left = list(items)
    for start in range(0, len(left), part):
        if start:
            await asyncio.sleep(0)
        yield left[start : start + part]


def _view(connection: ServerConnection, sessions: list[Session], now: float) -> ClientView:
    reports = [report.of_session(session, now) for session in sessions]
    sent, received = byte_counts(connection.extra_info("socket"))
    ssl_object = connection.extra_info("ssl_object")
    return ClientView(
        peer=connection.peer,
        user_agent=connection.user_agent.decode("ascii", "backslashreplace"),
        tls=(ssl_object.version() or "") if ssl_object is not None else "",
        age_s=round(now - connection.times.opened_at, 1),
        streams=len(connection.h2.streams),
        sessions=len(sessions),
        watches=sum(each.watches for each in reports),
        lagging=sum(each.lagging for each in reports),
        behind_s=round(max((each.behind_s for each in reports), default=0.0), 1),
        behind_revisions=max((each.behind_revisions for each in reports), default=0),
        unsent_bytes=sum(stream.unsent for stream in islice(connection.h2.streams.values(), LOOKED_AT)),
        sent_bytes=sent,
        received_bytes=received,
    )


def byte_counts(connected: socket.socket | None) -> tuple[int | None, int | None]:
    """Return the bytes that the peer has acknowledged and sent, as the kernel counts them; None: not TCP, or closed."""
    if connected is None or connected.family == socket.AF_UNIX:
        return None, None
    try:
        info = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
    except OSError:
        return None, None
    if len(info) < TCP_INFO_BYTES:
        return None, None
    sent, received = _BYTE_COUNTS.unpack_from(info, _BYTE_COUNTS_AT)
    return sent, received
