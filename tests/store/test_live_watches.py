"""Watches that are open during random sequences: the store sends the same responses as a real etcd."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from random import Random

import pytest

from proto.pb import rpc_pb2
from tests.etcd.binaries import current
from tests.etcd.server import EtcdServer
from tests.store import sequences
from tests.store.both import Client, ask_state, new_state
from tests.store.pair import REQUESTS, Pair, crashes_etcd
from upstream.store.state import StoreState
from upstream.store.watch_batch import encode_message
from upstream.store.watchable import ServedStream

WATCHES = 6
FUTURE_REVISIONS_MAX = 8

Answers = dict[int, list[tuple[int, str]]]
"""By watch id: (header revision, the events) of each response. etcd's order between watches is random."""


def create_request(rng: Random, revision: int) -> rpc_pb2.WatchCreateRequest:
    made = rpc_pb2.WatchCreateRequest(
        key=rng.choice((b"", *sequences.KEYS)),
        range_end=rng.choice((b"", b"\x00", b"\x00")),
        start_revision=rng.choice((0, revision + 1, revision + rng.randint(1, FUTURE_REVISIONS_MAX))),
        prev_kv=rng.random() < 0.5,
    )
    if rng.random() < 0.3:
        made.filters.append(rng.choice(rpc_pb2.WatchCreateRequest.FilterType.values()))
    return made


class OurStream:
    """A watch stream of the store's pure parts, whose responses are taken as soon as they are queued."""

    def __init__(self, state: StoreState) -> None:
        self._head = state.head
        self.stream: ServedStream = state.watchable.open_stream()
        self.answers: Answers = defaultdict(list)

    def create(self, create: rpc_pb2.WatchCreateRequest) -> None:
        filters = create.filters
        self.stream.create(
            create.key,
            create.range_end,
            create.start_revision,
            no_put=rpc_pb2.WatchCreateRequest.NOPUT in filters,
            no_delete=rpc_pb2.WatchCreateRequest.NODELETE in filters,
            prev_kv=create.prev_kv,
        )
        self.take()

    def take(self) -> None:
        """Record the responses queued since the last call."""
        while (message := self.stream.take()) is not None:
            for piece in encode_message(self._head, message):
                note(self.answers, rpc_pb2.WatchResponse.FromString(piece))


def note(answers: Answers, response: rpc_pb2.WatchResponse) -> None:
    if not response.created:
        events = str(list(response.events))
        answers[response.watch_id].append((response.header.revision, events))


def run(pair: Pair, seed: int) -> None:
    """Run a sequence under some watches and compare their responses."""
    pair.reset()
    rng = Random(seed)
    state = pair.state
    ours = OurStream(state)
    theirs: Answers = defaultdict(list)
    with pair.client.watch() as call:
        for _ in range(WATCHES):
            create = create_request(rng, state.mvcc.revision)
            call.create(create)
            assert call.next().created
            ours.create(create)
        # Far enough for all watches with a future start to begin; before that etcd does not answer progress requests.
        last = state.mvcc.revision + FUTURE_REVISIONS_MAX
        asked = 0
        while asked < REQUESTS or state.mvcc.revision < last:
            asked += 1
            request = sequences.request(rng, state.mvcc.revision)
            # A compaction races with etcd's lookup of prev_kv.
            if not crashes_etcd(state, request) and not isinstance(request, rpc_pb2.CompactionRequest):
                pair.ask(request)
                ours.take()
        call.keep_requesting_progress()
        for response in call:
            if response.watch_id == -1:
                assert response.header.revision == state.mvcc.revision
                break
            note(theirs, response)
    assert ours.answers == theirs, f"seed {seed}: different responses\n{pair.story()}"
    ours.stream.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with EtcdServer(current()) as server:
        client = Client(server.endpoint)
        yield Pair(client, new_state())
        client.close()


@pytest.mark.parametrize("block", range(4))
def test_random_sequences_under_watches(pair: Pair, block: int) -> None:
    for seed in range(block * 6, block * 6 + 6):
        run(pair, seed)


@pytest.mark.long
@pytest.mark.parametrize("block", range(20))
def test_many_random_sequences_under_watches(pair: Pair, block: int) -> None:
    for seed in range(10_000 + block * 100, 10_100 + block * 100):
        run(pair, seed)


def test_the_value_of_a_deleted_key_cannot_be_kept() -> None:
    state = new_state()
    ask_state(state, rpc_pb2.PutRequest(key=b"a", value=b"1"))
    before = state.mvcc.revision
    request = rpc_pb2.TxnRequest()
    request.success.add().request_delete_range.CopyFrom(rpc_pb2.DeleteRangeRequest(key=b"Z", range_end=b"b"))
    nested = request.success.add().request_txn
    nested.success.add().request_put.CopyFrom(rpc_pb2.PutRequest(key=b"a", ignore_value=True))
    assert crashes_etcd(state, request)
    ask_state(state, request)
    assert state.mvcc.revision == before
