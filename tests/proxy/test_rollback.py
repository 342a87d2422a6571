"""What is read is held against what was known when it was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from proto.scan import Header
from proxy.reads import Asked
from proxy.rollback import TRIED_AT_ONCE, Rollback
from tests.proxy.scenario import run
from tests.waiting import until_async


class FakeReader:
    """Keeps what is asked."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.observe: Callable[[], Callable[[Header, bool], None]]

    def prove(self, asked: Asked, wanted: Callable[[], bool]) -> None:
        assert wanted()
        self.asked.append(asked)


class FakeWatch:
    """An open watch with a token."""

    def __init__(self, token: bytes | None) -> None:
        self.token = token
        self.key, self.range_end = b"k", b""

    def tokens(self) -> Iterator[bytes | None]:
        yield self.token


class Rig:
    """A rollback whose surroundings are plain values."""

    def __init__(self) -> None:
        self.known = 10
        self.own: bytes | None = None
        self.back: list[int] = []
        self.reader = FakeReader()
        reader: Any = self.reader
        self.rollback = Rollback(reader, lambda: self.known, lambda: self.own, self.went_back)

    def went_back(self, header: Header) -> None:
        self.known = header.revision
        self.back.append(header.revision)


def at(revision: int) -> Header:
    return Header.make(1, 2, revision, 3)


def test_only_what_is_linearizable_and_older_than_its_question_tells() -> None:
    rig = Rig()
    early = rig.rollback.begin()
    rig.known = 20
    early(at(15), True)
    rig.rollback.begin()(at(19), False)
    assert rig.back == []
    rig.rollback.begin()(at(19), True)
    assert rig.back == [19]


def test_reads_from_before_it_went_back_say_nothing_any_more() -> None:
    rig = Rig()
    first, second, third = (rig.rollback.begin() for _ in range(3))
    first(at(5), True)
    assert rig.back == [5]
    # The store goes on; a slow answer from before is neither older nor newer than it.
    rig.rollback.begin()(at(7), True)
    second(at(5), True)
    third(at(10), True)
    rig.rollback.begin()(at(7), True)
    assert rig.back == [5]


def test_every_token_is_tried_once_until_one_is_answered() -> None:
    async def scenario() -> None:
        rig = Rig()
        watches: Any = {FakeWatch(token): None for token in (b"a", b"a", b"b")}
        rig.rollback.connected(watches)
        assert [asked.token for asked in rig.reader.asked] == [b"a", b"b"]
        # Our own user logs in, a client comes back with a new token.
        rig.own = b"own"
        watches[FakeWatch(b"c")] = None
        await until_async(lambda: len(rig.reader.asked) == 4, "those that came since")
        assert {asked.token for asked in rig.reader.asked} == {b"a", b"b", b"c", b"own"}
        rig.rollback.begin()(at(11), True)
        watches[FakeWatch(b"d")] = None
        turn = asyncio.get_running_loop().time() + 1.2
        await until_async(lambda: asyncio.get_running_loop().time() > turn, "another turn")
        assert len(rig.reader.asked) == 4
        rig.rollback.stop()

    run(scenario())


def test_not_all_are_tried_at_once() -> None:
    async def scenario() -> None:
        rig = Rig()
        watches: Any = {FakeWatch(b"%d" % number): None for number in range(100)}
        rig.rollback.connected(watches)
        assert len(rig.reader.asked) == TRIED_AT_ONCE
        rig.rollback.stop()

    run(scenario())
