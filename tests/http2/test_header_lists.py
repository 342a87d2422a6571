"""Malformed header lists: each ends its stream, and nothing else."""

from __future__ import annotations

import pytest

from proto.http2 import HeadersReceived, Http2Limits, LimitReached
from tests.http2 import wire
from tests.http2.wire import client, data, server

Fields = list[tuple[bytes, bytes]]
PSEUDO: Fields = wire.REQUEST[:4]


def without(name: bytes) -> Fields:
    return [field for field in wire.REQUEST if field[0] != name]


BAD_REQUESTS: dict[str, Fields] = {
    "no method": without(b":method"),
    "no scheme": without(b":scheme"),
    "no path": without(b":path"),
    "empty path": [*without(b":path")[:3], (b":path", b"")],
    "method twice": [(b":method", b"GET"), *wire.REQUEST],
    "status": [(b":status", b"200"), *wire.REQUEST],
    "unknown pseudo-header": [(b":protocol", b"x"), *wire.REQUEST],
    "pseudo-header after regular": [*wire.REQUEST, (b":x", b"y")],
    "known pseudo-header after regular": [*without(b":path"), (b":path", b"/")],
    "upper case": [*wire.REQUEST, (b"Grpc-Encoding", b"gzip")],
    "blank in a name": [*wire.REQUEST, (b"a b", b"")],
    "colon in a name": [*wire.REQUEST, (b"a:b", b"")],
    "empty name": [*wire.REQUEST, (b"", b"x")],
    "eight bits in a name": [*wire.REQUEST, (b"\xc3\xa4", b"x")],
    "line feed in a value": [*wire.REQUEST, (b"a", b"x\nb: y")],
    "carriage return in a value": [*wire.REQUEST, (b"a", b"x\rb")],
    "zero in a value": [*wire.REQUEST, (b"a", b"x\0")],
    "control character in a value": [*wire.REQUEST, (b"token", b"x\x01y")],
    "DEL in a value": [*wire.REQUEST, (b"token", b"x\x7fy")],
    "separator in a name": [*wire.REQUEST, (b"a(b)", b"x")],
    "blank before a value": [*wire.REQUEST, (b"a", b" x")],
    "tab after a value": [*wire.REQUEST, (b"a", b"x\t")],
    "a blank as a value": [*wire.REQUEST, (b"a", b" ")],
    "connection": [*wire.REQUEST, (b"connection", b"close")],
    "keep-alive": [*wire.REQUEST, (b"keep-alive", b"5")],
    "proxy-connection": [*wire.REQUEST, (b"proxy-connection", b"x")],
    "transfer-encoding": [*wire.REQUEST, (b"transfer-encoding", b"chunked")],
    "upgrade": [*wire.REQUEST, (b"upgrade", b"h2c")],
    "te": [*PSEUDO, (b"te", b"gzip")],
    "host unlike authority": [*wire.REQUEST, (b"host", b"elsewhere")],
    "content-length is not a number": [*wire.REQUEST, (b"content-length", b"-1")],
    "content-length empty": [*wire.REQUEST, (b"content-length", b"")],
    "content-lengths differ": [*wire.REQUEST, (b"content-length", b"1"), (b"content-length", b"2")],
    "CONNECT with a path": [(b":method", b"CONNECT"), (b":path", b"/"), (b":authority", b"a")],
    "CONNECT without authority": [(b":method", b"CONNECT")],
    "CONNECT with scheme and path": [(b":method", b"CONNECT"), *PSEUDO[1:]],
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_malformed_request_is_a_stream_error(name: str) -> None:
    """http2 point 10 (RFC 9113 8.1.1, 8.2, 8.3): other streams continue, and the shell gets no event."""
    _, peer = server()
    peer.receive(peer.request(1))
    assert peer.receive(peer.headers(3, BAD_REQUESTS[name])) == []
    assert peer.said() == ["RST_STREAM 3 PROTOCOL_ERROR"]
    assert peer.receive(data(1, b"lives"), data(3, b"late"), peer.request(5)) == ["data 1 5", "request 5"]
    assert peer.said() == []


GOOD_REQUESTS: dict[str, Fields] = {
    "no authority": without(b":authority"),
    "host like authority": [*wire.REQUEST, (b"host", b"127.0.0.1:2379")],
    "host alone": [*without(b":authority"), (b"host", b"a")],
    "odd but allowed name": [*wire.REQUEST, (b"!#$%&'*+-.^_`|~09az", b"x")],
    "blank inside a value": [*wire.REQUEST, (b"a", b"x \t y")],
    "eight bits in a value": [*wire.REQUEST, (b"a", b"\xff\xc3")],
    "empty value": [*wire.REQUEST, (b"a", b"")],
    "same field twice": [*wire.REQUEST, (b"a", b"1"), (b"a", b"2")],
    "content-length twice the same": [*wire.REQUEST, (b"content-length", b"2"), (b"content-length", b"2")],
    "CONNECT": [(b":method", b"CONNECT"), (b":authority", b"a:1")],
}


@pytest.mark.parametrize("name", GOOD_REQUESTS)
def test_a_valid_request_arrives_as_it_was_sent(name: str) -> None:
    connection, peer = server()
    for stream_id in (1, 3):
        (event,) = connection.receive(peer.headers(stream_id, GOOD_REQUESTS[name]))
        assert isinstance(event, HeadersReceived)
        assert event.headers == GOOD_REQUESTS[name]


# The rows with one additional field; host and content-length are checked in requests only.
BAD_TRAILERS = [
    name
    for name, fields in BAD_REQUESTS.items()
    if fields[:6] == wire.REQUEST and fields[6] not in ((b"host", b"elsewhere"), (b"content-length", b"1"))
]


@pytest.mark.parametrize("name", BAD_TRAILERS)
def test_malformed_trailers_are_a_stream_error(name: str) -> None:
    """http2 point 10."""
    connection, peer = server()
    peer.receive(peer.request(1), peer.request(3))
    assert peer.receive(peer.headers(1, BAD_REQUESTS[name][6:], "END_STREAM")) == ["reset 1 PROTOCOL_ERROR"]
    assert peer.said() == ["RST_STREAM 1 PROTOCOL_ERROR"]
    assert list(connection.streams) == [3]


# Content after content-length 5: (frames' sizes, the last one ends the stream) -> events.
CONTENT: dict[str, tuple[list[int], bool, list[str]]] = {
    "right": ([5], True, ["data 1 5 END"]),
    "right in parts": ([2, 3, 0], True, ["data 1 2", "data 1 3", "data 1 0 END"]),
    "not yet all": ([4], False, ["data 1 4"]),
    "too little": ([4], True, ["reset 1 PROTOCOL_ERROR"]),
    "nothing": ([0], True, ["reset 1 PROTOCOL_ERROR"]),
    "too much": ([3, 3], False, ["data 1 3", "reset 1 PROTOCOL_ERROR"]),
}


@pytest.mark.parametrize("name", CONTENT)
def test_content_must_match_content_length(name: str) -> None:
    """http2 point 10 (8.1.1), for requests."""
    sizes, ends, expected = CONTENT[name]
    connection, peer = server()
    peer.receive(peer.request(1, extra=[(b"content-length", b"5")]))
    before = connection.receive_window + connection._unreturned
    frames = [data(1, bytes(size)) for size in sizes[:-1]]
    frames.append(data(1, bytes(sizes[-1]), *(["END_STREAM"] if ends else [])))
    assert peer.receive(*frames) == expected
    reported_bytes = sum(int(line.split()[2]) for line in expected if line.startswith("data"))
    assert connection.receive_window + connection._unreturned == before - reported_bytes


def test_content_length_binds_the_trailers_too() -> None:
    """http2 point 10."""
    connection, peer = server()
    peer.receive(peer.request(1, extra=[(b"content-length", b"5")]), data(1, b"abcd"))
    assert peer.receive(peer.headers(1, [(b"a", b"b")], "END_STREAM")) == ["reset 1 PROTOCOL_ERROR"]
    assert peer.receive(peer.request(3, "END_STREAM", extra=[(b"content-length", b"5")])) == []
    assert peer.said() == ["RST_STREAM 1 PROTOCOL_ERROR", "RST_STREAM 3 PROTOCOL_ERROR"]
    assert peer.receive(peer.request(5, "END_STREAM", extra=[(b"content-length", b"0")])) == ["request 5 END"]
    assert not connection.closed


BAD_RESPONSES: dict[str, Fields] = {
    "no status": [(b"content-type", b"x")],
    "status twice": [(b":status", b"200"), (b":status", b"200")],
    "status is not a number": [(b":status", b"2xx")],
    "status too short": [(b":status", b"20")],
    "status zero": [(b":status", b"000")],
    "status 101": [(b":status", b"101")],
    "a request's pseudo-header": [(b":status", b"200"), (b":path", b"/")],
    "status after regular": [(b"a", b"b"), (b":status", b"200")],
    "upper case": [(b":status", b"200"), (b"A", b"b")],
    "nothing": [],
}


@pytest.mark.parametrize("name", BAD_RESPONSES)
def test_a_malformed_response_is_a_stream_error(name: str) -> None:
    """http2 point 10, in the client role."""
    connection, peer = client()
    connection.open(wire.REQUEST)
    connection.open(wire.REQUEST)
    peer.said()
    assert peer.receive(peer.headers(1, BAD_RESPONSES[name])) == ["reset 1 PROTOCOL_ERROR"]
    assert peer.said() == ["RST_STREAM 1 PROTOCOL_ERROR"]
    assert peer.receive(peer.headers(3, wire.RESPONSE)) == ["response 3"]


@pytest.mark.parametrize(
    ("method", "status", "sizes", "expected"),
    [
        (b"GET", b"200", [5], ["response 1", "data 1 5 END"]),
        (b"GET", b"200", [4], ["response 1", "reset 1 PROTOCOL_ERROR"]),
        (b"HEAD", b"200", [0], ["response 1", "data 1 0 END"]),
        (b"GET", b"304", [0], ["response 1", "data 1 0 END"]),
        (b"GET", b"204", [0], ["response 1", "data 1 0 END"]),
    ],
)
def test_content_length_of_responses(method: bytes, status: bytes, sizes: list[int], expected: list[str]) -> None:
    """http2 point 10 (8.1.1): responses without content may still have a content-length."""
    connection, peer = client()
    connection.open([(b":method", method), *wire.REQUEST[1:]], end_stream=True)
    response = peer.headers(1, [(b":status", status), (b"content-length", b"5")])
    assert peer.receive(response, *[data(1, bytes(size), "END_STREAM") for size in sizes]) == expected


def test_a_response_that_ends_at_once_has_no_content() -> None:
    connection, peer = client()
    for _ in range(2):
        connection.open(wire.REQUEST, end_stream=True)
    fields = [(b":status", b"200"), (b"content-length", b"5")]
    assert peer.receive(peer.headers(1, fields, "END_STREAM")) == ["reset 1 PROTOCOL_ERROR"]
    fields[1] = (b"content-length", b"0")
    assert peer.receive(peer.headers(3, fields, "END_STREAM")) == ["response 3 END"]


LIST_MAX = 1_000
# The size of a list of wire.REQUEST and one more field, without that field's value (6.5.2).
OVERHEAD = sum(32 + len(name) + len(value) for name, value in wire.REQUEST) + 32 + len(b"big")


@pytest.mark.parametrize("bytewise", [False, True])
@pytest.mark.parametrize("part", [10**6, 7])
def test_an_oversized_header_list_keeps_the_compression_state(part: int, bytewise: bool) -> None:
    """http2 point 10 (10.5.1): exactly the limit is accepted, one byte more ends the stream only."""
    connection, peer = server(Http2Limits(header_list_bytes_max=LIST_MAX, continuations_max=10**6))
    fits = [*wire.REQUEST, (b"big", b"x" * (LIST_MAX - OVERHEAD))]
    assert peer.receive(*peer.in_parts(1, fits, part), bytewise=bytewise) == ["request 1"]
    for stream_id, size in ((3, LIST_MAX - OVERHEAD + 1), (5, 5_000), (7, 30_000)):
        fields = [*wire.REQUEST, (b"big", b"y" * size), (b"after", b"z")]
        frames = peer.in_parts(stream_id, fields, min(part, 16_000))
        assert peer.receive(*frames, bytewise=bytewise and size < 10_000) == []
        assert peer.said() == [f"RST_STREAM {stream_id} ENHANCE_YOUR_CALM"]
    # `after` entered the table with the refused list, and the earlier entries were evicted, as in the peer's table.
    (event,) = connection.receive(peer.headers(9, [*wire.REQUEST, (b"after", b"z")]))
    assert isinstance(event, HeadersReceived)
    assert event.headers == [*wire.REQUEST, (b"after", b"z")]


def test_an_oversized_header_list_is_not_buffered() -> None:
    """http2 point 10 (10.5.1): of any list, at most one field more than the limit is held."""
    connection, peer = server(Http2Limits(header_list_bytes_max=LIST_MAX, continuations_max=10**6))
    many = peer.in_parts(1, [*wire.REQUEST, *[(b"n%d" % n, b"v" * 100) for n in range(2_000)]], 16_000)
    huge = peer.in_parts(3, [*wire.REQUEST, (b"huge", b"v" * 100_000)], 16_000)
    for frame in [*many, *huge]:
        peer.receive(frame)
        held = sum(len(n) + len(v) for n, v in connection._decoder._fields) + len(connection._decoder._rest)
        assert held <= LIST_MAX + 200
    assert peer.said() == ["RST_STREAM 1 ENHANCE_YOUR_CALM", "RST_STREAM 3 ENHANCE_YOUR_CALM"]


def test_oversized_trailers_end_their_stream() -> None:
    connection, peer = server(Http2Limits(header_list_bytes_max=LIST_MAX))
    peer.receive(peer.request(1), peer.request(3))
    trailers = peer.headers(1, [(b"big", b"x" * LIST_MAX)], "END_STREAM")
    events = connection.receive(trailers)
    assert events[0] == LimitReached("header_list_bytes_max")
    assert wire.event_lines(events) == ["reset 1 ENHANCE_YOUR_CALM"]
    assert list(connection.streams) == [3]
