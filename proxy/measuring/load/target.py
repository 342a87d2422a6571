"""A server that the load uses (an etcd, or a proxy in front of one), and what is needed to be let in.

The flags are etcdctl's: `--cacert`, `--cert`, `--key`, `--user`. Passwords stay in the parent process; the client
processes get a token.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec

from proto.pb import rpc_pb2

AUTHENTICATE = "/etcdserverpb.Auth/Authenticate"
LOGIN_LIMIT_S = 10.0


class LoginFailed(Exception):
    """etcd did not accept the user; the text is one line."""


class ConnectionFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Files and names for a connection; empty: not given."""

    cacert: str = ""
    cert: str = ""
    key: str = ""
    user: str = ""
    password: str = ""

    def options(self) -> list[str]:
        """Return the flags with which `watchmux serve` reaches the same etcd."""
        given = (("--cacert", self.cacert), ("--cert", self.cert), ("--key", self.key))
        return [f"{flag}={value}" for flag, value in given if value]

    def http_context(self) -> ssl.SSLContext:
        """Return the TLS context for https pages. Raises BadTls."""
        from upstream.tls import client_context

        return client_context(self.cert or None, self.key or None, self.cacert or None, protocols=("http/1.1",))


class LoadTarget(msgspec.Struct, frozen=True, kw_only=True):
    """One server: its address, whether it uses TLS, and how to get access."""

    address: str
    """HOST:PORT."""
    secure: bool = False
    access: ConnectionFiles = ConnectionFiles()
    token: str = ""
    """The token of a login; empty: calls carry none."""

    @property
    def url(self) -> str:
        """Its address as a URL."""
        return f"{'https' if self.secure else 'http'}://{self.address}"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of every call (etcd's client/v3/credentials, TokenFieldNameGRPC)."""
        return (("token", self.token),) if self.token else ()

    def channel(self, *options: tuple[str, Any]) -> grpc.aio.Channel:
        """Open a channel."""
        if not self.secure:
            return grpc.aio.insecure_channel(self.address, options=options)
        # Without a CA file: the system's authorities, as the proxy itself uses them, and not those that grpcio ships.
        authorities = self.access.cacert or ssl.get_default_verify_paths().cafile
        files = [Path(path).read_bytes() if path else None for path in (authorities, self.access.key, self.access.cert)]
        return grpc.aio.secure_channel(self.address, grpc.ssl_channel_credentials(*files), options=options)

    async def logged_in(self) -> LoadTarget:
        """Return the target with a new token, if there is a user. Raises LoginFailed."""
        if not self.access.user:
            return self
        request = rpc_pb2.AuthenticateRequest(name=self.access.user, password=self.access.password)
        async with self.channel() as channel:
            method: Any = channel.unary_unary(AUTHENTICATE)
            try:
                answer = await method(request.SerializeToString(), timeout=LOGIN_LIMIT_S)
            except grpc.aio.AioRpcError as error:
                if "authentication is not enabled" in (error.details() or ""):
                    return self
                reason = f"{error.code().name}: {error.details()}"
                raise LoginFailed(f"cannot log in at {self.address} as {self.access.user}: {reason}") from None
        return msgspec.structs.replace(self, token=rpc_pb2.AuthenticateResponse.FromString(answer).token)

    def without_password(self) -> LoadTarget:
        """Return the target for a client process, which uses the token only."""
        return msgspec.structs.replace(self, access=msgspec.structs.replace(self.access, password=""))
