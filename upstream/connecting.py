"""Opening a connection to an etcd: resolve, connect, TLS, and wait for the server's SETTINGS."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

from upstream.connection import ClientConnection
from upstream.endpoints import Endpoint
from upstream.errors import Unreachable, explain_connect
from upstream.settings import ConnectionSettings
from upstream.transport import open_transport


async def connect(
    endpoint: Endpoint,
    tls: ssl.SSLContext | None,
    settings: ConnectionSettings | None = None,
    on_closed: Callable[[ClientConnection], None] | None = None,
) -> ClientConnection:
    """Connect to an endpoint and return the connection when the server has sent its SETTINGS.

    The endpoint's scheme decides whether `tls` is used; see `Endpoint.uses_tls`. Raises Unreachable.
    """
    settings = settings or ConnectionSettings()
    loop = asyncio.get_running_loop()
    secure = endpoint.uses_tls(tls is not None)
    made: list[ClientConnection] = []

    def factory() -> ClientConnection:
        made.append(ClientConnection(endpoint, secure, settings, loop, on_closed))
        return made[-1]

    context: ssl.SSLContext | None = None
    if secure:
        from upstream.tls import client_context, newest

        context = client_context() if tls is None else newest(tls)
    try:
        async with asyncio.timeout(settings.connect_timeout_s):
            await open_transport(factory, endpoint, context, settings.next_address_s)
            await made[-1].ready
    except (OSError, TimeoutError, Unreachable, UnicodeError) as error:
        explained = explain_connect(error, endpoint.text, secure)
        _discard(made, explained)
        raise explained from None
    except asyncio.CancelledError:
        _discard(made, Unreachable(endpoint.text, "attempt cancelled", "no action needed: another endpoint was faster"))
        raise
    return made[-1]


def _discard(made: list[ClientConnection], reason: Unreachable) -> None:
    for connection in made:
        connection.on_closed = None
        connection.abort(reason)
