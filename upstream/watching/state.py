"""
What is known of our watches at the etcd we talk to: ids, order of creates, positions, fragments, what progress
proves.

This is the part of a watch client that has to be right, so it does no I/O: inputs go in, effects come out, and the
shell (upstream/watching/client.py), the tests and the simulator drive the same class.

Theory of operation. The listener opens a *watch* (any object with the attributes of `OpenedWatch`); a
`Registration` is our side of it and outlives connections. While connected each registration belongs to one
`WatchStream`: all trunks of one token share one, each backfill has its own. A registration is *creating* until the
server answered its create, then *live* under the id that the server chose. Creates are pipelined and answered in
order, so the oldest one outstanding is the one that a `created` belongs to; ids alone do not tell, since every
refusal has the id -1.

Position. `next_revision` is the first revision still needed; it moves by events and by progress, never by the
header of an event response: a catch-up response carries the store's revision beside at most 1000 revisions of
events. A lost connection leaves positions alone, and `register` creates all again from there. Three points of care:

- A start above what the store has makes etcd drop every progress request of the stream, and one at or below it has
  etcd look back first, for up to 100 ms, during which a compaction cancels the watch though nothing was missed. So
  what needs nothing that is known to exist is created from now; what comes below its position is dropped here. When
  the header of that `created` says that something has been written meanwhile, it is created again, from its position.
- That can be a revision that has been compacted although nothing needed is. Such a cancel stays inside: the watch is
  created again.
- A watch from "now" (None) gets its position from the header of its `created`, that revision *inclusive*: etcd
  reads this header after it registered the watch (since 3.5.22), so an event at that very revision may still
  follow, and resuming above it could lose that event. Yet it is not *needed*, since who joins at "now" skips what is
  <= the revision of `created`: when just that event is compacted, the watch goes on.

Progress. An answer to a manual request says nothing about a watch whose `created` came after the request was sent,
and does not say which request it answers; unanswered ones are dropped by etcd. `WatchStream` keeps a lower bound
for the number of the request that an answer can belong to: answers come in order, and an answer with a revision
above that of a later create's header cannot belong to a request sent before that create.

Who asks wants to be told at least what the server had when it asked, and a lower bound that lags behind after a
dropped request would never say so. So a request that follows unanswered ones goes with a *probe*: a create of an
empty range, which every etcd refuses, in order and with the revision it has then. Whatever proves that revision, an
event or an answer to whichever request, is fresh enough. Servers without ordered progress get the probe alone.

Sources: etcd server/etcdserver/api/v3rpc/watch.go, server/storage/mvcc/watchable_store.go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from proto.framing import Status
from proto.scan import Header, WatchResponse, encode_cancel, encode_create, encode_progress
from upstream.credentials import is_auth_refusal
from upstream.errors import read_reason
from upstream.namespace import Namespace
from upstream.watching.effects import (
    CloseStream,
    Effect,
    HeaderSeen,
    Lost,
    OpenStream,
    Progressed,
    Received,
    TokenRefused,
    Write,
)
from upstream.watching.stream import Create, OpenedWatch, Registration, WatchStream

_PROBE: Final = encode_create(b"\x01", b"\x01")
# A token may be outdated the moment it is there; twice in a row is no chance.
_OWN_REFUSED_MAX: Final = 2


PROGRESS_ID: Final = -1
"""The watch id of answers to manual progress requests, and of refused creates."""


class WatchState:
    """All registrations and, while connected, their streams. Inputs return what is to be done, in order."""

    def __init__(self, namespace: Namespace | None = None) -> None:
        self.connected = False
        # What the keys of all watches are prefixed with at etcd; None = nothing.
        self._namespace = namespace
        # The server answers manual progress requests in order with events; only then are they sent.
        self.ordered_progress = False
        # The token of our own user, which all trunks are watched with; None = there is none (now).
        self.own_token: bytes | None = None
        # The highest revision seen in any header; 0 = none yet.
        self.newest_revision = 0
        # In the order of opening; the key is the id() of the listener's object, which need not be hashable.
        self._registrations: dict[int, Registration] = {}
        self._trunk_streams: dict[bytes | None, WatchStream] = {}
        self._backfill_streams: dict[int, WatchStream] = {}

    def __len__(self) -> int:
        return len(self._registrations)

    def streams(self) -> Iterator[WatchStream]:
        """All streams there are."""
        yield from self._trunk_streams.values()
        yield from self._backfill_streams.values()

    def registration(self, watch: OpenedWatch) -> Registration | None:
        """Return where `watch` stands; None when it is not open (any more)."""
        return self._registrations.get(id(watch))

    def open(self, watch: OpenedWatch) -> list[Effect]:
        """Register a watch, now or when connected. Raises ValueError if it is open already."""
        if id(watch) in self._registrations:
            raise ValueError("this watch is open already")
        registration = self._registrations[id(watch)] = Registration(watch)
        effects: list[Effect] = []
        if self.connected:
            self._register(registration, effects)
        return effects

    def close(self, watch: OpenedWatch) -> list[Effect]:
        """Cancel a watch. Nothing more is said about it. One that is over already is ignored."""
        effects: list[Effect] = []
        registration = self._registrations.get(id(watch))
        if registration is not None:
            self._forget(registration, effects)
        return effects

    def pause(self, watch: OpenedWatch) -> None:
        """Have a backfill's stream not read, this one and those after a break. Raises ValueError for a trunk."""
        if not watch.is_backfill:
            raise ValueError("only backfills can be paused: trunks share a stream")
        self._set_paused(watch, True)

    def resume(self, watch: OpenedWatch) -> WatchStream | None:
        """Have a backfill's stream read again; return it, None when there is none now."""
        return self._set_paused(watch, False)

    def _set_paused(self, watch: OpenedWatch, paused: bool) -> WatchStream | None:
        registration = self._registrations.get(id(watch))
        if registration is None:
            return None
        registration.paused = paused
        if registration.stream is not None:
            registration.stream.paused = paused
        return registration.stream

    def request_progress(self, number: int, watches: Iterable[OpenedWatch] | None = None) -> list[Effect]:
        """
        Ask the streams of these watches, or (None) all of them, how far they are complete; `number` is the listener's
        for this request, higher each time.

        A request waits for the creates that are outstanding, since its answer would prove nothing for them. Answers
        may never come; ask again by timer. Servers without ordered progress are only asked which revision they have.
        """
        effects: list[Effect] = []
        if not self.ordered_progress:
            stream = next((stream for stream in self.streams() if stream.live and not stream.paused), None)
            if stream is not None:
                self._probe(stream, number, effects)
            return effects
        for stream in tuple(self.streams()) if watches is None else self._streams_of(watches):
            if stream.wanted is None:
                creating = (create.registration for create in reversed(stream.creating))
                stream.wanted = next((registration for registration in creating if registration is not None), None)
            if stream.wanted is None:
                self._request_progress(stream, number, effects)
            else:
                stream.wanted_number = number
        return effects

    def _streams_of(self, watches: Iterable[OpenedWatch]) -> Iterable[WatchStream]:
        """Return the streams that carry these watches, each once."""
        streams: dict[WatchStream, None] = {}
        for watch in watches:
            registration = self._registrations.get(id(watch))
            if registration is not None and registration.stream is not None:
                streams[registration.stream] = None
        return streams

    def connect(self, ordered_progress: bool, revision: int) -> list[Effect]:
        """A connection is there; its server is at `revision` (0 = unknown). Everything registers."""
        self.connected = True
        self.ordered_progress = ordered_progress
        self.newest_revision = max(self.newest_revision, revision)
        return self.register()

    def register(self) -> list[Effect]:
        """Register what has no stream: after `connect` everything, after `ended` what was on that stream."""
        effects: list[Effect] = []
        if self.connected:
            for registration in self._registrations.values():
                if registration.stream is None:
                    self._register(registration, effects)
        return effects

    def logged_in(self, token: bytes | None) -> list[Effect]:
        """Our own user has a new token, or none can be had: register what waits for it."""
        self.own_token = token
        return self.register()

    def disconnect(self) -> None:
        """The connection is gone, and all streams with it. Half a run of fragments is dropped; positions stay."""
        self.connected = False
        for stream in list(self.streams()):
            self._drop(stream)
        for registration in self._registrations.values():
            registration.stream = None
            registration.watch_id = None

    def ended(self, stream: WatchStream) -> None:
        """A stream is gone. What was on it waits for `register`."""
        self._drop(stream)
        for registration in self._registrations.values():
            if registration.stream is stream:
                registration.stream = None
                registration.watch_id = None

    def refused(self, stream: WatchStream, status: int, text: str) -> list[Effect]:
        """A stream ended in a way that trying again does not mend: all its watches are lost."""
        if stream.own and is_auth_refusal(status, text):
            self.ended(stream)
            return [TokenRefused(stream.token)]
        self._drop(stream)
        there = [registration for registration in self._registrations.values() if registration.stream is stream]
        for registration in there:
            registration.closed = True
            registration.stream = None
            del self._registrations[id(registration.watch)]
        return [Lost(registration.watch, status, text) for registration in there]

    def received(self, stream: WatchStream, response: WatchResponse) -> list[Effect]:
        """A message came on a stream."""
        watch = self.received_events(stream, response)
        if watch is not None:
            return [Received(watch, response)]
        registration = stream.by_id.get(response.watch_id)
        if registration is None or not response.plain or stream.held:
            return self._received_otherwise(stream, registration, response)
        return self._received_again(registration, response)

    def received_events(self, stream: WatchStream, response: WatchResponse) -> OpenedWatch | None:
        """Take events of a live watch that are all new and return the watch: the fast lane of `received`.

        None: it is anything else, and `received` has to take it.
        """
        revision = response.header.revision
        if revision > self.newest_revision:
            self.newest_revision = revision
        registration = stream.by_id.get(response.watch_id)
        if registration is None or not response.plain or stream.held:
            return None
        events = response.events
        next_revision = registration.next_revision
        if next_revision is not None and events[0].revision < next_revision:
            return None
        registration.next_revision = events[-1].revision + 1
        return registration.watch

    def _received_otherwise(
        self, stream: WatchStream, registration: Registration | None, response: WatchResponse
    ) -> list[Effect]:
        """Everything but plain events of a live watch."""
        effects: list[Effect] = []
        if response.created:
            self._created(stream, response, effects)
        elif registration is None:
            self._received_unknown(stream, response, effects)
        elif response.canceled:
            self._canceled(stream, registration, response, effects)
        elif response.events or response.watch_id in stream.held:
            self._piece(stream, registration, response, effects)
        else:
            self._bookmark(registration, response, effects)
        return effects

    def _created(self, stream: WatchStream, response: WatchResponse, effects: list[Effect]) -> None:
        if not stream.creating:
            self._received_unknown(stream, response, effects)
            return
        create = stream.creating.popleft()
        registration, requested_before = create.registration, create.requested_before
        stream.answered = True
        header = response.header
        if requested_before >= stream.answers_from and (not stream.passed or stream.passed[-1][0] < requested_before):
            stream.passed.append((requested_before, header.revision))
        if registration is None:
            if not response.canceled:
                # No etcd does that.
                self._cancel(stream, response.watch_id, effects)
            effects.append(Progressed([], header, create.number))
            return
        registration.unproven = stream.requested
        if stream.wanted is registration:
            stream.wanted = None
            # Before the listener is told: what it then opens is to follow on the wire, as it does in `creating`.
            self._request_progress(stream, stream.wanted_number, effects)
        if response.canceled:
            if not registration.closed:
                effects.append(HeaderSeen(header))
                self._create_refused(stream, registration, *read_reason(response.cancel_reason), effects)
        elif registration.closed:
            self._cancel(stream, response.watch_id, effects)
        elif create.skips and header.revision >= (registration.next_revision or 0):
            # What is needed may have been written before the watch was there.
            effects.append(HeaderSeen(header))
            self._cancel(stream, response.watch_id, effects)
            self._create(stream, registration, effects)
        else:
            registration.watch_id = response.watch_id
            registration.own_refused = 0
            stream.by_id[response.watch_id] = registration
            if registration.next_revision is None and header.revision > 0:
                registration.next_revision = registration.now = header.revision
            effects.append(HeaderSeen(header) if registration.announced else Received(registration.watch, response))
            registration.announced = True

    def _create_refused(
        self, stream: WatchStream, registration: Registration, status: int, text: str, effects: list[Effect]
    ) -> None:
        """A watch is over; but what our own user may not watch, somebody else may."""
        if not stream.own or not is_auth_refusal(status, text):
            effects.append(Lost(registration.watch, status, text))
            self._forget(registration, effects)
            return
        self._leave(registration, effects)
        registration.own_refused += 1
        if status == Status.PERMISSION_DENIED:
            registration.own_refused = _OWN_REFUSED_MAX
        if registration.own_refused < _OWN_REFUSED_MAX:
            effects.append(TokenRefused(stream.token))
        else:
            self._register(registration, effects)

    def _received_unknown(self, stream: WatchStream, response: WatchResponse, effects: list[Effect]) -> None:
        """A response of no live id: a progress answer, or the last words of a dying id."""
        watch_id = response.watch_id
        if watch_id == PROGRESS_ID and not (response.events or response.canceled or response.created):
            self._progressed(stream, response.header, effects)
            return
        if watch_id not in stream.dying:
            # Nobody here knows it: stop it, as clientv3 does, instead of paying for its events for ever.
            if not response.canceled and watch_id >= 0:
                self._cancel(stream, watch_id, effects)
        elif response.canceled and not response.compact_revision:
            stream.dying.discard(watch_id)
        effects.append(HeaderSeen(response.header))

    def _canceled(
        self, stream: WatchStream, registration: Registration, response: WatchResponse, effects: list[Effect]
    ) -> None:
        """The server has ended a watch."""
        compact_revision = response.compact_revision
        if not compact_revision:
            status, text = read_reason(response.cancel_reason)
            self._unlink(stream, registration)
            effects.append(HeaderSeen(response.header))
            effects.append(Lost(registration.watch, status, text or "the upstream server cancelled the watch"))
            self._forget(registration, effects)
            return
        self.newest_revision = max(self.newest_revision, compact_revision)
        next_revision = registration.next_revision or 0
        if next_revision == registration.now:
            next_revision += 1
        if next_revision >= compact_revision:
            # Only the start was too old, not what is needed: see the module's docstring.
            registration.next_revision = next_revision
            watch_id = response.watch_id
            self._unlink(stream, registration)
            self._cancel(stream, watch_id, effects)
            self._create(stream, registration, effects)
            return
        effects.append(Received(registration.watch, response))
        # etcd keeps the id until it is cancelled, and drops all progress requests until then.
        self._forget(registration, effects)

    def _piece(
        self, stream: WatchStream, registration: Registration, response: WatchResponse, effects: list[Effect]
    ) -> None:
        """
        Events inside of a run of fragments: pass on the revisions that are complete.

        The last revision of a piece may go on in the next one, so it is held back; the whole run is never held, which
        could be a thousand revisions.
        """
        watch_id = response.watch_id
        events = stream.held.pop(watch_id, []) + response.events
        if response.fragment and events:
            whole = len(events)
            last_revision = events[-1].revision
            while whole and events[whole - 1].revision == last_revision:
                whole -= 1
            stream.held[watch_id] = events[whole:]
            events = events[:whole]
        if events:
            joined = WatchResponse(response.header, watch_id, False, False, 0, "", response.fragment, events)
            effects.extend(self._received_again(registration, joined))

    def _received_again(self, registration: Registration, response: WatchResponse) -> list[Effect]:
        """Whole revisions, of which some may have been received before."""
        next_revision = registration.next_revision or 0
        events = response.events
        if events[0].revision < next_revision:
            events = [event for event in events if event.revision >= next_revision]
            response.events = events
            if not events:
                return [HeaderSeen(response.header)]
        registration.next_revision = events[-1].revision + 1
        return [Received(registration.watch, response)]

    def _bookmark(self, registration: Registration, response: WatchResponse, effects: list[Effect]) -> None:
        """Progress under the watch's own id (progress_notify), which is in order with its events everywhere."""
        revision = response.header.revision
        if revision + 1 >= (registration.next_revision or 0):
            registration.next_revision = revision + 1
            effects.append(Received(registration.watch, response))
        else:
            effects.append(HeaderSeen(response.header))

    def _progressed(self, stream: WatchStream, header: Header, effects: list[Effect]) -> None:
        """The answer to one of our progress requests."""
        revision = header.revision
        if stream.answers_from > stream.requested:
            # All have been answered: whatever this is, it proves nothing.
            effects.append(HeaderSeen(header))
            return
        while stream.passed and stream.passed[0][1] < revision:
            number, _ = stream.passed.popleft()
            stream.answers_from = max(stream.answers_from, number + 1)
        asked = 0
        while stream.numbers and stream.numbers[0][0] <= stream.answers_from:
            asked = stream.numbers.popleft()[1]
        watches: list[OpenedWatch] = []
        for registration in stream.by_id.values():
            if registration.unproven < stream.answers_from:
                if revision >= (registration.next_revision or 0):
                    registration.next_revision = revision + 1
                watches.append(registration.watch)
        stream.answers_from += 1
        while stream.passed and stream.passed[0][0] < stream.answers_from:
            stream.passed.popleft()
        effects.append(Progressed(watches, header, asked) if watches or asked else HeaderSeen(header))

    def _request_progress(self, stream: WatchStream, number: int, effects: list[Effect]) -> None:
        if stream.live and not stream.paused:
            if stream.answers_from <= stream.requested:
                self._probe(stream, number, effects)
            stream.requested += 1
            stream.numbers.append((stream.requested, number))
            effects.append(Write(stream, encode_progress()))

    def _probe(self, stream: WatchStream, number: int, effects: list[Effect]) -> None:
        """Ask for the revision that the server has, in order with the other requests of a stream."""
        stream.creating.append(Create(None, stream.requested, number))
        effects.append(Write(stream, _PROBE))

    def _register(self, registration: Registration, effects: list[Effect]) -> None:
        """Create a registration that has no stream, on the stream it belongs to."""
        watch = registration.watch
        token = self.own_token
        own = token is not None and not watch.is_backfill and registration.own_refused < _OWN_REFUSED_MAX
        if not own:
            token = watch.token
        stream = None if watch.is_backfill else self._trunk_streams.get(token)
        if stream is None:
            stream = WatchStream(token, watch.is_backfill, own)
            if watch.is_backfill:
                self._backfill_streams[id(stream)] = stream
            else:
                self._trunk_streams[token] = stream
            effects.append(OpenStream(stream))
        registration.stream = stream
        stream.paused = registration.paused
        stream.live += 1
        self._create(stream, registration, effects)

    def _create(self, stream: WatchStream, registration: Registration, effects: list[Effect]) -> None:
        """Send a create from the registration's position; from now, if that is above the newest revision known."""
        start = registration.next_revision
        skips = start is not None and 0 < self.newest_revision < start
        if skips:
            start = None
        stream.creating.append(Create(registration, stream.requested, skips=skips))
        watch = registration.watch
        interval = watch.key, watch.range_end
        message = encode_create(
            *(interval if self._namespace is None else self._namespace.interval(*interval)),
            start_revision=start,
            prev_kv=watch.prev_kv,
            fragment=True,
            progress_notify=True,
        )
        effects.append(Write(stream, message))

    def _unlink(self, stream: WatchStream, registration: Registration) -> None:
        """Take a live registration off its id."""
        if registration.watch_id is not None:
            del stream.by_id[registration.watch_id]
            stream.held.pop(registration.watch_id, None)
            registration.watch_id = None

    def _cancel(self, stream: WatchStream, watch_id: int, effects: list[Effect]) -> None:
        stream.dying.add(watch_id)
        effects.append(Write(stream, encode_cancel(watch_id)))

    def _forget(self, registration: Registration, effects: list[Effect]) -> None:
        """A watch is over: cancel its id, or the whole stream when it was the last one there."""
        registration.closed = True
        self._registrations.pop(id(registration.watch), None)
        self._leave(registration, effects)

    def _leave(self, registration: Registration, effects: list[Effect]) -> None:
        """Take a registration off its stream."""
        stream = registration.stream
        if stream is None:
            return
        registration.stream = None
        watch_id = registration.watch_id
        self._unlink(stream, registration)
        stream.live -= 1
        if stream.live == 0:
            self._drop(stream)
            effects.append(CloseStream(stream))
        elif watch_id is not None:
            self._cancel(stream, watch_id, effects)

    def _drop(self, stream: WatchStream) -> None:
        """Take a stream out of every index; what still comes on it finds nobody."""
        if stream.is_backfill:
            self._backfill_streams.pop(id(stream), None)
        elif self._trunk_streams.get(stream.token) is stream:
            del self._trunk_streams[stream.token]
        stream.by_id.clear()
        stream.held.clear()
        stream.creating.clear()
        stream.live = 0
