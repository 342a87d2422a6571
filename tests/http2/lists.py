"""Random header lists and blocks for the fuzzer. Most of them pass the first checks, so that later ones are reached."""

from __future__ import annotations

import random

from hpack import NeverIndexedHeaderTuple
from hpack.hpack import encode_integer
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

from tests.http2.test_header_lists import BAD_REQUESTS, BAD_RESPONSES, GOOD_REQUESTS
from tests.http2.wire import REQUEST

Fields = list[tuple[bytes, bytes]]

_HUFFMAN = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH)
_ODD = [*BAD_REQUESTS.values(), *GOOD_REQUESTS.values()]
_STATUSES = [b"200", b"200", b"200", b"204", b"304", b"404", b"100", b"103", b"101"]


def odd_request(rng: random.Random) -> Fields:
    """Return a malformed or unusual list: from the tables, with content-length, or with never-indexed fields."""
    match rng.randrange(5):
        case 0:
            return list(rng.choice(_ODD))
        case 1:
            return [*REQUEST, (b"content-length", b"%d" % rng.choice([0, 1, 9, 10, 300]))]
        case 2:
            return [*REQUEST, NeverIndexedHeaderTuple(b"token", rng.randbytes(4).hex().encode())]
        case 3:
            # Around LIMITS.header_list_bytes_max of the fuzzer, and far more than its decoder holds.
            size = rng.choice([100, 100, 300, 300, 300, 300, 300, 3_000, 3_000, 20_000])
            return [*REQUEST, (b"big", b"b" * size), (b"after", b"1")]
        case _:
            return [*REQUEST, *[(b"n%d" % rng.randrange(99), b"v") for _ in range(rng.choice([3, 70]))]]


def response(rng: random.Random) -> Fields:
    """Return a response's header list; one in eight is malformed."""
    if rng.random() < 0.12:
        return list(rng.choice(list(BAD_RESPONSES.values())))
    fields = [(b":status", rng.choice(_STATUSES)), (b"content-type", b"application/grpc")]
    if rng.random() < 0.3:
        fields.append((b"content-length", b"%d" % rng.choice([0, 9, 18, 300])))
    return fields


def block(rng: random.Random) -> bytes:
    """Return a header block of random HPACK representations, few of them invalid (RFC 7541 6)."""
    parts = [_number(rng.choice([0, 50, 4_096, 5_000]), 5, 0x20)] if rng.random() < 0.2 else []
    parts += [_part(rng) for _ in range(rng.randrange(1, 8))]
    return b"".join(parts)


def _part(rng: random.Random) -> bytes:
    roll = rng.random()
    if roll < 0.3:
        return _number(rng.choice([*range(1, 65), 127, 128, 200]), 7, 0x80)
    if roll < 0.33:
        return _number(rng.choice([0, 100, 4_096, 2**20]), 5, 0x20)
    bits, mark = rng.choice([(6, 0x40), (4, 0), (4, 0x10)])
    index = rng.choice([0, 0, 1, 4, 31, 62, 63, 90])
    name = b"" if index else _string(rng)
    return _number(index, bits, mark) + name + _string(rng)


def _number(value: int, bits: int, mark: int) -> bytes:
    encoded = bytearray(encode_integer(value, bits))
    encoded[0] |= mark
    return bytes(encoded) + (b"\x80" * 9 if value > 2**19 else b"")


def _string(rng: random.Random) -> bytes:
    text = rng.choice([b"", b"a", b"te", b"trailers", b"x" * 70, b"y" * 700, rng.randbytes(3)])
    if rng.random() < 0.5:
        return _number(len(text), 7, 0) + text
    packed = _HUFFMAN.encode(text)
    if packed and rng.random() < 0.1:
        packed = packed[:-1] + rng.randbytes(rng.randrange(3))
    return _number(len(packed), 7, 0x80) + packed
