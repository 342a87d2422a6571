"""The watchable store: the events of a watch in every watcher group, on slow and fast streams."""

from __future__ import annotations

from random import Random

import pytest

from proto.pb import rpc_pb2
from tests.store.both import new_state
from upstream.store.index import RevisionRecord
from upstream.store.state import StoreState
from upstream.store.watch_batch import FRAGMENT_BYTES, WatchMessage, encode_message
from upstream.store.watchable import ServedStream, WatchLimits

QUEUE_EVENTS_MAX = WatchLimits().queue_events_max


@pytest.fixture
def state() -> StoreState:
    return new_state()


@pytest.fixture
def stream(state: StoreState) -> ServedStream:
    return state.watchable.open_stream()


def put(state: StoreState, key: bytes, value: bytes = b"v") -> int:
    state.put(rpc_pb2.PutRequest(key=key, value=value))
    state.publish()
    return state.mvcc.revision


def delete(state: StoreState, key: bytes) -> int:
    state.delete_range(rpc_pb2.DeleteRangeRequest(key=key))
    state.publish()
    return state.mvcc.revision


def compact(state: StoreState, revision: int) -> None:
    state.mvcc.compact(revision)
    while not state.mvcc.compact_step(10):
        pass


def sync_all(state: StoreState) -> None:
    while state.watchable.sync():
        pass


def take_all(stream: ServedStream) -> list[WatchMessage]:
    return list(iter(stream.take, None))


def brief(message: WatchMessage) -> str:
    """Format a message on one line: id, type, header revision, events."""
    words = [str(message.watch_id)]
    words += ["created"] * message.created + ["canceled"] * message.canceled
    words.append(f"@{message.revision}")
    if message.compact_revision:
        words.append(f"compacted={message.compact_revision}")
    if message.cancel_reason:
        words.append(repr(message.cancel_reason))
    if message.batch is not None:
        words += [f"{'-' if r.deleted else '+'}{r.key.decode()}{r.mod_revision}" for r in message.batch.records]
    return " ".join(words)


def story(stream: ServedStream) -> list[str]:
    return [brief(message) for message in take_all(stream)]


def decoded(state: StoreState, message: WatchMessage) -> list[rpc_pb2.WatchResponse]:
    return [rpc_pb2.WatchResponse.FromString(piece) for piece in encode_message(state.head, message)]


def test_a_watch_from_now_gets_new_events(state: StoreState) -> None:
    put(state, b"a")
    stream = state.watchable.open_stream()
    stream.create(b"a")
    stream.create(b"b", b"d")
    put(state, b"a")
    put(state, b"c")
    delete(state, b"a")
    put(state, b"d")
    assert story(stream) == ["0 created @2", "1 created @2", "0 @3 +a3", "1 @4 +c4", "0 @5 -a5"]


def test_a_watch_from_the_past_catches_up_and_continues(state: StoreState) -> None:
    for key in (b"a", b"b", b"a"):
        put(state, key)
    stream = state.watchable.open_stream()
    stream.create(b"a", start_revision=2)
    put(state, b"a")
    assert story(stream) == ["0 created @4"]
    assert state.watchable.slow_watchers == 1
    sync_all(state)
    put(state, b"a")
    assert story(stream) == ["0 @5 +a2 +a4 +a5", "0 @6 +a6"]
    assert state.watchable.slow_watchers == 0


def test_a_watch_from_the_future_waits_for_its_start(state: StoreState, stream: ServedStream) -> None:
    stream.create(b"a", start_revision=4)
    for _ in range(4):
        put(state, b"a")
    assert story(stream) == ["0 created @1", "0 @4 +a4", "0 @5 +a5"]


def test_a_watch_from_the_future_holds_back_progress(state: StoreState, stream: ServedStream) -> None:
    stream.create(b"a", start_revision=2)
    stream.request_progress()
    assert story(stream) == ["0 created @1"]
    put(state, b"b")
    stream.request_progress()
    assert story(stream) == ["-1 @2"]


def test_progress_needs_a_watch_and_waits_for_all_watches(state: StoreState) -> None:
    put(state, b"a")
    stream = state.watchable.open_stream()
    stream.request_progress()
    stream.create(b"x")
    stream.create(b"a", start_revision=1)
    stream.request_progress()
    assert story(stream) == ["0 created @2", "1 created @2"]
    sync_all(state)
    stream.request_progress()
    put(state, b"x")
    assert story(stream) == ["1 @2 +a2", "-1 @2", "0 @3 +x3"]


def test_progress_ticks_notify_quiet_watches_on_request(state: StoreState, stream: ServedStream) -> None:
    stream.create(b"a", progress_notify=True)
    stream.create(b"b", progress_notify=True)
    stream.create(b"c")
    stream.create(b"d", progress_notify=True, start_revision=99)
    put(state, b"a")
    take_all(stream)
    stream.progress_tick()
    assert story(stream) == ["1 @2"]
    stream.progress_tick()
    assert story(stream) == ["0 @2", "1 @2"]


def test_a_compacted_start_is_cancelled_and_its_id_stays_used(state: StoreState) -> None:
    for _ in range(5):
        put(state, b"a")
    compact(state, 4)
    stream = state.watchable.open_stream()
    stream.create(b"a", start_revision=3, watch_id=7)
    stream.create(b"a", start_revision=4)
    sync_all(state)
    assert story(stream) == [
        "7 created @6",
        "0 created @6",
        "7 canceled @6 compacted=4",
        "0 @6 +a4 +a5 +a6",
    ]
    stream.create(b"a", watch_id=7)
    stream.request_progress()
    stream.cancel(7)
    stream.create(b"a", watch_id=7)
    assert story(stream) == [
        "-1 created canceled @6 'mvcc: duplicate watch ID provided on the WatchStream'",
        "7 canceled @6",
        "7 created @6",
    ]


def test_a_watch_compacted_while_catching_up_is_cancelled(state: StoreState) -> None:
    state.watchable.limits = WatchLimits(batch_revisions_max=2)
    for _ in range(6):
        put(state, b"a")
    stream = state.watchable.open_stream()
    stream.create(b"a", start_revision=2)
    state.watchable.sync()
    compact(state, 6)
    sync_all(state)
    assert story(stream) == ["0 created @7", "0 @7 +a2 +a3", "0 canceled @7 compacted=6"]


def test_automatic_ids_increase_and_skip_ids_in_use(stream: ServedStream) -> None:
    assert stream.create(b"a", watch_id=1) == 1
    assert stream.create(b"a") == 0
    assert stream.create(b"a") == 2
    stream.cancel(0)
    assert stream.create(b"a") == 3
    assert stream.create(b"a", watch_id=0) == 4
    assert stream.create(b"a", watch_id=-5) == -5


@pytest.mark.parametrize(
    ("key", "range_end", "start_revision", "reason"),
    [
        (b"b", b"a", 0, "mvcc: watcher range is empty"),
        (b"b", b"b", 0, "mvcc: watcher range is empty"),
        (b"a", b"", -1, "etcdserver: mvcc: required revision has been compacted"),
        (b"b", b"a", -1, "etcdserver: mvcc: required revision has been compacted"),
    ],
)
def test_refused_creates(key: bytes, range_end: bytes, start_revision: int, reason: str, state: StoreState) -> None:
    stream = state.watchable.open_stream()
    assert stream.create(key, range_end, start_revision) == -1
    assert story(stream) == [f"-1 created canceled @1 {reason!r}"]
    assert state.watchable.stats.watchers == 0


def test_an_empty_key_is_the_smallest_and_a_zero_end_is_open(state: StoreState, stream: ServedStream) -> None:
    stream.create(b"")
    stream.create(b"", b"\x00")
    put(state, b"\x00")
    put(state, b"a")
    assert [message.watch_id for message in take_all(stream)[2:]] == [0, 1, 1]


def test_cancel_is_the_last_message_and_ignores_unknown_ids(state: StoreState, stream: ServedStream) -> None:
    stream.create(b"a")
    put(state, b"a")
    stream.cancel(0)
    stream.cancel(0)
    stream.cancel(9)
    put(state, b"a")
    assert story(stream) == ["0 created @1", "0 @2 +a2", "0 canceled @2"]


def test_filters_omit_events_and_empty_responses(state: StoreState) -> None:
    put(state, b"a")
    stream = state.watchable.open_stream()
    stream.create(b"a", start_revision=1, no_put=True)
    stream.create(b"a", start_revision=1, no_delete=True)
    stream.create(b"a", start_revision=1, no_put=True, no_delete=True)
    sync_all(state)
    delete(state, b"a")
    stream.request_progress()
    assert story(stream)[3:] == ["1 @2 +a2", "0 @3 -a3", "-1 @3"]


def test_previous_values_are_sent_on_request_only(state: StoreState) -> None:
    put(state, b"a", b"1")
    stream = state.watchable.open_stream()
    stream.create(b"a", start_revision=1, prev_kv=True)
    stream.create(b"a", start_revision=1)
    sync_all(state)
    put(state, b"a", b"2")
    delete(state, b"a")
    put(state, b"a", b"3")
    previous: dict[int, list[bytes]] = {0: [], 1: []}
    for message in take_all(stream):
        for response in decoded(state, message):
            previous[response.watch_id] += [event.prev_kv.value for event in response.events]
    assert previous == {0: [b"", b"1", b"2", b""], 1: [b"", b"", b"", b""]}


def test_a_full_stream_makes_victims_and_delays_no_other(state: StoreState) -> None:
    slow, quick = state.watchable.open_stream(), state.watchable.open_stream()
    slow.create(b"a")
    quick.create(b"a")
    seen: list[RevisionRecord] = []
    for _ in range(QUEUE_EVENTS_MAX + 10):
        put(state, b"a")
        seen += [r for message in take_all(quick) if message.batch for r in message.batch.records]
    assert len(seen) == QUEUE_EVENTS_MAX + 10
    assert state.watchable.victims == 1
    assert slow.queued_events == QUEUE_EVENTS_MAX
    slow.request_progress()
    assert state.watchable.retry_victims() == 1
    late = [r for message in take_all(slow) if message.batch for r in message.batch.records]
    assert state.watchable.retry_victims() == 0
    assert state.watchable.unsynced == 1
    sync_all(state)
    late += [r for message in take_all(slow) if message.batch for r in message.batch.records]
    assert late == seen
    assert state.watchable.stats.pending_events == 0


def test_catch_up_answers_are_bounded_in_revisions_and_bytes(state: StoreState) -> None:
    for _ in range(2500):
        put(state, b"a")
    for _ in range(5):
        put(state, b"b", bytes(400_000))
    stream = state.watchable.open_stream()
    stream.create(b"a", start_revision=1)
    stream.create(b"b", start_revision=1)
    sync_all(state)
    sizes: dict[int, list[int]] = {0: [], 1: []}
    for message in take_all(stream):
        if message.batch is not None:
            sizes[message.watch_id].append(len(message.batch.records))
    assert sizes == {0: [1000, 1000, 500], 1: [3, 2]}


def test_large_responses_are_split_on_request_only(state: StoreState, stream: ServedStream) -> None:
    stream.create(b"", b"\x00", fragment=True)
    stream.create(b"", b"\x00")
    request = rpc_pb2.TxnRequest()
    for at in range(5):
        request.success.add().request_put.CopyFrom(rpc_pb2.PutRequest(key=b"k%d" % at, value=bytes(900_000)))
    state.txn(request)
    state.publish()
    fragmented, whole = (decoded(state, message) for message in take_all(stream)[2:])
    assert [(len(r.events), r.fragment) for r in fragmented] == [(2, True), (2, True), (1, False)]
    assert all(r.ByteSize() < FRAGMENT_BYTES for r in fragmented)
    assert {r.header.revision for r in fragmented} == {2}
    assert [(len(r.events), r.fragment) for r in whole] == [(5, False)]


def test_closing_a_stream_leaves_nothing_behind(state: StoreState) -> None:
    put(state, b"a")
    stream = state.watchable.open_stream()
    stream.create(b"a")
    stream.create(b"a", b"b", start_revision=1)
    for _ in range(QUEUE_EVENTS_MAX + 1):
        put(state, b"a")
    stream.close()
    stream.close()
    store = state.watchable
    assert (store.stats.watchers, store.stats.streams, store.stats.pending_events) == (0, 0, 0)
    assert (store.unsynced, store.victims) == (0, 0)
    put(state, b"a")
    assert stream.take() is None


class Viewer:
    """One watch on its own stream that is read at random times, with all its events."""

    def __init__(self, state: StoreState, rng: Random) -> None:
        self.stream = state.watchable.open_stream()
        self.key, self.end = rng.choice([(b"a", b""), (b"b", b""), (b"a", b"c"), (b"b", b"\x00"), (b"", b"\x00")])
        self.no_put, self.no_delete = rng.random() < 0.2, rng.random() < 0.2
        floor = max(state.mvcc.compact_revision, 1)
        start = rng.choice((0, rng.randint(floor, state.mvcc.revision), state.mvcc.revision + rng.randint(1, 9)))
        self.first = start or state.mvcc.revision + 1
        self.stream.create(self.key, self.end, start, no_put=self.no_put, no_delete=self.no_delete)
        self.got: list[RevisionRecord] = []
        self.complete_through = 0
        self.compacted = 0

    def read(self, count: int) -> None:
        for _ in range(count):
            message = self.stream.take()
            if message is None:
                return
            if message.batch is not None:
                assert all(r.mod_revision > self.complete_through for r in message.batch.records)
                self.got += message.batch.records
            elif message.watch_id == -1:
                self.complete_through = message.revision
            self.compacted = message.compact_revision or self.compacted

    def expected(self, truth: list[RevisionRecord]) -> list[RevisionRecord]:
        def wanted(r: RevisionRecord) -> bool:
            inside = r.key == (self.key or b"\x00") if not self.end else r.key >= self.key
            inside = inside and (self.end in (b"", b"\x00") or r.key < self.end)
            return inside and r.mod_revision >= self.first and not (self.no_delete if r.deleted else self.no_put)

        return [r for r in truth if wanted(r)]


@pytest.mark.parametrize("seed", range(60))
def test_every_watch_gets_exactly_its_events(seed: int) -> None:
    rng = Random(seed)
    state = new_state()
    state.watchable.limits = WatchLimits(
        queue_events_max=3, batch_revisions_max=4, sync_watchers_max=3, sync_revisions_max=6
    )
    viewers: list[Viewer] = []
    truth: list[RevisionRecord] = []
    compaction_from = rng.choice((0, 10**9))
    for step in range(300):
        kind = rng.random()
        before = state.mvcc.revision
        if kind < 0.4:
            put(state, rng.choice((b"a", b"b", b"c")))
        elif kind < 0.5:
            delete(state, rng.choice((b"a", b"b", b"c")))
        elif kind < 0.6:
            viewers.append(Viewer(state, rng))
        elif kind < 0.7:
            state.watchable.sync()
        elif kind < 0.8:
            state.watchable.retry_victims()
        elif kind < 0.82 and step > compaction_from and state.mvcc.revision > max(state.mvcc.compact_revision, 1):
            compact(state, state.mvcc.revision)
        elif viewers:
            viewer = rng.choice(viewers)
            viewer.stream.request_progress()
            viewer.read(rng.randrange(5))
        if state.mvcc.revision > before:
            truth += state.mvcc.changes(state.mvcc.revision, state.mvcc.revision)[0]
    while state.watchable.slow_watchers:
        state.watchable.sync()
        state.watchable.retry_victims()
        for viewer in viewers:
            viewer.read(10)
    for viewer in viewers:
        viewer.read(1000)
        expected = viewer.expected(truth)
        if viewer.compacted:
            assert viewer.got == expected[: len(viewer.got)]
            assert all(r.mod_revision >= viewer.first for r in viewer.got)
        else:
            assert viewer.got == expected
