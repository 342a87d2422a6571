"""The addresses of an endpoint, tried in turn, and opening a transport to one: a unix socket or TCP, also with TLS.

A name may have several addresses: both families, or one for each member. The next one is tried as soon as the previous
one has failed or takes too long (RFC 8305, "happy eyeballs"), so that an address that does not answer does not use up
the time for all. The event loop itself would wait for each until the system's timeout.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Coroutine, Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple, TypeVar

from upstream.endpoints import Endpoint

T = TypeVar("T")


class ServerAddress(NamedTuple):
    """One address of an endpoint, as the socket module takes it."""

    family: int
    address: Any


async def addresses_of(endpoint: Endpoint) -> list[ServerAddress]:
    """Return the addresses of an endpoint in the system's order, but both families in turn (RFC 8305 section 4).

    Raises OSError, UnicodeError.
    """
    if endpoint.path:
        return [ServerAddress(socket.AF_UNIX, endpoint.path)]
    loop = asyncio.get_running_loop()
    infos = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    found = [ServerAddress(family, address) for family, _, _, _, address in infos]
    first = [each for each in found if each.family == found[0].family]
    others = [each for each in found if each.family != found[0].family]
    return [each for each in chain.from_iterable(zip_longest(first, others)) if each is not None]


async def first_of(
    attempts: Sequence[Callable[[], Coroutine[Any, Any, T]]], next_s: float, discard: Callable[[T], object]
) -> T:
    """Start an attempt each time the last one has failed or taken `next_s` seconds; return the first success.

    `discard` is called with each further one. Raises what the first attempt raised if all fail.
    """
    if len(attempts) == 1:
        return await attempts[0]()
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[T]] = []
    used: asyncio.Task[T] | None = None

    def given_up(task: asyncio.Task[T]) -> None:
        if task is not used and not task.cancelled() and task.exception() is None:
            discard(task.result())

    try:
        while used is None:
            if len(tasks) < len(attempts):
                tasks.append(loop.create_task(attempts[len(tasks)]()))
            elif all(task.done() for task in tasks):
                break
            running = [task for task in tasks if not task.done()]
            limit_s = next_s if len(tasks) < len(attempts) else None
            done, _ = await asyncio.wait(running, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            used = next((task for task in tasks if task in done and task.exception() is None), None)
        # No await from here on: a cancellation would lose the result.
        return (used or tasks[0]).result()
    finally:
        for task in tasks:
            task.add_done_callback(given_up)
            task.cancel()
        if used is None:
            await asyncio.gather(*tasks, return_exceptions=True)


async def connected_to(server: ServerAddress) -> socket.socket:
    """Return a socket that is connected to an address. Raises OSError; has no timeout."""
    connected = socket.socket(server.family, socket.SOCK_STREAM)
    try:
        connected.setblocking(False)
        if server.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(connected, server.address)
    except BaseException:
        connected.close()
        raise
    return connected


async def open_transport(
    factory: Callable[[], asyncio.Protocol], connected: socket.socket, context: ssl.SSLContext | None, name: str
) -> None:
    """Open a transport on a socket, with TLS when a context is given; `name`: which the server's certificate has.

    Raises OSError; has no timeout.
    """
    loop = asyncio.get_running_loop()
    expected = name if context is not None else None
    create = loop.create_unix_connection if connected.family == socket.AF_UNIX else loop.create_connection
    try:
        await create(factory, sock=connected, ssl=context, server_hostname=expected)
    except BaseException:
        connected.close()
        raise
    finally:
        if getattr(connected, "_io_refs", 0):
            # uvloop's transport owns the descriptor now. If it was closed before `create` returned, its number is still
            # in `connected`, which would close it again: another connection may have that number by then.
            connected.detach()
