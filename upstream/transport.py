"""Opening the transport to an endpoint: a unix socket, or TCP to the first of a name's addresses that answers.

A name may have several addresses: both families, or one for each member. They are tried in turn, the next one as soon
as the previous one has failed or takes too long (RFC 8305, "happy eyeballs"), so that an address that drops packets
does not use up the time for all. The event loop itself would wait for each until the system's timeout.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Protocol

from upstream.endpoints import Endpoint
from upstream.settings import NEXT_ADDRESS_S


class Cork(Protocol):
    """Collects what a read causes to be written to clients, so that each gets one write."""

    def cork(self) -> None:
        """Begin; may be nested."""

    def uncork(self) -> None:
        """End; the outermost end writes."""


async def open_transport(
    factory: Callable[[], asyncio.Protocol],
    endpoint: Endpoint,
    context: ssl.SSLContext | None,
    next_address_s: float = NEXT_ADDRESS_S,
) -> None:
    """Connect a protocol to an endpoint, with TLS when a context is given. Raises OSError; has no timeout."""
    loop = asyncio.get_running_loop()
    name = endpoint.host if context is not None else None
    if endpoint.path:
        await loop.create_unix_connection(factory, endpoint.path, ssl=context, server_hostname=name)
        return
    found = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    if len(found) == 1:
        await loop.create_connection(factory, endpoint.host, endpoint.port, ssl=context, server_hostname=name)
        return
    from aiohappyeyeballs import start_connection  # only for names with several addresses

    connected = await start_connection(found, happy_eyeballs_delay=next_address_s, interleave=1)
    try:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.create_connection(factory, sock=connected, ssl=context, server_hostname=name)
    except BaseException:
        connected.close()
        raise
