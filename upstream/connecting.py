"""Opening a connection to an etcd: resolve, connect, TLS, and wait for the server's SETTINGS.

Of a name with several addresses the first server that has sent its SETTINGS is used, as by grpc-go's pick_first
(balancer/pickfirst/pickfirstleaf): one that accepts connections and then hangs is passed over, like an address that
drops packets. An endpoint that has failed after that is tried at its next address.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from functools import partial

from upstream.connection import ClientConnection
from upstream.endpoints import Endpoint
from upstream.errors import Unreachable, explain_connect
from upstream.settings import ConnectionSettings
from upstream.transport import ServerAddress, addresses_of, connected_to, first_of, open_transport


async def connect(
    endpoint: Endpoint,
    tls: ssl.SSLContext | None,
    settings: ConnectionSettings | None = None,
    on_closed: Callable[[ClientConnection], None] | None = None,
    turn: int = 0,
) -> ClientConnection:
    """Connect to an endpoint and return the connection when the server has sent its SETTINGS.

    The endpoint's scheme decides whether `tls` is used; see `Endpoint.uses_tls`. `turn`: how often the endpoint has
    failed before, so that a later address is the first one to be tried. Raises Unreachable.
    """
    settings = settings or ConnectionSettings()
    loop = asyncio.get_running_loop()
    secure = endpoint.uses_tls(tls is not None)
    context: ssl.SSLContext | None = None
    if secure:
        from upstream.tls import client_context, newest

        context = client_context() if tls is None else newest(tls)

    async def attempt(server: ServerAddress) -> ClientConnection:
        connection = ClientConnection(endpoint, secure, settings, loop, on_closed)
        try:
            await open_transport(lambda: connection, await connected_to(server), context, endpoint.host)
            await connection.ready
        except BaseException:
            discard(connection)
            raise
        return connection

    def discard(connection: ClientConnection) -> None:
        connection.on_closed = None
        connection.abort(Unreachable(endpoint.text, "attempt given up", "no action needed: another one was faster"))

    try:
        async with asyncio.timeout(settings.connect_timeout_s):
            servers = await addresses_of(endpoint)
            first = turn % len(servers)
            attempts = [partial(attempt, server) for server in (*servers[first:], *servers[:first])]
            return await first_of(attempts, settings.next_address_s, discard)
    except (OSError, TimeoutError, Unreachable, UnicodeError) as error:
        raise explain_connect(error, endpoint.text, secure) from None
