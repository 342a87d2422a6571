"""
A user of the proxy's own, in whose name trunks are watched.

With it a trunk does not depend on the tokens of those who watch it: theirs expire, and are renewed only by them. What
a client may see is still decided by its own token, when it asks; nothing of a client's is ever done in this name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from google.protobuf.message import DecodeError

from proto.framing import Status
from proto.pb import rpc_pb2
from upstream.connection import ClientConnection, NotSent
from upstream.errors import CallFailed, Logger
from upstream.unary import call_unary

AUTHENTICATE_PATH: Final = "/etcdserverpb.Auth/Authenticate"

NOT_ENABLED: Final = "etcdserver: authentication is not enabled"
"""What etcd says, with FAILED_PRECONDITION, to whoever wants a token while auth is off (api/v3rpc/rpctypes)."""

INVALID_TOKEN: Final = "etcdserver: invalid auth token"
"""What etcd says, with UNAUTHENTICATED, of a token that it does not know."""

_REFUSALS: Final = frozenset({Status.PERMISSION_DENIED, Status.UNAUTHENTICATED})
_REFUSAL_TEXTS: Final = frozenset({"etcdserver: user name is empty", "etcdserver: revision of auth store is old"})


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user of etcd's."""

    user: str
    password: str = field(default="", repr=False)


def is_auth_refusal(status: int, text: str) -> bool:
    """Tell whether etcd refused somebody because of who that is, or is not."""
    return status in _REFUSALS or text in _REFUSAL_TEXTS


async def log_in(connection: ClientConnection, credentials: Credentials, timeout_s: float, log: Logger) -> bytes | None:
    """
    Get a token for the proxy's own user; None, with the reason in the log, when there is none to be had.

    None without a word when auth is off.
    """
    request = rpc_pb2.AuthenticateRequest(name=credentials.user, password=credentials.password)
    try:
        answer, _ = await call_unary(connection, AUTHENTICATE_PATH, request.SerializeToString(), (), timeout_s)
        token: str = rpc_pb2.AuthenticateResponse.FromString(answer).token
    except CallFailed as error:
        if error.text != NOT_ENABLED:
            _complain(log, credentials, error)
    except (NotSent, DecodeError) as error:
        _complain(log, credentials, error)
    else:
        if token:
            return token.encode()
    return None


def _complain(log: Logger, credentials: Credentials, error: Exception) -> None:
    log.warning(
        "upstream_login_failed",
        user=credentials.user,
        problem=f"{error}; check --user and --password. Until then watches use their clients' tokens",
    )
