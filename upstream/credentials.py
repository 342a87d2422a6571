"""The proxy's own etcd user, whose token trunks are watched with.

With it a trunk does not depend on the tokens of its clients, which expire and which only the clients can renew. A
client's own token still decides what the client may see; no request of a client is ever made as this user.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from proto import etcd_errors
from proto.fields import ScanError
from proto.messages import decode_token, encode_login
from upstream.connection import ClientConnection, NotSent
from upstream.errors import CallFailed, Logger
from upstream.unary import call_unary

AUTHENTICATE_PATH: Final = "/etcdserverpb.Auth/Authenticate"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Name and password of an etcd user."""

    user: str
    password: str = field(default="", repr=False)


async def log_in(connection: ClientConnection, credentials: Credentials, timeout_s: float, log: Logger) -> bytes | None:
    """Get a token for the proxy's own user; None, with the reason logged, when etcd does not give one.

    None without a log message when auth is off.
    """
    request = encode_login(credentials.user, credentials.password)
    try:
        answer, _ = await call_unary(connection, AUTHENTICATE_PATH, request, (), timeout_s)
        token = decode_token(answer)
    except CallFailed as error:
        if error.text != etcd_errors.AUTH_NOT_ENABLED:
            _complain(log, credentials, error)
    except (NotSent, ScanError) as error:
        _complain(log, credentials, error)
    else:
        if token:
            return token
    return None


def _complain(log: Logger, credentials: Credentials, error: Exception) -> None:
    log.warning(
        "the login of --user at etcd failed",
        user=credentials.user,
        problem=f"{error}; check --user and --password. Until then watches use their clients' tokens",
    )
