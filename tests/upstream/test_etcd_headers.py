"""Go's HTTP/2 and our listener accept the same header fields: no accepted field resets a stream at etcd."""

from __future__ import annotations

from proto.http2.headers import MalformedHeaders, check_trailers
from tests.etcd.server import EtcdServer
from upstream.connecting import connect
from upstream.connection import ClientConnection
from upstream.endpoints import parse_endpoint
from upstream.errors import CallFailed
from upstream.unary import call_unary

Field = tuple[bytes, bytes]


def is_malformed(field: Field) -> bool:
    """Whether our listener resets a stream for a field."""
    try:
        check_trailers([field])
    except MalformedHeaders:
        return True
    return False


async def is_reset(connection: ClientConnection, field: Field) -> bool:
    """Whether etcd resets a stream for a field."""
    try:
        await call_unary(connection, "/etcdserverpb.Maintenance/Status", b"", metadata=[field])
    except CallFailed as error:
        return "PROTOCOL_ERROR" in error.text
    return False


async def test_etcd_and_the_listener_refuse_the_same_octets(etcd: EtcdServer) -> None:
    """RFC 9110 5.1 and 5.5; each octet inside a name and inside a value."""
    octets = [bytes([number]) for number in range(256)]
    fields = [(b"name", b"a%bz" % octet) for octet in octets] + [(b"a%bz" % octet, b"value") for octet in octets]
    connection = await connect(parse_endpoint(etcd.endpoint), None)
    try:
        differ = [field for field in fields if await is_reset(connection, field) is not is_malformed(field)]
        assert differ == []
        assert connection.healthy
    finally:
        connection.close()
