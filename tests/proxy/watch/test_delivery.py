"""What a scripted core delivers reaches the outlets: at once, queued, by connection, and with back-pressure."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from coalesce.effects import Deliver, Send
from coalesce.listing import LISTED_MIN, GroupLists
from coalesce.model import Group, GroupWatches
from proxy.listening.settings import ListenerStats
from proxy.listening.write_queue import PART_CONNECTIONS, WriteQueue
from proxy.watch.delivery import ALONE_MAX, BULKY_BYTES, TURN_BYTES
from proxy.watch.engine import Engine
from tests.proxy.watch.engine_rig import SPOKEN, TRUNK, FakeConnection, FakeOutlet, Rig, payload_of, watch_of


async def test_a_payload_goes_to_each_watch_under_its_id() -> None:
    rig = Rig()
    outlets = [FakeOutlet(9) for _ in range(4)]
    watches = [watch_of(outlet, watch_id) for outlet, watch_id in zip(outlets, (0, 0, 5, 0), strict=True)]
    rig.script("upstream_response", Deliver(payload_of(b"x", b"y"), watches))
    rig.engine.received(TRUNK, SPOKEN)
    assert [outlet.sent for outlet in outlets] == [[b"0:x", b"0:y"]] * 2 + [[b"5:x", b"5:y"]] + [[b"0:x", b"0:y"]]
    assert [outlet.touched for outlet in outlets] == [1] * 4
    assert rig.engine.delivery.stats.delivered_bytes == 4 * 6


async def test_a_stall_is_reported_and_later_payloads_are_returned() -> None:
    rig = Rig()
    outlet = FakeOutlet(1)
    first, second = watch_of(outlet, 0), watch_of(outlet, 1)
    second.session = first.session
    payloads = [payload_of(b"x"), payload_of(b"y")]
    rig.script("upstream_response", Deliver(payloads[0], [first, second]), Deliver(payloads[1], [first]))
    rig.engine.received(TRUNK, SPOKEN)
    assert rig.core.inputs[1:] == [("stalled", first.session), ("undelivered", first, payloads[1])]
    assert outlet.sent == [b"0:x", b"1:x"]


async def test_a_single_payload_is_written_at_once() -> None:
    """If the connections are distinct. Where output waits already, the payload is queued behind it."""
    rig = Rig()
    outlets = [FakeOutlet(room) for room in (9, 9, 0, 9)]
    outlets[1].schedule_flush()
    watches = [watch_of(outlet, watch_id) for outlet, watch_id in zip(outlets, (0, 0, 0, 5), strict=True)]
    rig.script("upstream_response", Deliver(payload_of(b"x"), watches))
    rig.engine.received(TRUNK, SPOKEN)
    assert [outlet.sent for outlet in outlets] == [[b"0:x"]] * 3 + [[b"5:x"]]
    assert [outlet.written for outlet in outlets] == [[b"0:x"], [], [], [b"5:x"]]
    assert [outlet.touched for outlet in outlets] == [0, 1, 1, 0]
    assert rig.core.inputs[1:] == [("stalled", watches[2].session)]
    assert rig.output.calls == ["wrote"]
    stats = rig.engine.delivery.stats
    assert (stats.coalesced, stats.delivered_bytes) == (3, 12)
    # A stalled stream is not written to by a later input either.
    later = payload_of(b"y")
    rig.script("upstream_response", Deliver(later, watches))
    rig.engine.received(TRUNK, SPOKEN)
    assert rig.core.inputs[-1] == ("undelivered", watches[2], later)
    assert outlets[2].sent == [b"0:x"]


async def test_payloads_that_can_be_joined_are_queued() -> None:
    rig = Rig()
    outlets = [FakeOutlet(99) for _ in range(3)]

    def written() -> None:
        for outlet in outlets:
            outlet.connection.dirty = False

    rig.output.on_written = None
    rig.output.written = written
    outlets[2].connection = outlets[0].connection
    watches = [watch_of(outlet) for outlet in outlets]
    small = payload_of(b"x")
    # Two watches on one connection; two effects; a large payload; more than one message.
    for effects in (
        [Deliver(small, watches)],
        [Deliver(small, watches[:1]), Deliver(small, watches[1:2])],
        [Deliver(payload_of(bytes(BULKY_BYTES + 1)), watches[:1])],
        [Deliver(payload_of(b"x", b"y"), watches[:1])],
    ):
        rig.script("upstream_response", *effects)
        rig.engine.received(TRUNK, SPOKEN)
    assert rig.output.calls == ["cork", "uncork"] * 4
    # A read of several messages; and a payload that does not result from a read.
    rig.output.cork()
    rig.script("upstream_response", Deliver(small, watches[:1]))
    rig.engine.received(TRUNK, SPOKEN)
    rig.output.uncork()
    rig.script("drained", Deliver(small, watches[:1]))
    rig.engine.drained(watches[0].session, 0)
    assert rig.output.calls[8:] == ["cork", "cork", "uncork", "uncork"]
    assert [outlet.written for outlet in outlets] == [[], [], []]
    assert [len(outlet.sent) for outlet in outlets] == [7, 2, 1]


def large_group(count: int) -> tuple[list[FakeOutlet], GroupWatches]:
    """Return a group large enough to be ordered: two watches on each stream, streams on three connections."""
    outlets = [FakeOutlet(99) for _ in range(count)]
    for place, outlet in enumerate(outlets):
        outlet.connection = outlets[place % 3].connection
    return outlets, GroupWatches(watch_of(outlet, watch_id) for outlet in outlets for watch_id in (0, 7))


async def test_a_large_group_is_delivered_by_connection() -> None:
    """First watch by watch, then connection by connection. Each stream gets a payload once under each of its ids."""
    rig = Rig()
    outlets, watches = large_group(LISTED_MIN)
    for text in (b"a", b"b", b"c"):
        rig.script("upstream_response", Deliver(payload_of(text), watches))
        rig.engine.received(TRUNK, SPOKEN)
    for outlet in outlets:
        assert sorted(outlet.sent) == sorted(b"%d:%s" % (i, text) for i in (0, 7) for text in (b"a", b"b", b"c"))
    assert sum(outlet.runs for outlet in outlets) == 2 * 3 * 2
    assert rig.engine.delivery.stats.delivered_bytes == 3 * 3 * len(watches)


async def test_a_large_group_on_distinct_connections_is_not_queued() -> None:
    """From the third payload on, when the plan is known. Large payloads are queued, and streams without room."""
    rig = Rig()
    outlets = [FakeOutlet(99) for _ in range(LISTED_MIN)]
    watches = GroupWatches(watch_of(outlet) for outlet in outlets)
    large = payload_of(bytes(BULKY_BYTES + 1))
    payloads = [payload_of(b"a"), payload_of(b"b"), large, payload_of(b"c")]
    for payload in payloads:
        for outlet in outlets:
            outlet.connection.dirty = False
        outlets[3].room = 1
        rig.script("upstream_response", Deliver(payload, watches))
        rig.engine.received(TRUNK, SPOKEN)
    for outlet in outlets:
        assert outlet.sent == [b"0:a", b"0:b", b"0:" + bytes(BULKY_BYTES + 1), b"0:c"]
        assert outlet.written == ([] if outlet is outlets[3] else [b"0:c"])
        assert outlet.runs == 0
    assert rig.engine.delivery.stats.delivered_bytes == sum(map(len, outlets[0].sent)) * len(watches)


async def test_a_large_group_with_watches_alone_on_a_connection() -> None:
    rig = Rig()
    outlets, watches = large_group(LISTED_MIN)
    alone = [FakeOutlet(99) for _ in range(2)]
    watches = GroupWatches((*watches, *(watch_of(outlet) for outlet in alone)))
    for text in (b"a", b"b", b"c"):
        rig.script("upstream_response", Deliver(payload_of(text), watches))
        rig.engine.received(TRUNK, SPOKEN)
    assert [outlet.sent for outlet in alone] == [[b"0:a", b"0:b", b"0:c"]] * 2
    assert [outlet.runs for outlet in alone] == [0, 0]
    assert sum(outlet.runs for outlet in outlets) == 2 * 3 * 2
    assert all(len(outlet.sent) == 6 for outlet in outlets)


async def test_a_stall_inside_a_large_group() -> None:
    rig = Rig()
    outlets, watches = large_group(LISTED_MIN)
    slow = outlets[4]
    first, second = (watch for watch in watches if watch.outlet is slow)
    second.session = first.session
    for _ in range(2):
        rig.script("upstream_response", Deliver(payload_of(b"x"), watches))
        rig.engine.received(TRUNK, SPOKEN)
    slow.room = 1
    slow.sent.clear()
    payload = payload_of(b"y")
    rig.core.inputs.clear()
    rig.script("upstream_response", Deliver(payload, watches))
    rig.engine.received(TRUNK, SPOKEN)
    # The second watch's message is written too: it was in progress before the session stalled.
    slow.room = 0
    later = payload_of(b"z")
    rig.script("upstream_response", Deliver(later, watches))
    rig.engine.received(TRUNK, SPOKEN)
    reported = [entry for entry in rig.core.inputs if entry[0] in ("stalled", "undelivered")]
    assert reported[0] == ("stalled", first.session)
    assert reported[1:] == [("undelivered", first, later), ("undelivered", second, later)]
    assert slow.sent == [b"0:y", b"7:y"]


async def test_much_output_in_one_turn_is_reported() -> None:
    rig = Rig()
    relieved: list[int] = []
    outlet = FakeOutlet(99)
    rig.output.written = lambda: relieved.append(len(outlet.sent))
    third = payload_of(bytes(TURN_BYTES // 3))
    rig.script("upstream_response", *[Deliver(third, [watch_of(outlet)])] * 7)
    rig.engine.received(TRUNK, SPOKEN)
    assert relieved == [3, 6, 7]


async def test_a_plan_ends_with_the_next_change_of_its_group() -> None:
    """Even if the group changes in the step that delivers to it, and no watch that left is kept alive by a plan."""
    rig = Rig()
    group, lists = Group(0), GroupLists()
    outlets = [FakeOutlet(99) for _ in range(LISTED_MIN + 2)]
    for outlet in outlets:
        outlet.connection = outlets[0].connection
    *watches, late = [watch_of(outlet) for outlet in outlets]
    for watch in watches:
        group.add(watch)

    def deliver(text: bytes) -> None:
        rig.script("upstream_response", Deliver(payload_of(text), lists.of(group)))
        rig.engine.received(TRUNK, SPOKEN)

    for text in (b"a", b"b"):
        deliver(text)
    # The effect names the watches at the time of the event.
    rig.script("upstream_response", Deliver(payload_of(b"c"), lists.of(group)))
    group.remove(watches[1])
    group.add(late)
    rig.engine.received(TRUNK, SPOKEN)
    for text in (b"d", b"e", b"f"):
        deliver(text)
    assert outlets[0].sent == [b"0:" + text for text in (b"a", b"b", b"c", b"d", b"e", b"f")]
    assert outlets[1].sent == [b"0:a", b"0:b", b"0:c"]
    assert outlets[-1].sent == [b"0:d", b"0:e", b"0:f"]
    assert outlets[0].runs == 4
    gone = weakref.ref(outlets[1])
    rig.core.inputs.clear()
    del watches[1], outlets[1], watch, outlet
    gc.collect()
    assert gone() is None


async def test_a_blocked_control_answer_is_a_stall() -> None:
    rig = Rig()
    outlet = FakeOutlet(0)
    watch = watch_of(outlet)
    rig.script("progress", Send(watch.session, [b"1"]), Send(watch.session, [b"2"]), Deliver(payload_of(b"x"), [watch]))
    rig.engine.progress(watch.session)
    assert outlet.sent == [b"1", b"2"]
    assert rig.core.names() == ["progress", "stalled", "undelivered"]


@pytest.mark.parametrize("more", [0, 1])
async def test_a_payload_for_very_many_is_not_written_at_once(more: int) -> None:
    """It is queued, and the connections are written in parts."""
    rig = Rig()
    outlets = [FakeOutlet(9) for _ in range(ALONE_MAX + more)]
    watches = GroupWatches(map(watch_of, outlets))
    # The plan is known from the second payload on.
    for text in (b"a", b"b", b"c"):
        for outlet in outlets:
            outlet.connection.dirty = False
        rig.script("upstream_response", Deliver(payload_of(text), watches))
        rig.engine.received(TRUNK, SPOKEN)
    assert {len(outlet.written) for outlet in outlets} == {1 - more}
    assert {outlet.in_parts for outlet in outlets} == {2 + more}
    assert {len(outlet.sent) for outlet in outlets} == {3}


@pytest.mark.parametrize("more", [0, 1])
async def test_payloads_for_few_come_before_those_for_many(more: int) -> None:
    """Also when one read brings both, and when it brings so much that the output is written in the middle of it."""
    rig = Rig()
    written: list[FakeOutlet] = []
    queue = WriteQueue(ListenerStats())

    class Writing(FakeConnection):
        """A connection that is written by the queue."""

        def __init__(self, outlet: FakeOutlet) -> None:
            super().__init__(outlet)
            self.outlet, self.peer = outlet, ""
            self.schedule_flush = lambda many=False: queue.flush_soon(self, many)

        def flush(self) -> None:
            written.append(self.outlet)

        def abort(self) -> None:
            raise AssertionError("a write failed")

    outlets = [FakeOutlet(9) for _ in range(PART_CONNECTIONS + more)]
    bystander = FakeOutlet(9)
    for outlet in (*outlets, bystander):
        outlet.connection = Writing(outlet)
    engine = Engine(rig.core, rig.reader, queue)  # type: ignore[arg-type]  # stand-ins
    large = payload_of(bytes(TURN_BYTES // PART_CONNECTIONS))
    rig.script(
        "upstream_response",
        Deliver(large, [watch_of(outlet) for outlet in outlets]),
        Deliver(payload_of(b"b"), [watch_of(bystander)]),
    )
    engine.received(TRUNK, SPOKEN)
    if more:
        assert written == [bystander, *outlets[:PART_CONNECTIONS]]
        assert queue.behind
        await asyncio.sleep(0)
        assert written[1:] == outlets
    else:
        # They are one part, and are written before more is queued.
        assert written == [*outlets, bystander]
    assert not queue.behind
