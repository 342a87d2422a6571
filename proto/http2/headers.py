"""Validity of header lists (RFC 9113 sections 8.1.1, 8.2, 8.3, 8.5; RFC 9110 sections 5.1, 5.5).

A malformed list is a stream error, never a connection error. The same fields are received again and again, so the
result of checking a short one is cached; the cache is bounded and shared by all connections.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# The kinds of fields, as bits: the kinds seen in a list are their union.
_REGULAR = 0
_METHOD = 1
_SCHEME = 2
_PATH = 4
_AUTHORITY = 8
_STATUS = 16
_CONTENT_LENGTH = 32
_HOST = 64
_BAD = 128
_CONNECT = 256

_REQUEST_PSEUDO = _METHOD | _SCHEME | _PATH | _AUTHORITY
_PSEUDO = _REQUEST_PSEUDO | _STATUS
_REQUEST_REQUIRED = _METHOD | _SCHEME | _PATH

_SPECIAL = {
    b":method": _METHOD,
    b":scheme": _SCHEME,
    b":path": _PATH,
    b":authority": _AUTHORITY,
    b":status": _STATUS,
    b"content-length": _CONTENT_LENGTH,
    b"host": _HOST,
}
# Fields of HTTP/1 connections (8.2.2).
_CONNECTION_SPECIFIC = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})

# A token (RFC 9110 5.6.2) without upper case (8.2.1), after the colon of a pseudo-header field.
_NAME = re.compile(rb":?[!#$%&'*+.^_`|~0-9a-z-]+").fullmatch
# No control character except a tab (RFC 9110 5.5), and no leading or trailing blanks (8.2.1). RFC 9113 itself forbids
# NUL, CR and LF only, but Go's HTTP/2 (golang.org/x/net/http/httpguts, ValidHeaderFieldValue) resets a stream for any
# of them: at etcd that may be a stream that many clients share.
_VALUE = re.compile(rb"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?").fullmatch
_STATUS_VALUE = re.compile(rb"[1-9][0-9][0-9]").fullmatch
_LENGTH_VALUE = re.compile(rb"[0-9]{1,18}").fullmatch

# Not cached: secrets, and fields that differ in each call.
_PASSING = frozenset({b"authorization", b"cookie", b"grpc-timeout", b"token"})
_KINDS_MAX = 4_096
_KIND_BYTES_MAX = 160
_kinds: dict[tuple[bytes, bytes], int] = {}


class MalformedHeaders(Exception):
    """A header list that RFC 9113 forbids; the text is the reason."""


def check_request(headers: Sequence[tuple[bytes, bytes]]) -> int | None:
    """Check a request's header list and return its content-length, if any. Raises MalformedHeaders."""
    seen = _check(headers, _REQUEST_PSEUDO)
    if seen & _CONNECT:
        if seen & _REQUEST_PSEUDO != _METHOD | _AUTHORITY:
            raise MalformedHeaders("CONNECT needs :authority and no other pseudo-header field")
    elif seen & _REQUEST_REQUIRED != _REQUEST_REQUIRED:
        raise MalformedHeaders("request without :method, :scheme or :path")
    if seen & _HOST and seen & _AUTHORITY:
        _check_host(headers)
    return content_length(headers) if seen & _CONTENT_LENGTH else None


def check_response(headers: Sequence[tuple[bytes, bytes]]) -> tuple[int, int | None]:
    """Check a response's header list and return its status and content-length. Raises MalformedHeaders."""
    seen = _check(headers, _STATUS)
    if not seen & _STATUS:
        raise MalformedHeaders("response without :status")
    # Pseudo-header fields are first, and a response has only one.
    status = int(headers[0][1])
    if status == 101:
        raise MalformedHeaders("status 101 does not exist in HTTP/2")
    return status, content_length(headers) if seen & _CONTENT_LENGTH else None


def check_trailers(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Check trailers. Raises MalformedHeaders."""
    _check(headers, 0)


def content_length(headers: Sequence[tuple[bytes, bytes]]) -> int:
    """Return the one value of all content-length fields. Raises MalformedHeaders if they differ."""
    values = {int(value) for name, value in headers if name == b"content-length"}
    if len(values) != 1:
        raise MalformedHeaders("content-length fields differ")
    return values.pop()


def _check(headers: Sequence[tuple[bytes, bytes]], allowed_pseudo: int) -> int:
    seen = 0
    regular_seen = False
    known = _kinds.get
    for field in headers:
        kind = known(field)
        if kind is None:
            kind = _classify(field)
        if kind & _PSEUDO:
            if regular_seen:
                raise MalformedHeaders("pseudo-header field after a regular one")
            if not kind & allowed_pseudo:
                raise MalformedHeaders(f"{field[0].decode('ascii')} is not allowed here")
            if kind & seen:
                raise MalformedHeaders(f"{field[0].decode('ascii')} twice")
        elif kind == _BAD:
            raise MalformedHeaders(f"forbidden field {field[0][:64]!r}")
        else:
            regular_seen = True
        seen |= kind
    return seen


def _classify(field: tuple[bytes, bytes]) -> int:
    name, value = field
    kind = _kind(name, value)
    if len(name) + len(value) <= _KIND_BYTES_MAX and name not in _PASSING:
        if len(_kinds) >= _KINDS_MAX:
            _kinds.clear()
        _kinds[(name, value)] = kind
    return kind


def _kind(name: bytes, value: bytes) -> int:
    kind = _SPECIAL.get(name, _REGULAR)
    bad = (
        _NAME(name) is None
        or _VALUE(value) is None
        or (name.startswith(b":") and kind == _REGULAR)
        or name in _CONNECTION_SPECIFIC
        or (name == b"te" and value.lower() != b"trailers")
        or (kind & (_METHOD | _SCHEME | _PATH) and not value)
        or (kind == _STATUS and _STATUS_VALUE(value) is None)
        or (kind == _CONTENT_LENGTH and _LENGTH_VALUE(value) is None)
    )
    if bad:
        return _BAD
    # CONNECT has an authority only (8.5).
    return kind | _CONNECT if kind == _METHOD and value == b"CONNECT" else kind


def _check_host(headers: Sequence[tuple[bytes, bytes]]) -> None:
    hosts = {value.lower() for name, value in headers if name in (b"host", b":authority")}
    if len(hosts) != 1:
        raise MalformedHeaders("host differs from :authority")
