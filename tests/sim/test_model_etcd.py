"""The model of etcd behaves like etcd, case by case, where the simulator depends on it."""

from __future__ import annotations

import random

import pytest

from coalesce.guarantees.checkers import Truth
from proto.plain_request import PROGRESS, encode_cancel, encode_create
from proto.scan import WatchResponse
from tests.sim.model_store import Member, Store
from tests.sim.model_stream import ServerStream


class Server:
    """One member and one stream, driven until idle unless a test holds something back."""

    def __init__(self, channel_max: int = 128, batch_revisions_max: int = 1000, ordered_progress: bool = True) -> None:
        self.rng = random.Random(1)
        self.store = Store()
        self.member = Member(self.store, 0xE0, batch_revisions_max, ordered_progress)
        self.stream = ServerStream(self.member, channel_max)

    def put(self, *keys: bytes) -> None:
        for key in keys:
            self.store.write([(key, b"v")])
        self.member.apply(len(keys))

    def create(self, key: bytes, range_end: bytes = b"", start: int | None = None, **more: bool) -> None:
        self.stream.requests.append(encode_create(key, range_end, start_revision=start, **more))

    def take(self) -> list[WatchResponse]:
        while self.stream.can_receive:
            self.stream.receive()
        while self.stream.can_send:
            self.stream.send(self.rng)
        out = list(self.stream.out)
        self.stream.out.clear()
        return out


def revisions(response: WatchResponse) -> list[int]:
    return [event.revision for event in response.events]


def test_a_watch_from_now_gets_later_events_only() -> None:
    server = Server()
    server.put(b"a")
    server.create(b"a")
    (created,) = server.take()
    assert (created.created, created.watch_id, created.header.revision) == (True, 0, 2)
    server.put(b"a", b"b", b"a")
    assert [(revisions(each), each.header.revision) for each in server.take()] == [([3], 3), ([5], 5)]


def test_created_may_be_announced_after_later_writes() -> None:
    server = Server()
    server.create(b"a")
    server.stream.receive()
    server.put(b"a", b"a")
    created, *events = server.take()
    assert created.created
    assert created.header.revision == 3
    assert [revisions(each) for each in events] == [[2], [3]]


def test_catch_up_headers_carry_the_revision_of_the_store() -> None:
    server = Server(batch_revisions_max=2)
    server.put(b"a", b"a", b"a", b"b")
    server.create(b"a", start=2)
    server.take()
    while server.member.unsynced:
        server.member.sync(server.rng)
    assert [(revisions(each), each.header.revision) for each in server.take()] == [([2, 3], 5), ([4], 5)]


def test_compaction_cancels_only_starts_below_it() -> None:
    server = Server()
    server.put(b"a", b"a", b"a")
    server.store.compact(3)
    server.member.apply(1)
    server.create(b"a", start=2)
    server.create(b"a", start=3)
    server.take()
    while server.member.unsynced:
        server.member.sync(server.rng)
    canceled = [each for each in server.take() if each.canceled]
    assert {(each.watch_id, each.compact_revision, each.cancel_reason) for each in canceled} == {(0, 3, "")}
    # The id is taken, and progress blocked, until the client cancels it.
    server.stream.requests.append(PROGRESS)
    assert server.take() == []
    server.stream.requests.append(encode_cancel(0))
    server.stream.requests.append(PROGRESS)
    answers = server.take()
    assert sorted((each.watch_id, each.canceled) for each in answers) == [(-1, False), (0, True)]


def test_progress_needs_every_watch_of_the_stream_in_sync() -> None:
    server = Server()
    server.stream.requests.append(PROGRESS)
    assert server.take() == []
    server.put(b"a")
    server.create(b"a", start=3)
    server.stream.requests.append(PROGRESS)
    assert [each.created for each in server.take()] == [True]
    server.put(b"b")
    server.stream.requests.append(PROGRESS)
    assert [(each.watch_id, each.header.revision) for each in server.take()] == [(-1, 3)]
    server.create(b"a", start=2)
    server.stream.requests.append(PROGRESS)
    assert [each.created for each in server.take()] == [True]


def test_an_old_server_answers_progress_past_events() -> None:
    server = Server(ordered_progress=False)
    server.create(b"a")
    server.take()
    server.put(b"a")
    server.stream.requests.append(PROGRESS)
    server.stream.receive()
    assert server.stream._control[0].header.revision == 2
    assert server.stream._channel


def test_a_full_channel_makes_a_victim_that_loses_nothing() -> None:
    server = Server(channel_max=1)
    server.create(b"a")
    server.take()
    server.put(b"a", b"a", b"a")
    assert server.member.victims
    got = [revisions(each) for each in server.take()]
    while server.member.victims or server.member.unsynced:
        server.member.retry_victims()
        server.member.sync(server.rng)
        got += [revisions(each) for each in server.take()]
    assert [revision for each in got for revision in each] == [2, 3, 4]


def test_prev_kv_is_absent_after_compaction() -> None:
    server = Server()
    server.put(b"a", b"a", b"a", b"a")
    server.store.compact(4)
    server.member.apply(1)
    server.create(b"a", start=4, prev_kv=True)
    server.take()
    while server.member.unsynced:
        server.member.sync(server.rng)
    (response,) = server.take()
    # The value at 3 is compacted, the one at 4 is not.
    assert [event.encoded != event.bare for event in response.events] == [False, True]


def test_fragments_hold_all_events_under_one_header() -> None:
    server = Server()
    server.create(b"a", b"z", fragment=True)
    server.take()
    for seed in range(20):
        server.rng = random.Random(seed)
        server.store.write([(key, b"v") for key in (b"a", b"b", b"c", b"d")])
        server.member.apply(1)
        pieces = server.take()
        assert [each.fragment for each in pieces] == [True] * (len(pieces) - 1) + [False]
        assert sum(len(each.events) for each in pieces) == 4
        assert len({each.header.revision for each in pieces}) == 1


@pytest.mark.parametrize(
    ("key", "range_end", "start", "reason"),
    [
        (b"b", b"a", None, "mvcc: watcher range is empty"),
        (b"b", b"b", None, "mvcc: watcher range is empty"),
        (b"a", b"", -1, "etcdserver: mvcc: required revision has been compacted"),
    ],
)
def test_refusals(key: bytes, range_end: bytes, start: int | None, reason: str) -> None:
    server = Server()
    server.create(key, range_end, start)
    (refused,) = server.take()
    assert (refused.created, refused.canceled, refused.watch_id) == (True, True, -1)
    assert refused.cancel_reason == reason


def test_the_store_counts_revisions_versions_and_creates() -> None:
    store = Store()
    assert store.write([(b"a", None)]) == 1
    store.write([(b"a", b"1"), (b"b", b"1")])
    store.write([(b"a", b"2")])
    store.write([(b"a", None), (b"c", None)])
    store.write([(b"a", b"3")])
    changes = [(each.mod_revision, each.key, each.create_revision, each.version) for each in store.changes]
    assert changes == [(2, b"a", 2, 1), (2, b"b", 2, 1), (3, b"a", 2, 2), (4, b"a", 0, 0), (5, b"a", 5, 1)]
    # The checkers derive the same previous values.
    bare = [each._replace(prev=None) for each in store.changes]
    assert Truth(bare).changes == store.changes
    assert store.compact(3)
    assert not store.compact(3)
    assert not store.compact(9)
