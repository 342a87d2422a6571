"""Errors of the upstream side, with texts for the operator who has to fix them.

Every text has three parts: where it happened, what happened, and the remedy. It is shown as one line, in a log or on a
terminal, never as a traceback: a closed port is not a bug of this program.
"""

from __future__ import annotations

import errno
import socket
import ssl
from typing import Final, Protocol

from proto.framing import Status

_STATUSES: Final = frozenset(Status)


class UpstreamError(Exception):
    """An upstream error that the operator can fix: where, what, and the remedy."""

    def __init__(self, where: str, what: str, to_do: str) -> None:
        super().__init__(f"{where}: {what}; {to_do}")
        self.where = where
        self.what = what
        self.to_do = to_do


class BadEndpoint(UpstreamError):
    """A configured endpoint is not valid."""


class BadTls(UpstreamError):
    """A configured certificate or key cannot be used."""


class Unreachable(UpstreamError):
    """An endpoint cannot be reached, or the server there is not an etcd.

    `limit`: the name of the limit that was reached (see `settings`); "" for any other reason.
    """

    def __init__(self, where: str, what: str, to_do: str, limit: str = "") -> None:
        super().__init__(where, what, to_do)
        self.limit = limit


class CallFailed(Exception):
    """A call ended with a gRPC status other than OK."""

    def __init__(self, status: int, text: str) -> None:
        shown = status_name(status) if status in _STATUSES else f"status {status}"
        super().__init__(f"{shown}: {text}")
        self.status = status
        self.text = text


class Logger(Protocol):
    """The part of a structlog logger that this package uses."""

    def info(self, event: str, **fields: object) -> object: ...

    def warning(self, event: str, **fields: object) -> object: ...


class NullLogger:
    """A logger that discards everything."""

    def info(self, event: str, **fields: object) -> None: ...

    def warning(self, event: str, **fields: object) -> None: ...


def status_name(status: int) -> str:
    """Return the name of a gRPC status; an undefined code counts as UNKNOWN (gRPC's statuscodes.md)."""
    return Status(status).name if status in _STATUSES else Status.UNKNOWN.name


def explain_connect(error: BaseException, where: str, secure: bool) -> Unreachable:
    """Turn a failed connection attempt to the endpoint `where` into an error text; `secure`: TLS was used."""
    if isinstance(error, Unreachable):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        return _explain_certificate(error, where)
    if isinstance(error, ssl.SSLError):
        return _explain_tls(error, where)
    if isinstance(error, TimeoutError):
        to_do = "check that etcd runs there and that no firewall is in between"
        # With an errno it is the system's own timeout.
        return Unreachable(where, "no answer in time", to_do, "connect_timeout_s" if error.errno is None else "")
    if isinstance(error, socket.gaierror):
        return Unreachable(where, "the name cannot be resolved", "check the spelling and the name server")
    if isinstance(error, FileNotFoundError):
        return Unreachable(where, "there is no such socket", "check the path and that etcd runs")
    if isinstance(error, PermissionError):
        return Unreachable(where, "permission denied", "check who may open the socket")
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.ECONNREFUSED or isinstance(error, ConnectionRefusedError):
        return Unreachable(where, "connection refused", "check that etcd runs and listens on that address and port")
    if isinstance(error, ConnectionError):
        return closed_in_handshake(where) if secure else closed_early(where, secure)
    if code in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return Unreachable(where, "no route to the host", "check the address and the network")
    text = str(error) or type(error).__name__
    return Unreachable(where, f"the connection failed ({text})", "check that etcd runs there")


def _explain_certificate(error: ssl.SSLCertVerificationError, where: str) -> Unreachable:
    reason = error.verify_message or "verification failed"
    if "mismatch" in reason or "is not valid for" in reason:
        to_do = "connect by a name or address that the certificate lists"
    elif "expired" in reason or "not yet valid" in reason:
        to_do = "renew the certificate or set the clock"
    else:
        to_do = "pass the certificate authority that signed it (--cacert)"
    return Unreachable(where, f"its certificate is not trusted ({reason})", to_do)


def _explain_tls(error: ssl.SSLError, where: str) -> Unreachable:
    reason = error.reason or ""
    if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER_FAILURE" in reason or "HTTP_REQUEST" in reason:
        return Unreachable(where, "it does not speak TLS", "use http:// for this endpoint, or check the port")
    if "ALERT_CERTIFICATE_EXPIRED" in reason:
        to_do = "renew the files of --cert and --key, which need no restart, or set its clock"
        return Unreachable(where, "it says that our certificate has expired", to_do)
    if "CERTIFICATE_REQUIRED" in reason or "BAD_CERTIFICATE" in reason or "HANDSHAKE_FAILURE" in reason:
        return Unreachable(
            where, f"it refused our certificate ({reason})", "give one that it trusts (--cert and --key)"
        )
    if "UNKNOWN_CA" in reason:
        return Unreachable(
            where, "it does not trust our certificate", "give one that its authority signed (--cert and --key)"
        )
    return Unreachable(where, f"the TLS handshake failed ({reason or error})", "check the certificates on both sides")


def closed_in_handshake(where: str) -> Unreachable:
    """Return the error for a server that closed the connection before the end of the TLS handshake."""
    return Unreachable(
        where,
        "it closed the connection during the TLS handshake",
        "if it does not use TLS, use http:// for this endpoint; else check the port, --cert and --key",
    )


def closed_early(where: str, secure: bool) -> Unreachable:
    """Return the error for a server that closed the connection before it sent its HTTP/2 SETTINGS."""
    if secure:
        return Unreachable(
            where, "it closed the connection after the TLS handshake", "check --cert and --key, and that it is an etcd"
        )
    return Unreachable(
        where,
        "it closed the connection at once",
        "if it expects TLS, use https:// for this endpoint; else check the port",
    )


def not_http2(where: str, secure: bool, first: bytes) -> Unreachable:
    """Return the error for a server whose first bytes are not HTTP/2."""
    if first[:1] == b"\x15" and first[1:2] == b"\x03":
        return Unreachable(where, "it expects TLS", "use https:// for this endpoint")
    if first[:5] == b"HTTP/":
        if b"HTTPS" in first or b"TLS" in first:
            return Unreachable(where, "it expects TLS", "use https:// for this endpoint")
        hint = "" if secure else ", or https:// if it expects TLS"
        return Unreachable(where, "it speaks HTTP/1, unlike etcd", f"use etcd's client port{hint}")
    return Unreachable(where, "the server does not speak HTTP/2", "use etcd's client port")
