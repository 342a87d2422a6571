"""Runs the same random sequences of requests on a real etcd and on the store.

Sequences are seeded, and each starts from an emptied store. Both stay at the same revision all the time, so answers
are compared without adjusting revisions.
"""

from __future__ import annotations

from random import Random

from google.protobuf.message import Message

from proto.pb import rpc_pb2
from tests.store import sequences
from tests.store.both import Client, ask_state, comparable, watched_state
from upstream.store.errors import StoreError
from upstream.store.state import StoreState
from upstream.store.txn import check_nothing_kept_is_deleted, decide

REQUESTS = 25
EVERYTHING = rpc_pb2.DeleteRangeRequest(key=b"\x00", range_end=b"\x00")


def crashes_etcd(state: StoreState, request: Message) -> bool:
    """Return whether a request is a transaction that crashes etcd and that the store refuses."""
    if not isinstance(request, rpc_pb2.TxnRequest):
        return False
    try:
        check_nothing_kept_is_deleted(decide(state.mvcc, request))
    except StoreError:
        return True
    return False


class Pair:
    """A real etcd and the store, kept at the same revision by sending both every request."""

    def __init__(self, client: Client, state: StoreState) -> None:
        self.client = client
        self.state = state
        self.asked: list[Message] = []

    def ask(self, request: Message) -> None:
        """Send a request to both and compare the answers."""
        self.asked.append(request)
        theirs, ours = comparable(self.client.ask(request)), comparable(ask_state(self.state, request))
        if theirs != ours:
            raise AssertionError(f"etcd answers\n{theirs}\nthe store answers\n{ours}\n{self.story()}")

    def story(self) -> str:
        """Return all requests so far as text."""
        return "\n".join(f"--- {type(request).__name__}\n{request}" for request in self.asked)

    def reset(self) -> None:
        """Empty both: no keys, no leases, no history."""
        self.asked.clear()
        self.ask(EVERYTHING)
        for lease in sequences.LEASES:
            self.ask(rpc_pb2.LeaseRevokeRequest(ID=lease))
        # One more revision, because compacting the same revision again is refused.
        self.ask(rpc_pb2.PutRequest(key=b"reset"))
        self.ask(EVERYTHING)
        self.ask(rpc_pb2.CompactionRequest(revision=self.state.mvcc.revision, physical=True))
        self.asked.clear()

    def run(self, seed: int) -> None:
        """Run a whole sequence."""
        self.reset()
        rng = Random(seed)
        for _ in range(REQUESTS):
            request = sequences.request(rng, self.state.mvcc.revision)
            if not crashes_etcd(self.state, request):
                self.ask(request)

    def watch(self, create: rpc_pb2.WatchCreateRequest) -> None:
        """Compare the events of a watch."""
        theirs, ours = self.client.watched(create), watched_state(self.state, create)
        assert theirs == ours, f"different events for {create}\n{self.story()}"
