"""The second half of the table of `cases.py`: messages and header lists (RFC 9113 section 8), and HPACK (RFC 7541).

The malformed lists are those of `test_header_lists.py`, each sent as a request to the listener, as an answer to the
connection to etcd, or as trailers to both.
"""

from __future__ import annotations

from collections.abc import Callable

from proto.http2.frames import HEADERS
from tests.http2.cases import (
    ANSWERED,
    COMPRESSION,
    IDLE,
    NO_FAULT,
    NOT_HERE,
    OPEN,
    PROMISED,
    PROTOCOL,
    STREAM_PROTOCOL,
    Case,
    both,
)
from tests.http2.test_header_lists import BAD_REQUESTS, BAD_RESPONSES, BAD_TRAILERS, GOOD_REQUESTS
from tests.http2.wire import REQUEST, RESPONSE, TRAILERS, Peer, data, raw

CALM_STREAM = "stream ENHANCE_YOUR_CALM"
Fields = list[tuple[bytes, bytes]]

SECTIONS = {
    "8.2.2": ("connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade", "te"),
    "8.5": ("CONNECT with a path", "CONNECT without authority", "CONNECT with scheme and path", "CONNECT"),
    "8.3": (
        "method twice",
        "unknown pseudo-header",
        "pseudo-header after regular",
        "known pseudo-header after regular",
        "status after regular",
    ),
    "8.3.1": ("no method", "no scheme", "no path", "empty path", "status", "host unlike authority"),
    "8.1.1": ("content-length is not a number", "content-length empty", "content-lengths differ"),
    "8.6": ("status 101",),
    "8.3.2": (
        "no status",
        "status twice",
        "status is not a number",
        "status too short",
        "status zero",
        "a request's pseudo-header",
        "nothing",
    ),
}
"""The section of RFC 9113 about each list of `test_header_lists.py`; for the others it is 8.2.1."""


def section(name: str) -> str:
    """Return the section that a list violates, or seems to violate."""
    return next((number for number, names in SECTIONS.items() if name in names), "8.2.1")


def request(number: str, what: str, fields: Fields, outcome: str, *flags: str) -> Case:
    """Make a row of a request to the listener."""
    return Case(number, what, lambda peer: [peer.headers(IDLE, fields, *flags)], outcome, NOT_HERE, IDLE)


def answer(number: str, what: str, outcome: str, *parts: Callable[[Peer], bytes]) -> Case:
    """Make a row of frames that answer one of our calls."""
    return Case(number, what, lambda peer: [part(peer) for part in parts], NOT_HERE, outcome, PROMISED)


def head(fields: Fields, *flags: str) -> Callable[[Peer], bytes]:
    """Return HEADERS on the call that is not answered yet."""
    return lambda peer: peer.headers(PROMISED, fields, *flags)


def body(size: int, *flags: str) -> Callable[[Peer], bytes]:
    """Return DATA on it."""
    return lambda _: data(PROMISED, bytes(size), *flags)


def trailers(name: str) -> Case:
    """Make a row of malformed trailers to both roles."""
    fields = BAD_REQUESTS[name][len(REQUEST) :]
    return Case(
        section(name),
        f"in trailers: {name}",
        lambda peer: [peer.headers(OPEN, fields, "END_STREAM")],
        STREAM_PROTOCOL,
        STREAM_PROTOCOL,
    )


def block(number: str, what: str, outcome: str, *text: bytes) -> Case:
    """Make a row of trailers whose compressed form is `text`; the last of several is for the open stream."""
    streams = [9] * (len(text) - 1) + [OPEN]
    return both(number, what, outcome, *[raw(HEADERS, 5, one, each) for one, each in zip(streams, text, strict=True)])


LENGTH = (b"content-length", b"5")
OK = (b":status", b"200")

MESSAGES = (
    Case("8.1", "trailers that do not end", lambda p: [p.headers(OPEN, TRAILERS)], STREAM_PROTOCOL, STREAM_PROTOCOL),
    Case("8.1", "trailers that end", lambda p: [p.headers(OPEN, TRAILERS, "END_STREAM")], ANSWERED, ANSWERED),
    Case(
        "8.1",
        "pseudo-headers in trailers",
        lambda p: [p.headers(OPEN, [OK], "END_STREAM")],
        STREAM_PROTOCOL,
        STREAM_PROTOCOL,
    ),
    answer("8.1", "DATA before the answer's HEADERS", STREAM_PROTOCOL, body(5)),
    answer(
        "8.1", "103, then the answer", ANSWERED, head([(b":status", b"103")]), head(RESPONSE), body(5, "END_STREAM")
    ),
    answer("8.1", "103 that ends the stream", STREAM_PROTOCOL, head([(b":status", b"103")], "END_STREAM")),
    answer("8.1", "DATA after 103", STREAM_PROTOCOL, head([(b":status", b"103")]), body(5)),
    answer("8.1", "a second answer", STREAM_PROTOCOL, head(RESPONSE), head(RESPONSE)),
    answer("8.1", "103 after the answer", STREAM_PROTOCOL, head(RESPONSE), head([(b":status", b"103")])),
)

_PROMISED: dict[str, tuple[tuple[int, ...], bool, str]] = {
    "as much as content-length": ((2, 3), True, ANSWERED),
    "more": ((3, 3), False, STREAM_PROTOCOL),
    "less": ((4,), True, STREAM_PROTOCOL),
    "nothing": ((0,), True, STREAM_PROTOCOL),
}


def promised(what: str, sizes: tuple[int, ...], ends: bool, outcome: str) -> tuple[Case, Case]:
    """Make the rows of a body after content-length 5, for each role."""
    last = ["END_STREAM"] if ends else []
    parts = [body(size) for size in sizes[:-1]] + [body(sizes[-1], *last)]
    return (
        Case("8.1.1", f"in a request, {what}", lambda p: [part(p) for part in parts], outcome, NOT_HERE, PROMISED),
        answer("8.1.1", f"in an answer, {what}", outcome, head([OK, LENGTH]), *parts),
    )


LENGTHS = (
    *[case for what, row in _PROMISED.items() for case in promised(what, *row)],
    request(
        "8.1.1", "a request of HEADERS alone with content-length 5", [*REQUEST, LENGTH], STREAM_PROTOCOL, "END_STREAM"
    ),
    answer(
        "8.1.1", "an answer of HEADERS alone with content-length 5", STREAM_PROTOCOL, head([OK, LENGTH], "END_STREAM")
    ),
    answer(
        "8.1.1",
        "trailers before all of content-length",
        STREAM_PROTOCOL,
        head([OK, LENGTH]),
        body(4),
        head(TRAILERS, "END_STREAM"),
    ),
    answer(
        "8.1.1", "304 with content-length and no content", ANSWERED, head([(b":status", b"304"), LENGTH], "END_STREAM")
    ),
)

LISTS = (
    *[
        request(section(name), f"in a request: {name}", fields, STREAM_PROTOCOL)
        for name, fields in BAD_REQUESTS.items()
    ],
    *[request(section(name), f"a good request: {name}", fields, NO_FAULT) for name, fields in GOOD_REQUESTS.items()],
    *[
        answer(section(name), f"in an answer: {name}", STREAM_PROTOCOL, head(fields))
        for name, fields in BAD_RESPONSES.items()
    ],
    *[trailers(name) for name in BAD_TRAILERS],
    Case(
        "10.5.1",
        "a list above MAX_HEADER_LIST_SIZE",
        lambda p: p.in_parts(OPEN, [(b"n%d" % n, b"v" * 600) for n in range(110)], 16_000, "END_STREAM"),
        CALM_STREAM,
        CALM_STREAM,
    ),
    request("9218 5", "a priority field", [*REQUEST, (b"priority", b"u=0, i")], NO_FAULT),
)

HPACK = (
    block("7541 2.3.3", "index 0", COMPRESSION, b"\x80"),
    block("7541 2.3.3", "an index above both tables", COMPRESSION, b"\xff\x47\x11"),
    block("7541 2.3.3", "a name's index above both tables", COMPRESSION, b"\x7f\x47\x11\x01a"),
    block("7541 4.2", "two table sizes at the start", ANSWERED, b"\x20\x3f\xe1\x1f" + b"\x00\x01a\x01b"),
    block("7541 4.2", "a table size after a field", COMPRESSION, b"\x00\x01a\x01b\x20"),
    block("7541 4.2", "a table size between fields", COMPRESSION, b"\x00\x01a\x01b\x20\x00\x01a\x01b"),
    block("7541 4.4", "an index that a table size has evicted", COMPRESSION, b"\x40\x01z\x01z", b"\x20\xbe"),
    block(
        "7541 4.4",
        "a field larger than the table empties it",
        COMPRESSION,
        b"\x40\x01z\x7f\xa1\x1f" + b"v" * 4_128,
        b"\xbe",
    ),
    block("7541 5.1", "a number without an end", COMPRESSION, b"\xff" + b"\x80" * 20),
    block("7541 5.1", "a number above 2^32", COMPRESSION, b"\xff\xff\xff\xff\xff\xff\x0f"),
    block("7541 5.1", "a number that is cut off", COMPRESSION, b"\xff\xff"),
    block("7541 5.2", "a name longer than the block", COMPRESSION, b"\x00\x05ab"),
    block("7541 5.2", "a value longer than the block", COMPRESSION, b"\x00\x01a\x05b"),
    block("7541 5.2", "Huffman padding of 8 bits", COMPRESSION, b"\x00\x01a\x82\x1f\xff"),
    block("7541 5.2", "Huffman padding that is not the start of EOS", COMPRESSION, b"\x00\x01a\x81\x18"),
    block("7541 5.2", "EOS in a Huffman string", COMPRESSION, b"\x00\x01a\x84\xff\xff\xff\xff"),
    block("7541 5.2", "a Huffman string", ANSWERED, b"\x00\x01a\x81\x1f"),
    block("7541 6.2.3", "a never-indexed field", ANSWERED, b"\x10\x01a\x01b"),
    block("7541 6.3", "a table size above what we allow", COMPRESSION, b"\x3f\xe2\x1f\x00\x01a\x01b"),
    block("7541 6.3", "a table size and no field", ANSWERED, b"\x20"),
)

PUSHES = (
    Case(
        "8.4",
        "a pushed request",
        lambda p: [raw(5, 4, OPEN, b"\0\0\0\2" + p.block_of(REQUEST))],
        PROTOCOL,
        PROTOCOL,
    ),
)

CASES = (*MESSAGES, *LENGTHS, *LISTS, *PUSHES, *HPACK)
