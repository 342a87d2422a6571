"""HPACK both ways, compared with `hpack`; the cost of a repeated header list; blocks in any number of parts."""

from __future__ import annotations

import random

import pytest
from hpack import Decoder, Encoder, HPACKError, NeverIndexedHeaderTuple

from proto.http2.compression import HeaderDecoder, HeaderEncoder
from tests.http2.wire import REQUEST, RESPONSE, TRAILERS

FIELDS_MAX = 100_000
"""More than any block here has; test_floods.py tests the limit itself."""
Fields = list[tuple[bytes, bytes]]
NAMES = [
    b":path",
    b":method",
    b"content-type",
    b"user-agent",
    b"grpc-timeout",
    b"token",
    b"x-long",
    b"te",
    b"grpc-status",
]


def feed_whole(decoder: HeaderDecoder, block: bytes) -> Fields | None:
    decoder.feed(block)
    return decoder.finish()


def random_fields(rng: random.Random) -> Fields:
    fields: Fields = []
    for _ in range(rng.randrange(8)):
        value = rng.choice(
            [b"", b"GET", b"trailers", b"%dm" % rng.randrange(9), rng.randbytes(rng.choice([1, 9, 90, 300]))]
        )
        fields.append((rng.choice(NAMES), value))
    return fields


@pytest.mark.parametrize("seed", range(20))
def test_hpack_decodes_our_header_blocks(seed: int) -> None:
    """RFC 7541: with table resizes, evictions and never-indexed fields."""
    rng = random.Random(seed)
    encoder, decoder = HeaderEncoder(), Decoder()
    for _ in range(300):
        if rng.random() < 0.05:
            size = rng.choice([0, 50, 1_024, 1_500, 4_096, 100_000])
            encoder.resize(size)
            decoder.max_allowed_table_size = max(size, decoder.header_table_size)
        fields = random_fields(rng)
        if rng.random() < 0.2:
            fields = [NeverIndexedHeaderTuple(*field) for field in fields]
        received = list(decoder.decode(encoder.encode(fields), raw=True))
        assert received == fields
        if fields and isinstance(fields[0], NeverIndexedHeaderTuple):
            fresh = [field for field in received if field[1] not in (b"", b"GET")]
            assert all(not field.indexable for field in fresh if field[0] == b"token")


def test_smallest_and_last_of_several_table_sizes_are_announced() -> None:
    """RFC 7541 4.2: a size in between may be more than the peer allows by now, which would end the connection."""
    encoder, decoder = HeaderEncoder(), Decoder()
    encoder.encode([])
    for sizes, announced in (([3_000, 1_500], b"\x3f\xbd\x0b"), ([4_096, 100, 2_000], b"\x3f\x45\x3f\xb1\x0f")):
        for size in sizes:
            encoder.resize(size)
        decoder.max_allowed_table_size = sizes[-1]
        block = encoder.encode(RESPONSE)
        assert block.startswith(announced)
        assert list(decoder.decode(block, raw=True)) == RESPONSE


def test_repeated_header_lists_are_short_and_keep_the_table() -> None:
    """The usual header lists of a gRPC server take one byte a field after the first time."""
    encoder = HeaderEncoder()
    encoder.encode(RESPONSE)
    encoder.encode(TRAILERS)
    assert len(encoder.encode(RESPONSE)) == 2
    assert len(encoder.encode(TRAILERS)) == 1
    entries = list(encoder._encoder.header_table.dynamic_entries)
    for n in range(1_000):
        encoder.encode([*RESPONSE, (b"grpc-message", b"text %d" % n)])
        encoder.encode(TRAILERS)
    assert list(encoder._encoder.header_table.dynamic_entries) == entries
    assert len(encoder._memo) <= 128


def test_secrets_do_not_enter_the_table() -> None:
    """RFC 7541 7.1.3: tokens are sent as never-indexed, and so are fields that were received as such (6.2.3)."""
    encoder, decoder = HeaderEncoder(), Decoder()
    fields = [(b"token", b"secret"), (b"authorization", b"secret"), NeverIndexedHeaderTuple(b"user-agent", b"shy")]
    plain = [(b"grpc-encoding", b"x"), (b"user-agent", b"open")]
    for _ in range(3):
        received = list(decoder.decode(encoder.encode(fields), raw=True))
        assert [field.indexable for field in received] == [False, False, False]
        assert received == fields
        assert list(decoder.decode(encoder.encode(plain), raw=True)) == plain
    # Not even if the same field is in the table.
    fields.append(NeverIndexedHeaderTuple(*plain[0]))
    for known in (fields, fields[-1:]):
        assert not any(field.indexable for field in decoder.decode(encoder.encode(known), raw=True))
    assert sorted(encoder._encoder.header_table.dynamic_entries) == plain


@pytest.mark.parametrize("seed", range(20))
def test_header_blocks_of_hpack_are_decoded_in_any_parts(seed: int) -> None:
    """RFC 7541, and RFC 9113 4.3: a block may be split anywhere."""
    rng = random.Random(seed)
    encoder, decoder = Encoder(), HeaderDecoder(1 << 20, 4_096, FIELDS_MAX)
    for _ in range(100):
        if rng.random() < 0.1:
            encoder.header_table_size = rng.choice([0, 100, 4_096])
        fields = random_fields(rng)
        if rng.random() < 0.2:
            fields = [NeverIndexedHeaderTuple(*field) for field in fields]
        block = encoder.encode(fields, huffman=rng.random() < 0.5)
        while block:
            size = rng.randrange(len(block)) + 1
            decoder.feed(block[:size])
            block = block[size:]
        received = decoder.finish()
        assert received == fields
        assert list(decoder.table.dynamic_entries) == list(encoder.header_table.dynamic_entries)


@pytest.mark.parametrize("seed", range(10))
def test_invalid_blocks_give_the_same_result_as_in_hpack(seed: int) -> None:
    """Random and mutated blocks: both decode the same fields, or both refuse the block."""
    rng = random.Random(seed)
    for _ in range(300):
        block = bytearray(Encoder().encode([*REQUEST, *random_fields(rng)]))
        for _ in range(rng.randrange(4)):
            block[rng.randrange(len(block))] = rng.randrange(256)
        judged: list[object] = []
        try:
            judged.append(list(Decoder(1 << 24).decode(bytes(block), raw=True)))
        except HPACKError:
            judged.append("refused")
        decoder = HeaderDecoder(1 << 24, 4_096, FIELDS_MAX)
        try:
            for at in range(0, len(block), 7):
                decoder.feed(bytes(block[at : at + 7]))
            judged.append(decoder.finish())
        except HPACKError:
            judged.append("refused")
        assert judged[0] == judged[1], block.hex()


@pytest.mark.parametrize(
    "block",
    [
        b"\x80",  # index 0
        b"\xff\x80\x80\x80\x80\x80\x80\x01",  # an integer that does not end
        b"\xbe",  # index 62 of an empty table
        b"\xff\x00",  # the same in the long form, index 127
        b"\x7f\x80\x01\x01x",  # a literal with the index of a missing name
        b"\x3f\xe2\x1f",  # a table larger than allowed
        b"\x82\x20",  # a table size after a field
        b"\x40\x81\xff\x01x",  # not a Huffman code
        b"\x40\x0aabc",  # cut off
    ],
)
def test_broken_header_blocks_are_refused(block: bytes) -> None:
    """RFC 7541 2.3.3, 4.2, 5.1, 5.2, 6.3."""
    decoder = HeaderDecoder(65_536, 4_096, FIELDS_MAX)
    with pytest.raises(HPACKError):
        feed_whole(decoder, block)


def test_an_oversized_value_empties_the_table_as_at_the_peer() -> None:
    """RFC 7541 4.4; the value is never held."""
    encoder, decoder = Encoder(), HeaderDecoder(1_000, 4_096, FIELDS_MAX)
    decoder.feed(encoder.encode([(b"a", b"b")]))
    assert decoder.finish() == [(b"a", b"b")]
    block = encoder.encode([(b"c", b"d"), (b"huge", b"x" * 50_000), (b"e", b"f")], huffman=False)
    for at in range(0, len(block), 1_000):
        decoder.feed(block[at : at + 1_000])
        assert len(decoder._rest) == 0
    assert decoder.finish() is None
    assert list(decoder.table.dynamic_entries) == list(encoder.header_table.dynamic_entries) == [(b"e", b"f")]
    # Without indexing it does not change the table.
    decoder.feed(encoder.encode([NeverIndexedHeaderTuple(b"huge", b"x" * 50_000)], huffman=False))
    assert decoder.finish() is None
    assert list(decoder.table.dynamic_entries) == [(b"e", b"f")]


def test_a_name_longer_than_any_list_is_refused() -> None:
    decoder = HeaderDecoder(1_000, 4_096, FIELDS_MAX)
    with pytest.raises(HPACKError):
        decoder.feed(Encoder().encode([(b"n" * 50_000, b"")], huffman=False)[:10])
