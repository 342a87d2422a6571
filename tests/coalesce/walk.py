"""A random walk over everything that can happen to a core, against a small model of etcd.

The model does what etcd's contract says, and no more: a store of revisions, upstream watches that get whole revisions
in bounded responses whose header is the store's, a `created` whose header may be later than the registration, reads
that are answered late, progress that is answered only for watches which have caught up, compaction that cancels watches
that are behind, refusals and losses. At the end each client's events are compared with the store, one by one.

The simulator (tests/sim) tests the whole core with real shells, time and faults; this walk is small enough to run with
the unit tests, and reaches corner cases quickly: tiny limits, tiny rooms, every kind of watch.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from coalesce import CoreLimits, CreateRefusal, Granted, Identity, Upstream, UpstreamLost
from coalesce.guarantees.checkers import in_range
from proto.pb import kv_pb2, rpc_pb2
from proto.scan import Event, WatchResponse, scan_watch_response
from tests.coalesce.shell import Client, Shell, header

KEYS = (b"a", b"b", b"c", b"d")
RANGES = ((b"a", b""), (b"b", b""), (b"a", b"c"), (b"\x00", b"\x00"), (b"b", b"z"))
LIMITS = CoreLimits(
    linger_s=0.5,
    history_bytes_max=3000,
    history_bytes_total_max=6000,
    history_revisions_max=8,
    history_age_s=20.0,
    replay_bytes_max=700,
    replay_turn_bytes_max=2000,
    response_bytes_max=900,
    fragment_bytes=250,
    backfills_max=2,
    backfill_bytes_max=1500,
    backfill_share_revisions=10,
    trunk_catch_up_revisions=5,
    bookmark_s=5.0,
    progress_notify_s=3.0,
    watches_per_session_max=12,
)


class Change:
    """One change of the store."""

    def __init__(self, revision: int, kind: int, key: bytes, value: bytes, prev: bytes | None) -> None:
        self.revision = revision
        self.kind = kind
        self.key = key
        self.value = value
        self.prev = prev

    def event(self, prev_kv: bool) -> Event:
        """Its encoded event."""
        event = kv_pb2.Event(kv=kv_pb2.KeyValue(key=self.key, value=self.value, mod_revision=self.revision))
        event.type = kv_pb2.Event.DELETE if self.kind else kv_pb2.Event.PUT
        if prev_kv and self.prev is not None:
            event.prev_kv.CopyFrom(kv_pb2.KeyValue(key=self.key, value=self.prev))
        return scan_watch_response(rpc_pb2.WatchResponse(events=[event]).SerializeToString()).events[0]


class UpstreamModel:
    """An upstream watch at the model etcd."""

    def __init__(self) -> None:
        self.created = False
        self.next_revision = 0


class WatchLog:
    """The request and the received events of one watch."""

    def __init__(self, request: rpc_pb2.WatchCreateRequest, asked_at: int) -> None:
        self.request = request
        # The store's revision when the request was sent.
        self.asked_at = asked_at
        self.start = request.start_revision
        self.events: list[kv_pb2.Event] = []
        self.canceled = False
        self.compact_revision = 0
        self.progress = 0


class WalkClient(Client):
    """A client that keeps a log of each of its watches."""

    def __init__(self, walk: Walk, identity: Identity) -> None:
        super().__init__(walk, identity)
        self.walk = walk
        self.asked: list[WatchLog] = []
        self.watches: dict[int, WatchLog] = {}
        self.done: list[WatchLog] = []
        # Ids cancelled by compaction, but not by the client.
        self.dead: set[int] = set()
        # Messages that the shell holds for it.
        self.held: list[bytes] = []
        self.run: list[kv_pb2.Event] | None = None
        self.progress_answers = 0

    def take(self, message: bytes) -> None:
        """Read one message."""
        response = rpc_pb2.WatchResponse.FromString(message[5:])
        revision = response.header.revision
        assert 0 < revision <= self.walk.revision
        if response.created:
            log = self.asked.pop(0)
            if response.canceled:
                assert response.watch_id == -1
                assert response.cancel_reason == "no"
                return
            assert response.watch_id not in self.watches
            if not log.start:
                assert revision >= log.asked_at, "now is not before the request"
                log.start = revision + 1
                log.progress = revision
            self.watches[response.watch_id] = log
        elif response.canceled and response.watch_id in self.dead:
            # Cancelled by compaction and then by the client: two answers.
            self.dead.discard(response.watch_id)
        elif response.canceled:
            log = self.watches.pop(response.watch_id)
            if response.compact_revision:
                self.dead.add(response.watch_id)
            log.canceled = True
            log.compact_revision = response.compact_revision
            self.done.append(log)
        elif response.events:
            self._events(self.watches[response.watch_id], response)
        else:
            self._progress(response)

    def _events(self, log: WatchLog, response: rpc_pb2.WatchResponse) -> None:
        if self.run is not None:
            assert log.events is self.run, "a response between fragments"
        else:
            assert response.events[0].kv.mod_revision > log.progress, "an event at or below progress"
            if log.events:
                assert response.events[0].kv.mod_revision > log.events[-1].kv.mod_revision
        log.events.extend(response.events)
        self.run = log.events if response.fragment else None
        last = response.events[-1].kv.mod_revision
        assert response.fragment or response.header.revision == last

    def _progress(self, response: rpc_pb2.WatchResponse) -> None:
        assert self.run is None
        revision = response.header.revision
        self.progress_answers += response.watch_id == -1
        logs = list(self.watches.values()) if response.watch_id == -1 else [self.watches[response.watch_id]]
        assert logs
        for log in logs:
            assert revision >= log.progress
            assert revision >= log.request.start_revision
            log.progress = revision
            seen = [event.kv.mod_revision for event in log.events]
            assert not seen or revision >= seen[-1]
            expected = [change.revision for change in self.walk.expected(log) if change.revision <= revision]
            assert seen == expected, f"progress {revision} was sent too early"

    def write(self, messages: Iterable[bytes]) -> None:
        """Accept messages, or hold them from the first one without room."""
        for message in messages:
            if self.room == 0 or self.held:
                self.held.append(message)
            else:
                self.take(message)
                if self.room is not None:
                    self.room -= 1
        if self.held and not self.session.stalled:
            self.walk.core.stalled(self.session)

    def drain(self, room: int | None = None) -> None:
        """Read the held messages, and `room` further ones."""
        self.room = room
        held, self.held = self.held, []
        for message in held:
            self.take(message)
        if self.session.stalled:
            self.walk.do(self.walk.core.drained, self.session)


class Walk(Shell):
    """One walk."""

    def __init__(self, seed: int, limits: CoreLimits = LIMITS, ordered_progress: bool = True) -> None:
        super().__init__(limits, ordered_progress)
        self.random = random.Random(seed)
        self.revision = 1
        self.compacted = 0
        self.changes: list[Change] = []
        self.values: dict[bytes, bytes] = {}
        self.models: dict[Upstream, UpstreamModel] = {}
        self.clients: list[WalkClient] = []
        self.gone: list[WalkClient] = []
        # Reads in flight that etcd has served, with their revisions.
        self.served: dict[int, int] = {}
        self.auth = bool(self.random.getrandbits(1))

    # the store

    def write(self) -> None:
        """Change one key or a few, in one revision."""
        self.revision += 1
        for key in self.random.sample(KEYS, self.random.choice((1, 1, 1, 2, 3))):
            prev = self.values.pop(key, None)
            kind = int(prev is not None and self.random.random() < 0.3)
            value = b"" if kind else b"%d" % self.revision * self.random.choice((1, 1, 20))
            if not kind:
                self.values[key] = value
            self.changes.append(Change(self.revision, kind, key, value, prev))

    def expected(self, log: WatchLog) -> Iterator[Change]:
        """Return all events that a watch must get."""
        request = log.request
        for change in self.changes:
            if change.revision >= log.start and in_range(change.key, request.key, request.range_end):
                filter_type = rpc_pb2.WatchCreateRequest.NODELETE if change.kind else rpc_pb2.WatchCreateRequest.NOPUT
                if filter_type not in request.filters:
                    yield change

    # etcd, upstream

    def register(self, upstream: Upstream) -> None:
        """Answer the create of an upstream watch."""
        model = self.models.setdefault(upstream, UpstreamModel())
        model.created = True
        # The header of `created` may be later than the revision at which etcd registered the watch.
        now = max(1, self.revision - self.random.choice((0, 0, 1, 2)))
        model.next_revision = upstream.start_revision or now + 1
        assert model.next_revision <= self.revision + 1, "a trunk or a backfill of the future"
        self.created(upstream, self.revision)

    def feed(self, upstream: Upstream) -> None:
        """Send an upstream watch some of its missing events."""
        model = self.models[upstream]
        if model.next_revision < self.compacted:
            del self.models[upstream]
            self.canceled(upstream, self.compacted, at=self.revision)
            return
        last = min(self.revision, model.next_revision + self.random.choice((0, 1, 4, 9)))
        events = [
            change.event(upstream.prev_kv)
            for change in self.changes
            if model.next_revision <= change.revision <= last and in_range(change.key, upstream.key, upstream.range_end)
        ]
        model.next_revision = max(model.next_revision, last + 1)
        if events:
            self.do(self.core.upstream_response, upstream, WatchResponse(header(self.revision), 0, events=events))

    def live(self) -> list[Upstream]:
        """Return the open upstream watches."""
        return [upstream for upstream in self.opened if not upstream.closed]

    def prove(self) -> None:
        """Answer a manual request for the upstream watches that have caught up."""
        for upstream in self.live():
            model = self.models.get(upstream)
            if model is not None and model.next_revision > self.revision:
                self.progressed(self.revision, upstream)

    # one step

    def step(self) -> None:
        """Take one random step."""
        roll = self.random.random()
        if roll < 0.25:
            self.write()
        elif roll < 0.6:
            self._etcd_step()
        elif roll < 0.65:
            self.wait(self.random.choice((0, 0.1, 0.3, 1.0, 4.0)))
        elif roll < 0.68 and self.revision > 3 and self.random.random() < 0.3:
            self.compacted = self.random.randint(max(1, self.compacted), self.revision)
        elif roll < 0.70 or not self.clients:
            client = WalkClient(self, Identity(self.random.choice((None, b"t1", b"t2"))))
            self.clients.append(client)
        elif roll < 0.705:
            client = self.clients.pop(self.random.randrange(len(self.clients)))
            client.close()
            self.gone.append(client)
        else:
            self._client_step(self.random.choice(self.clients))

    def _etcd_step(self) -> None:
        for read in self.reads:
            # A read is served some time after it began, and answered even later.
            if id(read) not in self.served and self.random.random() < 0.5:
                self.served[id(read)] = self.revision
        if self.reads and self.random.random() < 0.5:
            read = self.reads.pop(0)
            self.do(self.core.revision_read, read, header(self.served.pop(id(read), self.revision)))
        if self.checks and self.random.random() < 0.5:
            check = self.checks.pop(self.random.randrange(len(self.checks)))
            outcomes = (None, header(self.revision), Granted(header(self.revision)), CreateRefusal("no"))
            self.do(self.core.permission, check, self.random.choice(outcomes))
        live = self.live()
        if live:
            upstream = self.random.choice(live)
            if self.random.random() < 0.005:
                self.do(self.core.upstream_lost, upstream, UpstreamLost(14, "gone"))
                self._bury()
            elif self.random.random() < 0.01:
                self.models.pop(upstream, None)
                self.canceled(upstream, reason="not with this token", at=self.revision)
                self._bury()
            elif upstream not in self.models:
                self.register(upstream)
            elif upstream not in self.paused or self.random.random() < 0.05:
                self.feed(upstream)
        if self.asked and self.random.random() < 0.3:
            self.asked.clear()
            self.prove()

    def _bury(self) -> None:
        """Set clients aside whose session was ended."""
        self.gone.extend(client for client in self.clients if client.ended is not None)
        self.clients = [client for client in self.clients if client.ended is None]

    def _client_step(self, client: WalkClient) -> None:
        roll = self.random.random()
        if roll < 0.02 and client.dead:
            client.cancel(self.random.choice(list(client.dead)))
        elif roll < 0.3 and len(client.session.watches) + len(client.asked) < 10:
            self._create(client)
        elif roll < 0.4 and client.watches:
            watch_id = self.random.choice(list(client.watches))
            client.cancel(watch_id)
        elif roll < 0.5:
            client.progress()
        elif roll < 0.7:
            client.room = self.random.choice((0, 0, 1, 3, None))
        else:
            client.drain(self.random.choice((0, 1, 2, 5, None, None)))

    def _create(self, client: WalkClient) -> None:
        key, range_end = self.random.choice(RANGES)
        start = self.random.choice(
            (None, None, self.revision + 1, self.random.randint(1, self.revision), self.revision + 5)
        )
        flags = {
            name: self.random.random() < 0.25
            for name in ("no_put", "no_delete", "prev_kv", "fragment", "progress_notify")
        }
        request = rpc_pb2.WatchCreateRequest(
            key=key, range_end=range_end, start_revision=start or 0, prev_kv=flags["prev_kv"]
        )
        if flags["no_put"]:
            request.filters.append(rpc_pb2.WatchCreateRequest.NOPUT)
        if flags["no_delete"]:
            request.filters.append(rpc_pb2.WatchCreateRequest.NODELETE)
        client.asked.append(WatchLog(request, self.revision))
        client.create(key, range_end, start, **flags)

    # the end

    def come_to_rest(self) -> None:
        """Complete everything that is pending, until nothing changes any more."""
        for client in self.clients:
            client.drain()
        for _ in range(400):
            while self.checks:
                self.do(self.core.permission, self.checks.pop(), None)
            while self.reads:
                self.do(self.core.revision_read, self.reads.pop(0), header(self.revision))
            for upstream in self.live():
                if upstream not in self.models:
                    self.register(upstream)
                elif upstream not in self.paused:
                    self.feed(upstream)
            self.prove()
            self.wait(0.2)
            if self._is_at_rest():
                return
        raise AssertionError("the walk does not settle")

    def _is_at_rest(self) -> bool:
        return all(
            not client.asked and all(self._is_complete(log) for log in client.watches.values())
            for client in self.clients
        )

    def _is_complete(self, log: WatchLog) -> bool:
        return len(log.events) >= sum(1 for _ in self.expected(log))

    def judge(self) -> None:
        """Compare the events of every watch with the store."""
        for client in self.clients + self.gone:
            for log in [*client.watches.values(), *client.done]:
                self._judge(log, live=not log.canceled and client in self.clients)

    def _judge(self, log: WatchLog, live: bool) -> None:
        expected = list(self.expected(log))
        got = [(event.kv.mod_revision, event.kv.key, event.kv.value, int(event.type)) for event in log.events]
        wanted = [(change.revision, change.key, change.value, change.kind) for change in expected]
        assert got == (wanted if live else wanted[: len(got)]), f"{got}\n is not \n{wanted}"
        if log.compact_revision:
            assert len(got) < len(wanted) or log.start < log.compact_revision
            next_revision = got[-1][0] + 1 if got else log.start
            assert next_revision < log.compact_revision
        for event, change in zip(log.events, expected, strict=False):
            if log.request.prev_kv:
                assert event.prev_kv.value == (change.prev or b"")
            else:
                assert not event.HasField("prev_kv")


def walk(seed: int, steps: int, ordered_progress: bool = True) -> Walk:
    """Run one walk to its end and check it."""
    made = Walk(seed, ordered_progress=ordered_progress)
    for _ in range(steps):
        made.step()
    made.come_to_rest()
    made.judge()
    return made
