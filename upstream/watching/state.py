"""State of the proxy's watches at etcd: ids, order of creates, positions, fragments, what progress proves.

This is the part of a watch client that must be correct, so it does no I/O: inputs go in, effects come out, and the
shell (upstream/watching/client.py), the tests and the simulator drive the same class.

Theory of operation. The listener opens a *watch* (any object with the attributes of `OpenedWatch`); a `Registration` is
the client's record of it and outlives connections. While connected, each registration belongs to one `WatchStream`: all
trunks of one token share a stream, each backfill has its own. A registration is *creating* until the server has
answered its create, then *live* under the id that the server chose. Creates are pipelined and answered in order, so a
`created` belongs to the oldest outstanding create; the id does not identify it, since every refusal has the id -1.

Position. `next_revision` is the first revision still needed; it advances by events and by progress, never by the header
of an event response: a catch-up response has the store's revision in its header but at most 1000 revisions of events. A
lost connection does not change positions, and `register` creates all watches again from there. Three special cases:

- A start above the store's revision makes etcd drop every progress request of the stream. With a start at or below it
  the watch is unsynced at first, for up to 100 ms, and a compaction in that time cancels the watch although it missed
  nothing. So a watch that needs no revision known to exist is created from now, and events below its position are
  dropped here. When the header of that `created` shows that there was a write meanwhile, the watch is created again,
  from its position.
- That position can be a compacted revision although no needed revision is compacted. Such a cancel is not passed on;
  the watch is created again.
- A watch from "now" (None) gets its position from the header of its `created`, that revision *inclusive*: etcd reads
  this header after it has registered the watch (since 3.5.22), so an event at this very revision may still follow, and
  resuming above it could lose that event. Yet the event is not *needed*, since clients that join at "now" skip events
  at or below the revision of `created`: if only that event is compacted, the watch continues.

Elsewhere: what of a response is new (`positions`), which stream a watch belongs to (`streams`), which create ends its
stream (`suspects`), what progress answers prove (`proof`), how a large response becomes a run of pieces (`feed`).

Sources: etcd server/etcdserver/api/v3rpc/watch.go, server/storage/mvcc/watchable_store.go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from proto.etcd_errors import is_auth_refusal, read_reason
from proto.framing import Status
from proto.plain_request import encode_cancel, encode_create
from proto.scan import WatchResponse
from upstream.namespace import Namespace
from upstream.watching.effects import (
    CloseStream,
    HeaderSeen,
    OpenStream,
    Progressed,
    TokenRefused,
    WatchEffect,
    WatchLost,
    WatchReceived,
    WriteMessage,
)
from upstream.watching.positions import pass_on, pass_on_bookmark, pass_on_piece
from upstream.watching.proof import ask_progress, note_created, progress_answered, send_probe
from upstream.watching.registrations import Registrations
from upstream.watching.stream import (
    OpenedWatch,
    Registration,
    SentCreate,
    StreamEndAction,
    StreamKind,
    WatchStream,
)
from upstream.watching.streams import STREAMS_MAX, Streams, kind_of
from upstream.watching.suspects import SuspectGroups

# A fresh token can already be stale; two consecutive refusals have another cause.
_OWN_REFUSED_MAX: Final = 2


# Maximum lost watches that are reported in one step: each may end sessions, and writes a line to the log.
LOST_MAX: Final = 50

HELD_BYTES_MAX: Final = 512 << 20

PROGRESS_ID: Final = -1
"""The watch id in answers to manual progress requests, and in refused creates."""


class WatchState:
    """All registrations and, while connected, their streams. Each input returns its effects, in order."""

    def __init__(
        self,
        namespace: Namespace | None = None,
        held_bytes_max: int = HELD_BYTES_MAX,
        streams_max: Mapping[StreamKind, int] = STREAMS_MAX,
    ) -> None:
        """`held_bytes_max`: the maximum size of one revision, see `UpstreamSettings.watch_message_bytes_max`."""
        self.connected = False
        # The server has answered a create on this connection.
        self.works = False
        self._held_bytes_max = held_bytes_max
        # The prefix of all watches' keys at etcd; None = no prefix.
        self.namespace = namespace
        # The server answers manual progress requests in order with events; they are sent only if it does.
        self.ordered_progress = False
        # The server may be a proxy, which answers such requests later than etcd does (see `proof`).
        self.late_progress = False
        # The token of the proxy's own user, which all trunks are watched with; None = there is none (now).
        self.own_token: bytes | None = None
        # The highest revision seen in any header; 0 = none yet.
        self.newest_revision = 0
        self._registrations = Registrations()
        # Watches that are lost, and not reported yet.
        self._lost: deque[WatchLost] = deque()
        self._streams = Streams(streams_max)
        self._suspects = SuspectGroups()

    def __len__(self) -> int:
        return len(self._registrations)

    def streams(self) -> Iterator[WatchStream]:
        """All open streams."""
        yield from self._streams

    def registration(self, watch: OpenedWatch) -> Registration | None:
        """Return the registration of `watch`; None when it is not open (any more)."""
        return self._registrations.get(watch)

    def open(self, watch: OpenedWatch) -> list[WatchEffect]:
        """Register a watch, now or when connected. Raises ValueError if it is open already."""
        if self._registrations.get(watch) is not None:
            raise ValueError("this watch is open already")
        registration = self._registrations.add(watch)
        effects: list[WatchEffect] = []
        if self.connected:
            self._register(registration, effects)
        return effects

    def close(self, watch: OpenedWatch) -> list[WatchEffect]:
        """Cancel a watch. No more effects concern it. A watch that has ended already is ignored."""
        effects: list[WatchEffect] = []
        registration = self._registrations.get(watch)
        if registration is not None:
            self._forget(registration, effects)
        return effects

    def pause(self, watch: OpenedWatch) -> None:
        """Stop reading a backfill's stream, also after a break. Raises ValueError for a trunk."""
        if not watch.is_backfill:
            raise ValueError("only backfills can be paused: trunks share a stream")
        self._set_paused(watch, True)

    def resume(self, watch: OpenedWatch) -> WatchStream | None:
        """Read a backfill's stream again; return the stream, None when there is none now."""
        return self._set_paused(watch, False)

    def _set_paused(self, watch: OpenedWatch, paused: bool) -> WatchStream | None:
        registration = self._registrations.get(watch)
        if registration is None:
            return None
        registration.paused = paused
        if registration.stream is not None:
            registration.stream.paused = paused
        return registration.stream

    def request_progress(self, number: int, watches: Iterable[OpenedWatch] | None = None) -> list[WatchEffect]:
        """Request progress on the streams of these watches, or (None) on all streams; `number` is the listener's number
        for this request, higher each time.

        A request waits for the outstanding creates, since its answer would prove nothing about them. Answers may never
        arrive; repeat by timer. Servers without ordered progress are only asked for their revision.
        """
        effects: list[WatchEffect] = []
        if not self.ordered_progress:
            stream = next((stream for stream in self.streams() if stream.live and not stream.paused), None)
            if stream is not None:
                send_probe(stream, number, effects)
            return effects
        for stream in tuple(self.streams()) if watches is None else self._streams_of(watches):
            if stream.wanted is None:
                creating = (create.registration for create in reversed(stream.creating))
                stream.wanted = next((registration for registration in creating if registration is not None), None)
            if stream.wanted is None:
                ask_progress(stream, number, effects, late=self.late_progress)
            else:
                stream.wanted_number = number
        return effects

    def _streams_of(self, watches: Iterable[OpenedWatch]) -> Iterable[WatchStream]:
        """Return the streams that carry these watches, each once."""
        registrations = map(self._registrations.get, watches)
        streams = (each.stream for each in registrations if each is not None)
        return dict.fromkeys(stream for stream in streams if stream is not None)

    def connect(self, ordered_progress: bool, revision: int) -> list[WatchEffect]:
        """A connection is open; its server is at `revision` (0 = unknown). All watches register."""
        self.connected = True
        self.ordered_progress = ordered_progress
        self.note_revision(revision)
        return self.register()

    def note_revision(self, revision: int) -> None:
        """Record that the store is at a revision or above."""
        self.newest_revision = max(self.newest_revision, revision)

    def register(self) -> list[WatchEffect]:
        """Register watches without a stream: after `connect` all of them, after `over` those of that stream.

        Those that exceed this step register in `go_on`.
        """
        if self.connected:
            self._registrations.look_at()
        return self.go_on()

    @property
    def goes_on(self) -> bool:
        """Whether `go_on` is due: in the next turn of the event loop."""
        return self._registrations.are_coming or bool(self._lost)

    def go_on(self) -> list[WatchEffect]:
        """Register the next watches, and report the next ones that are lost, as many as one step allows."""
        effects: list[WatchEffect] = []
        for registration in self._registrations.take():
            self._register(registration, effects)
        effects += [self._lost.popleft() for _ in range(min(len(self._lost), LOST_MAX))]
        return effects

    def logged_in(self, token: bytes | None) -> list[WatchEffect]:
        """Set the new token of the proxy's own user, None if login failed: register the watches that wait for it."""
        self.own_token = token
        return self.register()

    def disconnect(self) -> None:
        """The connection has ended, with all streams. Incomplete runs of fragments are dropped; positions stay."""
        self.connected = False
        for stream in list(self.streams()):
            self._drop(stream)
        self.works = False
        self._registrations.look_at_none()

    def over(self, stream: WatchStream, follows: StreamEndAction, status: int, text: str) -> list[WatchEffect]:
        """Handle a stream that has ended: its watches are lost, or wait for `register`."""
        if follows is StreamEndAction.LOST:
            return self.refused(stream, status, text)
        if follows is StreamEndAction.TOKEN:
            return self.refused(stream, Status.UNAUTHENTICATED, f"etcd ended the stream of this token: {text}")
        if follows is StreamEndAction.APART:
            return self._ended_by_a_create(stream, status, text)
        self._ended(stream, counts=follows is StreamEndAction.HERE)
        return []

    def _ended(self, stream: WatchStream, *, counts: bool) -> None:
        for registration in stream.unanswered:
            registration.ends += counts
        self._drop(stream)

    def _ended_by_a_create(self, stream: WatchStream, status: int, text: str) -> list[WatchEffect]:
        """Handle a stream that may have ended because of an unanswered create."""
        guilty = self._suspects.judge(stream)
        self._ended(stream, counts=True)
        effects: list[WatchEffect] = []
        for registration in guilty:
            effects.append(WatchLost(registration.watch, status, text))
            self._forget(registration, effects)
        return effects

    def _clear_suspects(self, stream: WatchStream, effects: list[WatchEffect]) -> None:
        """All suspects of a stream were answered: move them to their regular streams, and try the next suspects."""
        for registration in stream.by_id.values():
            registration.group = None
        if stream.kind is not StreamKind.SUSPECT:
            stream.group = None
            return
        there = stream.registrations
        self._drop(stream)
        effects.append(CloseStream(stream))
        self._registrations.look_at(there)
        effects += self.go_on()
        self._next_suspects(effects)

    def _next_suspects(self, effects: list[WatchEffect]) -> None:
        if self._suspects.waiting and self.connected:
            self._suspects.waiting = False
            effects += self.register()

    def refused(self, stream: WatchStream, status: int, text: str) -> list[WatchEffect]:
        """A stream ended for a reason that a retry does not fix: all its watches are lost."""
        if stream.own and is_auth_refusal(status, text):
            self._ended(stream, counts=False)
            return [self._token_refused(stream)]
        there = stream.registrations
        self._drop(stream)
        for registration in there:
            self._registrations.remove(registration)
        self._lost.extend(WatchLost(registration.watch, status, text) for registration in there)
        return self.go_on()

    def _token_refused(self, stream: WatchStream) -> TokenRefused:
        """The proxy's own user was refused: watches wait for `logged_in`."""
        self._registrations.look_at_none()
        return TokenRefused(stream.token)

    def received(self, stream: WatchStream, response: WatchResponse) -> list[WatchEffect]:
        """Handle a message that arrived on a stream."""
        watch = self.received_events(stream, response)
        if watch is not None:
            return [WatchReceived(watch, response)]
        registration = stream.by_id.get(response.watch_id)
        if registration is None or not response.plain or stream.held:
            return self._received_otherwise(stream, registration, response)
        return [pass_on(registration, response)]

    def received_events(self, stream: WatchStream, response: WatchResponse) -> OpenedWatch | None:
        """Handle events of a live watch that are all new and return the watch: the fast path of `received`.

        480 ns instead of 890, with the effect that is not made (`python -m tests.bench.lanes`).

        None: the response is of any other kind, and `received` must handle it.
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
    ) -> list[WatchEffect]:
        """Handle any response other than plain events of a live watch."""
        effects: list[WatchEffect] = []
        if response.created:
            self._created(stream, response, effects)
        elif registration is None:
            self._received_unknown(stream, response, effects)
        elif response.canceled:
            self._canceled(stream, registration, response, effects)
        elif response.events or response.watch_id in stream.held:
            self._piece(stream, registration, response, effects)
        else:
            effects.append(pass_on_bookmark(registration, response))
        # Writes first: creates that the listener opens while it is notified (of one of these effects) must follow them
        # on the wire, as they do in `creating`.
        effects.sort(key=lambda effect: isinstance(effect, WatchReceived | Progressed | WatchLost | TokenRefused))
        return effects

    def _created(self, stream: WatchStream, response: WatchResponse, effects: list[WatchEffect]) -> None:
        if not stream.creating:
            self._received_unknown(stream, response, effects)
            return
        create = stream.creating.popleft()
        registration = create.registration
        stream.answered = self.works = True
        header = response.header
        note_created(stream, create, header.revision)
        if registration is None:
            if not response.canceled:
                # etcd never accepts the probe.
                self._cancel(stream, response.watch_id, effects)
            effects.append(Progressed([], header, create.number) if create.number else HeaderSeen(header))
            waiting, stream.waiting = stream.waiting, []
            for suspect in waiting:
                if suspect.stream is stream:
                    self._create(stream, suspect, effects)
            return
        registration.unproven = stream.requested
        registration.ends = 0
        if stream.wanted is registration:
            stream.wanted = None
            ask_progress(stream, stream.wanted_number, effects, late=self.late_progress)
        if response.canceled:
            if not registration.closed:
                effects.append(HeaderSeen(header))
                self._create_refused(stream, registration, *read_reason(response.cancel_reason), effects)
        elif registration.closed:
            self._cancel(stream, response.watch_id, effects)
        elif create.skips and header.revision >= (registration.next_revision or 0):
            # A needed revision may have been written before the watch was registered.
            effects.append(HeaderSeen(header))
            self._cancel(stream, response.watch_id, effects)
            self._create(stream, registration, effects)
        else:
            registration.watch_id = response.watch_id
            registration.own_refused = 0
            stream.by_id[response.watch_id] = registration
            if registration.next_revision is None and header.revision > 0:
                registration.next_revision = registration.now = header.revision
            effects.append(
                HeaderSeen(header) if registration.announced else WatchReceived(registration.watch, response)
            )
            registration.announced = True
        if stream.tested and stream.live and not stream.unanswered:
            self._clear_suspects(stream, effects)

    def _create_refused(
        self, stream: WatchStream, registration: Registration, status: int, text: str, effects: list[WatchEffect]
    ) -> None:
        """Handle a refused create: end the watch, or retry with its own token if the proxy's own user was refused."""
        if not stream.own or not is_auth_refusal(status, text):
            effects.append(WatchLost(registration.watch, status, text))
            self._forget(registration, effects)
            return
        self._leave(registration, effects)
        registration.own_refused += 1
        if status == Status.PERMISSION_DENIED:
            registration.own_refused = _OWN_REFUSED_MAX
        if registration.own_refused < _OWN_REFUSED_MAX:
            effects.append(self._token_refused(stream))
        else:
            self._register(registration, effects)

    def _received_unknown(self, stream: WatchStream, response: WatchResponse, effects: list[WatchEffect]) -> None:
        """Handle a response without a live id: a progress answer, or a late response of a cancelled id."""
        watch_id = response.watch_id
        if watch_id == PROGRESS_ID and not (response.events or response.canceled or response.created):
            progress_answered(stream, response.header, effects)
            return
        if watch_id not in stream.canceled_ids:
            # An unknown id: cancel it, as clientv3 does, instead of receiving its events without end.
            if not response.canceled and watch_id >= 0:
                self._cancel(stream, watch_id, effects)
        elif response.canceled and not response.compact_revision:
            stream.canceled_ids.discard(watch_id)
        effects.append(HeaderSeen(response.header))

    def _canceled(
        self, stream: WatchStream, registration: Registration, response: WatchResponse, effects: list[WatchEffect]
    ) -> None:
        """Handle a watch that the server has cancelled."""
        compact_revision = response.compact_revision
        if not compact_revision:
            status, text = read_reason(response.cancel_reason)
            self._unlink(stream, registration)
            effects.append(HeaderSeen(response.header))
            effects.append(WatchLost(registration.watch, status, text or "the upstream server cancelled the watch"))
            self._forget(registration, effects)
            return
        self.newest_revision = max(self.newest_revision, compact_revision)
        next_revision = registration.next_revision or 0
        if next_revision == registration.now:
            next_revision += 1
        if next_revision >= compact_revision and not response.cancel_reason:
            # Only the start was compacted, not a needed revision: see the module's docstring. A compaction gives no
            # reason; another proxy gives one when the store has another history than before.
            registration.next_revision = next_revision
            watch_id = response.watch_id
            self._unlink(stream, registration)
            self._cancel(stream, watch_id, effects)
            self._create(stream, registration, effects)
            return
        effects.append(WatchReceived(registration.watch, response))
        # etcd keeps the id until it is cancelled, and drops all progress requests until then.
        self._forget(registration, effects)

    def _piece(
        self, stream: WatchStream, registration: Registration, response: WatchResponse, effects: list[WatchEffect]
    ) -> None:
        """Handle events within a run of pieces."""
        held_bytes = pass_on_piece(stream, registration, response, effects)
        if held_bytes > self._held_bytes_max:
            text = f"watchmux: a revision larger than the maximum ({held_bytes} vs. {self._held_bytes_max} bytes)"
            effects.append(WatchLost(registration.watch, Status.RESOURCE_EXHAUSTED, text))
            self._forget(registration, effects)

    def _register(self, registration: Registration, effects: list[WatchEffect]) -> None:
        """Send the create of a registration without a stream, on the stream it belongs to."""
        watch = registration.watch
        token = self.own_token
        own = token is not None and not watch.is_backfill and registration.own_refused < _OWN_REFUSED_MAX
        if not own:
            token = watch.token
        start = registration.next_revision
        kind = kind_of(registration, is_live=start is None or self._skips(start))
        stream = self._streams.find(kind, token, registration.group)
        if stream is None:
            if kind is StreamKind.SUSPECT and self._streams.is_full(kind):
                self._suspects.waiting = True
                return
            if self._streams.is_full(kind):
                kind = StreamKind.SHARED
            stream = WatchStream(token, kind, own, registration.group)
            self._streams.add(stream)
            effects.append(OpenStream(stream))
            if stream.tested:
                send_probe(stream, 0, effects)
        registration.stream = stream
        stream.paused = registration.paused
        stream.live += 1
        if stream.tested and not stream.answered:
            stream.waiting.append(registration)
        else:
            self._create(stream, registration, effects)

    def _skips(self, start: int) -> bool:
        """Whether no revision from `start` on is known to be written."""
        return 0 < self.newest_revision < start

    def _create(self, stream: WatchStream, registration: Registration, effects: list[WatchEffect]) -> None:
        """Send a create from the registration's position; from now, if that is above the newest known revision.

        Without fragments: in etcd (sendFragments in api/v3rpc/watch.go) the time for a fragment grows with the square
        of its number of events, while all other responses on the stream wait. `feed` reads large responses in pieces.
        """
        start = registration.next_revision
        skips = start is not None and self._skips(start)
        if skips:
            start = None
        stream.creating.append(SentCreate(registration, stream.requested, skips=skips))
        watch = registration.watch
        interval = watch.key, watch.range_end
        message = encode_create(
            *(interval if self.namespace is None else self.namespace.interval(*interval)),
            start_revision=start,
            prev_kv=watch.prev_kv,
            progress_notify=True,
        )
        effects.append(WriteMessage(stream, message))

    def _unlink(self, stream: WatchStream, registration: Registration) -> None:
        """Release the id of a live registration."""
        if registration.watch_id is not None:
            del stream.by_id[registration.watch_id]
            stream.held.pop(registration.watch_id, None)
            registration.watch_id = None

    def _cancel(self, stream: WatchStream, watch_id: int, effects: list[WatchEffect]) -> None:
        stream.canceled_ids.add(watch_id)
        effects.append(WriteMessage(stream, encode_cancel(watch_id)))

    def _forget(self, registration: Registration, effects: list[WatchEffect]) -> None:
        """End a watch: cancel its id, or the whole stream if it was the last watch on it."""
        self._registrations.remove(registration)
        self._leave(registration, effects)

    def _leave(self, registration: Registration, effects: list[WatchEffect]) -> None:
        """Remove a registration from its stream."""
        stream = registration.stream
        if stream is None:
            return
        watch_id = registration.watch_id
        self._unlink(stream, registration)
        registration.stream = None
        stream.live -= 1
        if stream.live == 0:
            self._drop(stream)
            effects.append(CloseStream(stream))
            self._next_suspects(effects)
        elif watch_id is not None:
            self._cancel(stream, watch_id, effects)

    def _drop(self, stream: WatchStream) -> None:
        """Remove a stream from every index; responses that still arrive on it find no watch."""
        stream.ended = True
        self._streams.remove(stream)
        stream.by_id.clear()
        stream.held.clear()
        stream.creating.clear()
        stream.waiting.clear()
        stream.live = 0
