"""The messages of the calls that the proxy itself makes to etcd or answers, without a library for protobuf.

They are few and small, and the library takes a tenth of the memory of a serving process, which loads it only for what
rewrites messages (a namespace, an advertised URL) and for unusual requests (`proto.plain_request`). As in `proto.scan`,
a known field number with another wire type is an unknown field, and the last of several numbers counts.

Fields: etcd's api/etcdserverpb/rpc.proto, and grpc/health/v1/health.proto.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from proto.fields import ScanError, bytes_field, fields, number_field, signed
from proto.scan import Header

# Tags, (field number << 3) | wire type. ResponseHeader, the first field of each response of etcd:
_HEADER: Final = 0x0A
_HEADER_NUMBERS: Final = (0x08, 0x10, 0x18, 0x20)
# StatusResponse:
_VERSION: Final = 0x12
_LEADER: Final = 0x20
_RAFT_INDEX: Final = 0x28
_RAFT_APPLIED_INDEX: Final = 0x38
_IS_LEARNER: Final = 0x50
# TxnRequest, its RequestOp and the RangeRequest in it:
_FAILURE: Final = 0x1A
_REQUEST_RANGE: Final = 0x0A
_KEY: Final = 0x0A
_RANGE_END: Final = 0x12
_LIMIT: Final = 0x18
_SERIALIZABLE: Final = 0x38
_KEYS_ONLY: Final = 0x40
# AuthenticateRequest and AuthenticateResponse:
_NAME: Final = 0x0A
_PASSWORD: Final = 0x12
_TOKEN: Final = 0x12
# HealthCheckRequest, HealthCheckResponse and HealthListResponse, a map:
_SERVICE: Final = 0x0A
_STATUS: Final = 0x08
_STATUSES: Final = 0x0A
_MAP_KEY: Final = 0x0A
_MAP_VALUE: Final = 0x12

CUT_OFF: Final = "a message ends in the middle of a field"


class MemberStatus(NamedTuple):
    """A StatusResponse: what a member reports of itself."""

    header: Header
    version: str
    """"" if it is not an etcd."""
    leader: int
    """The member id of the leader; 0 without one."""
    raft_index: int
    raft_applied_index: int
    is_learner: bool


def decode_status(data: bytes) -> MemberStatus:
    """Decode a StatusResponse. Raises ScanError."""
    found = _fields(data)
    numbers = {tag: value for tag, value, _ in found}
    version = next((_text(content) for tag, _, content in reversed(found) if tag == _VERSION), "")
    return MemberStatus(
        decode_header(data),
        version,
        numbers.get(_LEADER, 0),
        numbers.get(_RAFT_INDEX, 0),
        numbers.get(_RAFT_APPLIED_INDEX, 0),
        numbers.get(_IS_LEARNER, 0) != 0,
    )


def decode_header(data: bytes) -> Header:
    """Decode the header of any response of etcd. Raises ScanError."""
    numbers = dict.fromkeys(_HEADER_NUMBERS, 0)
    try:
        for tag, _, body, end, _ in fields(data, 0, len(data)):
            if tag == _HEADER:
                for inner, _, _, _, value in fields(data, body, end):
                    numbers[inner] = value
    except IndexError:
        raise ScanError(CUT_OFF) from None
    cluster_id, member_id, revision, raft_term = (numbers[tag] for tag in _HEADER_NUMBERS)
    return Header.make(cluster_id, member_id, signed(revision), raft_term)


def encode_reads_not_made(ranges: Iterable[tuple[bytes, bytes]], *, serializable: bool) -> bytes:
    """Encode a TxnRequest whose `failure` reads one key of each range; without compares, `failure` is not executed."""
    requests = [bytes_field(_REQUEST_RANGE, _range(*each, serializable=serializable)) for each in ranges]
    return b"".join([bytes_field(_FAILURE, request) for request in requests])


def _range(key: bytes, range_end: bytes, *, serializable: bool) -> bytes:
    text = (bytes_field(_KEY, key) if key else b"") + (bytes_field(_RANGE_END, range_end) if range_end else b"")
    return text + number_field(_LIMIT, 1) + number_field(_SERIALIZABLE, serializable) + number_field(_KEYS_ONLY, 1)


def encode_login(user: str, password: str) -> bytes:
    """Encode an AuthenticateRequest."""
    return bytes_field(_NAME, user.encode()) + bytes_field(_PASSWORD, password.encode())


def decode_token(data: bytes) -> bytes:
    """Return the token of an AuthenticateResponse; b"" if it has none. Raises ScanError."""
    return _last_text(data, _TOKEN).encode()


def decode_health_request(data: bytes) -> str:
    """Return the service of a HealthCheckRequest. Raises ScanError."""
    return _last_text(data, _SERVICE)


def encode_health(status: int) -> bytes:
    """Encode a HealthCheckResponse."""
    return number_field(_STATUS, status)


def encode_health_list(services: Iterable[str], status: int) -> bytes:
    """Encode a HealthListResponse in which all services have one status."""
    value = bytes_field(_MAP_VALUE, encode_health(status))
    return b"".join([bytes_field(_STATUSES, bytes_field(_MAP_KEY, name.encode()) + value) for name in services])


def _last_text(data: bytes, wanted: int) -> str:
    return next((_text(content) for tag, _, content in reversed(_fields(data)) if tag == wanted), "")


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ScanError("a text is not UTF-8") from None


def _fields(data: bytes) -> list[tuple[int, int, bytes]]:
    """Return tag, number and content of each field. Raises ScanError."""
    try:
        return [(tag, value, data[body:end]) for tag, _, body, end, value in fields(data, 0, len(data))]
    except IndexError:
        raise ScanError(CUT_OFF) from None
