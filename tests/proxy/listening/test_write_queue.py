"""Output for many connections is written in parts, over which output for few connections takes precedence.

The tests count the connections that are written in a turn of the loop; they do not measure time.
"""

from __future__ import annotations

import asyncio

import pytest

from proxy.listening import write_queue
from proxy.listening.settings import ListenerStats
from proxy.listening.write_queue import PART_CONNECTIONS, QUEUED_BYTES_MAX, WriteQueue


class Rig:
    """A queue, and what was written."""

    def __init__(self) -> None:
        self.stats = ListenerStats()
        self.queue = WriteQueue(self.stats)
        self.written: list[str] = []

    def crowd(self, name: str, count: int) -> list[Connection]:
        """Return so many connections, with names like a0."""
        return [Connection(self, f"{name}{number}") for number in range(count)]

    async def turn(self) -> list[str]:
        """Wait for a turn of the loop; return what was written since the last one."""
        await asyncio.sleep(0)
        written, self.written = self.written, []
        return written


class Connection:
    """Writes its name."""

    def __init__(self, rig: Rig, peer: str, size: int = 100) -> None:
        self.rig, self.peer, self.size = rig, peer, size
        self.fails = self.aborted = False

    def flush(self) -> None:
        """Write, or fail."""
        if self.fails:
            raise OSError("broken")
        self.rig.written.append(self.peer)
        self.rig.stats.written_bytes += self.size

    def abort(self) -> None:
        """Note it."""
        self.aborted = True


def read(queue: WriteQueue, *touched: tuple[list[Connection], bool]) -> None:
    """Queue output as a read does: of connections, for many or not."""
    queue.cork()
    for connections, many in touched:
        for connection in connections:
            queue.flush_soon(connection, many)
    queue.uncork()


async def test_output_for_many_is_written_in_parts() -> None:
    """The first part at the end of the read, the others in the next turns; in the order in which it was queued."""
    rig = Rig()
    crowd = rig.crowd("a", 2 * PART_CONNECTIONS + 1)
    read(rig.queue, (crowd, True))
    assert len(rig.written) == PART_CONNECTIONS
    assert rig.queue.behind
    written = rig.written.copy()
    rig.written.clear()
    sizes = []
    while rig.queue.behind:
        part = await rig.turn()
        written += part
        sizes.append(len(part))
    assert sizes == [PART_CONNECTIONS, 1]
    assert written == [connection.peer for connection in crowd]


async def test_output_for_few_overtakes_output_for_many() -> None:
    """That of the same read, of later reads, and what is queued outside of a read."""
    rig = Rig()
    crowd = rig.crowd("a", 4 * PART_CONNECTIONS)
    read(rig.queue, (crowd, True), (rig.crowd("b", 1), False))
    assert rig.written[0] == "b0"
    assert len(rig.written) == 1 + PART_CONNECTIONS
    rig.written.clear()
    read(rig.queue, (rig.crowd("c", 2), False))
    assert rig.written == ["c0", "c1"], "no part in addition: a part would follow each read of a client"
    [late] = rig.crowd("d", 1)
    rig.queue.flush_soon(late)
    # Another event for many: behind the first.
    read(rig.queue, (rig.crowd("e", PART_CONNECTIONS), True))
    assert rig.written == ["c0", "c1", "d0"]
    rig.written.clear()
    parts = [await rig.turn() for _ in range(4)]
    assert [len(part) for part in parts] == [PART_CONNECTIONS] * 4
    assert parts[3][0] == "e0"
    assert not rig.queue.behind


async def test_connections_that_nobody_counted_are_written_in_parts() -> None:
    """Answers to thousands of clients in one step."""
    rig = Rig()
    for connection in rig.crowd("a", PART_CONNECTIONS + 1):
        rig.queue.flush_soon(connection)
    sizes = [len(await rig.turn()) for _ in range(2)]
    assert sizes == [PART_CONNECTIONS, 1]
    read(rig.queue, (rig.crowd("b", PART_CONNECTIONS), False))
    assert len(rig.written) == PART_CONNECTIONS


async def test_a_part_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_queue, "PART_BYTES", 300)
    rig = Rig()
    read(rig.queue, (rig.crowd("a", 5), True))
    assert len(rig.written) == 3
    rig.written.clear()
    assert await rig.turn() == ["a3", "a4"]


async def test_what_waits_for_an_empty_queue_takes_turns() -> None:
    """One of them, in the turn after the last part. If that queues more for many, the next one waits for it."""
    rig = Rig()
    read(rig.queue, (rig.crowd("a", PART_CONNECTIONS + 1), True))

    def first() -> None:
        assert not rig.queue.behind
        rig.written.append("first")
        read(rig.queue, (rig.crowd("b", PART_CONNECTIONS + 1), True))
        rig.queue.when_written(lambda: rig.written.append("third"))

    rig.queue.when_written(first)
    rig.queue.when_written(lambda: rig.written.append("second"))
    rig.written.clear()
    assert await rig.turn() == [f"a{PART_CONNECTIONS}"]
    assert await rig.turn() == ["first"]
    assert len(await rig.turn()) == PART_CONNECTIONS
    assert await rig.turn() == [f"b{PART_CONNECTIONS}"]
    assert await rig.turn() == ["second"]
    assert rig.queue.behind
    assert await rig.turn() == ["third"]
    assert not rig.queue.behind


async def test_output_for_few_of_what_waited_is_written_with_it() -> None:
    rig = Rig()
    read(rig.queue, (rig.crowd("a", PART_CONNECTIONS + 1), True))

    def fail() -> None:
        read(rig.queue, (rig.crowd("b", 1), False))
        rig.queue.flush_soon(rig.crowd("c", 1)[0])
        raise ValueError

    rig.queue.when_written(fail)
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(type(context["exception"])))
    await rig.turn()
    assert await rig.turn() == ["b0"]
    assert await rig.turn() == ["c0"]
    assert reported == [ValueError]
    assert not rig.queue.behind


async def test_much_output_for_few_connections_is_written_at_once() -> None:
    """In the middle of a read. For many, the queue is behind instead, up to QUEUED_BYTES_MAX."""
    rig = Rig()
    queue = rig.queue
    queue.cork()
    for connection in rig.crowd("a", PART_CONNECTIONS):
        queue.flush_soon(connection, True)
    queue.queued_bytes = QUEUED_BYTES_MAX - 1
    queue.relieve()
    assert len(rig.written) == PART_CONNECTIONS
    assert (queue.behind, queue.queued_bytes) == (False, 0)
    for connection in rig.crowd("b", PART_CONNECTIONS + 1):
        queue.flush_soon(connection, True)
    queue.queued_bytes = QUEUED_BYTES_MAX - 1
    queue.relieve()
    assert len(rig.written) == PART_CONNECTIONS
    assert queue.behind
    queue.queued_bytes += 1
    queue.relieve()
    assert len(rig.written) == 2 * PART_CONNECTIONS + 1
    assert (queue.behind, queue.queued_bytes) == (False, 0)
    queue.uncork()
    assert len(rig.written) == 2 * PART_CONNECTIONS + 1


async def test_delays_end_with_the_write_of_their_events() -> None:
    rig = Rig()
    queue = rig.queue
    ends: list[tuple[float, int]] = []
    queue.on_written = lambda since: ends.append((since, len(rig.written)))
    queue.since = 1.0
    read(queue, (rig.crowd("a", PART_CONNECTIONS + 10), True), (rig.crowd("b", 1), False))
    assert ends == [(1.0, 1)]
    queue.since = 2.0
    read(queue, (rig.crowd("c", 1), False))
    # No event.
    read(queue, (rig.crowd("d", 1), False))
    queue.since = 3.0
    read(queue, (rig.crowd("e", 1), True))
    await asyncio.sleep(0)
    assert ends == [(1.0, 1), (2.0, 2 + PART_CONNECTIONS), (1.0, 14 + PART_CONNECTIONS)]
    assert not queue.behind


async def test_a_write_that_fails_ends_its_connection_alone() -> None:
    rig = Rig()
    crowd = rig.crowd("a", 3)
    crowd[1].fails = True
    read(rig.queue, (crowd, True))
    assert rig.written == ["a0", "a2"]
    assert [connection.aborted for connection in crowd] == [False, True, False]
