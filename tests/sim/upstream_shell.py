"""The simulator's shell of the upstream watch client: the real decisions, on model connections that break.

The pure parts of the watch client decide everything (`state`, `choice`, `lineage`); the real shell only moves bytes,
and so does this one: between any two of its calls data can be lost.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from proto.pb import rpc_pb2
from proto.scan import Header, WatchResponse, scan_watch_response
from tests.sim.failure import SimulationFailure
from tests.sim.model_store import Member
from tests.sim.model_stream import CLUSTER_ID, RAFT_TERM, ServerStream
from tests.sim.parts import REAL, Parts
from tests.sim.pieces import Pieces, in_fragments
from tests.sim.store_member import StoreMember, StoreStream
from upstream.watching import effects as watch_effects
from upstream.watching.stream import StreamEndAction, StreamKind, WatchStream

AnyMember = Member | StoreMember
AnyStream = ServerStream | StoreStream


NO_LEADER = "etcdserver: no leader"
UNAVAILABLE = 14
RESOURCE_EXHAUSTED = 8
# Statuses that end a stream but not its watches: network, stopping server, server without a Watch service, a text.
_ENDS = ((UNAVAILABLE, "gone"), (1, "etcdserver: server stopped"), (UNAVAILABLE, NO_LEADER), (13, "broken"))


@dataclass(slots=True, eq=False)
class Endpoint:
    """One endpoint and its known state: `upstream.dial.Target` without its timers."""

    member: AnyMember
    tried: bool = False
    leaderless: bool = False
    unimplemented: bool = False


@dataclass(slots=True)
class Callbacks:
    """Receives the client's output, as in upstream/watching/listener.py."""

    received: Callable[[Any, WatchResponse], None]
    progressed: Callable[[list[Any], Header, int], None]
    lost: Callable[[Any, int, str], None]
    header: Callable[[Header], None]
    resumed: Callable[[bool], None] = lambda _: None
    no_leader: Callable[[], None] = lambda: None
    other_history: Callable[[Header], None] = lambda _: None
    broken: Callable[[], None] = lambda: None


class UpstreamShell:
    """One watch client: connected to one member at a time, or to none."""

    def __init__(
        self,
        members: Sequence[AnyMember],
        channel_max: int,
        permission: Callable[[bytes | None, bytes, bytes], str],
        on: Callbacks,
        parts: Parts = REAL,
        has_leader: Callable[[AnyMember], bool] = lambda _: True,
        tells_status: bool = True,
        dice: random.Random | None = None,
        streams_max: tuple[int, int] = (1, 1),
        *,
        whole: bool = True,
        own_token: bytes | None = None,
    ) -> None:
        self.channel_max = channel_max
        self.permission = permission
        self.on = on
        self.state: Any = parts.watch_state.WatchState(
            streams_max={StreamKind.CATCH_UP: streams_max[0], StreamKind.LARGE: 1, StreamKind.SUSPECT: streams_max[1]}
        )
        self.state.own_token = own_token
        self.choice: Any = parts.choice.EndpointPolicy()
        self.lineage: Any = parts.lineage.HistoryTracker()
        self.endpoints = [Endpoint(member) for member in members]
        # The connected member, and the position that the member reported then.
        self.endpoint: Endpoint | None = None
        self.position: Any = None
        # Streams that ended alone: their watches wait to be registered again.
        self.unregistered = False
        self.opened = 0
        self.breaks = 0
        # Streams that wait for a place at the server until a further connection is open, and their requests.
        self.limited = False
        self._unopened: dict[WatchStream, list[bytes]] = {}
        # Streams on connections that are closing, maybe to another member than the new ones; in order, since the order
        # of a set would change from run to run.
        self._leaving: dict[WatchStream, None] = {}
        # Ranges whose create ends the whole stream, with the error text; how often each was tried.
        self.poisoned: set[tuple[bytes, bytes]] = set()
        self.poison_text = "grpc: received message larger than max"
        self.poisonings = 0
        # Endpoints that had no leader when asked, since the present search began.
        self._in_vain: set[int] = set()
        self._parts = parts
        self._late = random.Random(channel_max)
        self._joins = random.Random(channel_max)
        self._has_leader = has_leader
        self._tells_status = tells_status
        # For incidental draws, instead of the generator of the run.
        self._dice = dice
        # Whether servers send whole responses, as requested; otherwise as if fragments had been requested.
        self._whole = whole
        self._links: dict[WatchStream, AnyStream] = {}
        self._feeds: dict[WatchStream, Any] = {}
        # Streams with `hasleader`.
        self._led: dict[WatchStream, None] = {}
        # How many responses of a paused stream are still read, since they had arrived before the pause.
        self._in_flight: dict[WatchStream, int] = {}

    @property
    def member(self) -> AnyMember | None:
        """The connected member; None while disconnected."""
        return None if self.endpoint is None else self.endpoint.member

    # calls of the engine

    def open(self, upstream: Any) -> None:
        """Register an upstream watch."""
        self.opened += 1
        self._do(self.state.open(upstream))

    def close(self, upstream: Any) -> None:
        """Cancel an upstream watch."""
        self._do(self.state.close(upstream))

    def pause(self, upstream: Any, in_flight: int) -> None:
        """Stop reading a backfill, after `in_flight` more responses."""
        self.state.pause(upstream)
        registration = self.state.registration(upstream)
        if registration is not None and registration.stream is not None:
            self._in_flight[registration.stream] = in_flight

    def resume(self, upstream: Any) -> None:
        """Read a backfill again."""
        self.state.resume(upstream)

    def request_progress(self, number: int, watches: Any = None) -> None:
        """Request progress on every stream."""
        self._do(self.state.request_progress(number, watches))

    def store_went_back(self, revision: int) -> None:
        """Note that the store's revision has gone back."""
        self.state.newest_revision = revision
        if self.state.late_progress:
            # As in upstream/watching/failover.py: a proxy is left.
            self.lineage.went_back(None)
            self.disconnect()
        else:
            self.lineage.went_back(self.position if self.endpoint is not None else None)

    def set_endpoints(self, members: Sequence[AnyMember]) -> None:
        """Change the endpoints; the one in use serves until another one does."""
        known = {id(endpoint.member): endpoint for endpoint in self.endpoints}
        self.endpoints = [known.get(id(member)) or Endpoint(member) for member in members]

    # the network

    def connect(self, rng: random.Random) -> None:
        """Try an endpoint that has not failed yet; its member may lag, or have no leader."""
        untried = [endpoint for endpoint in self.endpoints if not endpoint.tried]
        endpoint = rng.choice(untried or self.endpoints)
        if self.choice.is_acceptable(self._seems_led(endpoint)):
            if self._recognise(rng, endpoint):
                self._use(endpoint)
            else:
                # As in upstream/watching/failover.py: a server was found, so the next search asks all endpoints again.
                self._search_again()
            return
        endpoint.tried = True
        self._in_vain.add(id(endpoint))
        if self.choice.failed(self.endpoints, False):
            if any(id(each) not in self._in_vain or not each.leaderless for each in self.endpoints):
                raise SimulationFailure("the client reports that no member has a leader, but not all have said so")
            self.on.no_leader()

    def _search_again(self) -> None:
        self._in_vain.clear()
        for each in self.endpoints:
            each.tried = False

    def _seems_led(self, endpoint: Endpoint) -> bool:
        """Return a member's report of its leader; a member without a report is assumed to have one."""
        led = not self._tells_status or self._has_leader(endpoint.member)
        endpoint.leaderless = not led
        return led

    def _where(self, rng: random.Random, member: AnyMember) -> Any:
        """Return a member's report of its position; None: no answer."""
        if not self._tells_status:
            return None
        header = Header.make(CLUSTER_ID, member.member_id, member.revision, RAFT_TERM)
        # The log's index was read a moment before the rest.
        dice = self._dice or rng
        committed = dice.choice((member.index, member.index + member.behind, max(1, member.index - dice.randint(0, 3))))
        return self._parts.lineage.RaftPosition(header, member.index, committed)

    def _recognise(self, rng: random.Random, endpoint: Endpoint) -> bool:
        """Check a new connection as upstream/watching/failover.py does, before any watch is registered there."""
        verdicts = self._parts.lineage.HistoryVerdict
        now = self._where(rng, endpoint.member)
        if self.lineage.check(now) is verdicts.SUSPECT:
            later = now._replace(committed=endpoint.member.index) if rng.random() < 0.9 else None
            verdict = self.lineage.check_again(now, later)
            if verdict is verdicts.OTHER:
                self.on.other_history(now.header)
                self.lineage.went_back(now)
            if verdict is verdicts.UNKNOWN:
                return False
        self.position = now
        return True

    def _use(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.choice.used(not endpoint.leaderless)
        self._search_again()
        ordered: bool = endpoint.member.ordered_progress
        revision = 0
        if self.position is not None:
            revision = self.position.header.revision
            self.on.header(self.position.header)
        self._do(self.state.connect(ordered, revision))
        self.on.resumed(ordered)

    def check(self) -> None:
        """Check that it is connected to a wanted member, once idle. Raises SimulationFailure."""
        led = [each for each in self.endpoints if self._has_leader(each.member)]
        if self.endpoint is not None and led and (self.endpoint not in self.endpoints or self.choice.leaderless):
            raise SimulationFailure("the client stays at a removed endpoint, or at one without a leader")

    def better(self) -> list[Endpoint]:
        """Return endpoints that could replace the one in use, when another one is wanted."""
        wanted = self.choice.wanted(self.endpoint in self.endpoints)
        if wanted is self._parts.choice.SearchGoal.NOTHING:
            return []
        return [each for each in self.endpoints if self.choice.is_better(wanted, self._seems_led(each))]

    def move_on(self, rng: random.Random) -> None:
        """Connect to a better endpoint."""
        better = self.better()
        if self.endpoint is not None and better:
            endpoint = rng.choice(better)
            if self._recognise(rng, endpoint):
                position = self.position
                self.disconnect()
                self.position = position
                self._use(endpoint)

    @property
    def is_check_due(self) -> bool:
        """Whether the position of the store must be read again."""
        return self.endpoint is not None and self.lineage.is_check_due(self.position, self.state.newest_revision)

    def check_history(self, rng: random.Random) -> None:
        """Read the position of the store in use again."""
        if self.endpoint is not None:
            self._recognise(rng, self.endpoint)

    def look_again(self, rng: random.Random) -> bool:
        """Read the position of the store in use again, if wanted; return whether that was enough."""
        if self.endpoint is None or not self.is_check_due:
            return False
        self._recognise(rng, self.endpoint)
        return not self.is_check_due

    def rotate(self, rng: random.Random) -> None:
        """
        Close the connection gracefully: its streams go on, and new ones start on another connection, maybe to another
        member, as behind a load balancer.
        """
        other = rng.choice(self.endpoints)
        if self.endpoint is None or not self.choice.is_acceptable(self._seems_led(other)):
            return
        if not self._recognise(rng, other):
            return
        self._leaving.update(dict.fromkeys(self._links))
        self.endpoint = other
        self.state.ordered_progress = other.member.ordered_progress
        if self.position is not None:
            self.state.note_revision(self.position.header.revision)
            self.on.header(self.position.header)
        self.on.resumed(other.member.ordered_progress)

    def end_leaving(self, rng: random.Random) -> None:
        """End a stream on a closing connection."""
        leaving = [stream for stream in self._leaving if stream in self._links]
        if leaving:
            self._end(rng.choice(leaving), UNAVAILABLE, "gone", moved=True)

    def lose_member(self, member: AnyMember) -> None:
        """End the connections to a lost member."""
        if self.member is member:
            self.disconnect()
        for stream in [stream for stream in self._leaving if stream in self._links]:
            if stream in self._links and self._links[stream].member is member:
                self._end(stream, UNAVAILABLE, "gone", moved=True)

    def open_waiting(self, _: random.Random | None = None) -> None:
        """Give a place to a waiting stream: trunks first, as in upstream/watching/places.py."""
        if self._unopened:
            stream = min(self._unopened, key=lambda each: each.kind is StreamKind.BACKFILL)
            requests = self._unopened.pop(stream)
            self._begin(stream)
            self._links[stream].requests.extend(requests)

    def end_leaderless(self, _: random.Random | None = None) -> None:
        """End the streams with `hasleader` at members without a leader."""
        for stream in list(self._led):
            if stream in self._links and not self._has_leader(self._links[stream].member):
                self._end(stream, UNAVAILABLE, NO_LEADER)

    def _end(self, stream: WatchStream, status: int, text: str, moved: bool = False) -> None:
        """End a stream with a status; the real code decides what follows. `moved`: its connection has ended."""
        endpoint = self.endpoint
        assert endpoint is not None, "streams are there while it is connected"
        follows = self._parts.choice.on_stream_end(
            stream,
            status,
            text,
            endpoint,
            self.endpoints,
            moved=moved,
            healthy=True,
            works=self.state.works,
            streams=self.state.streams(),
        )
        self._unlink(stream)
        self._led.pop(stream, None)
        self._leaving.pop(stream, None)
        self.breaks += 1
        self._do(self.state.over(stream, follows, status, text))
        self.unregistered = True
        if follows is StreamEndAction.ELSEWHERE:
            self.disconnect()

    def _unlink(self, stream: WatchStream) -> None:
        self._feeds.pop(stream, None)
        link = self._links.pop(stream, None)
        if link is not None:
            link.close()

    def disconnect(self) -> None:
        """Lose the connection with everything in flight."""
        self.breaks += 1
        self.endpoint = self.position = None
        self.unregistered = False
        for stream in list(self._links):
            self._unlink(stream)
        self._unopened.clear()
        self._leaving.clear()
        self._led.clear()
        self._in_flight.clear()
        self.state.disconnect()
        self.on.broken()

    def end_stream(self, rng: random.Random) -> None:
        """Lose one stream; not one that tests whether a create ends it, as that would give a false result."""
        if links := [stream for stream in self._links if not stream.tested]:
            stream = rng.choice(links)
            self._end(stream, *(self._dice or rng).choice(_ENDS))

    def register(self, _: random.Random | None = None) -> None:
        """Register the watches of ended streams again."""
        self.unregistered = False
        self._do(self.state.register())

    def go_on(self, _: random.Random | None = None) -> None:
        """Do more of what exceeded one step of the state."""
        self._do(self.state.go_on())

    def cancel_one(self, rng: random.Random, reason: str) -> None:
        """Have the server cancel one live watch with a reason."""
        live = [(link, watch_id) for stream, link in self._links.items() for watch_id in stream.by_id]
        if live:
            link, watch_id = rng.choice(live)
            link.cancel_with(watch_id, reason)

    def links(self) -> list[AnyStream]:
        """Return the server's ends of all streams."""
        return list(self._links.values())

    def add_moves(self, moves: list[Callable[[random.Random], None]]) -> None:
        """Append the possible moves: new connections, requests and responses."""
        if self.state.goes_on:
            moves.append(self.go_on)
        if self.endpoint is None:
            # A proxy without a server refuses other proxies (proxy/passthrough/route_status.py).
            if all(endpoint.member.has_server for endpoint in self.endpoints):
                moves.append(self.connect)
            return
        if self.unregistered:
            moves.append(self.register)
        if self._unopened:
            moves.append(self.open_waiting)
        if any(not self._has_leader(self._links[stream].member) for stream in self._led if stream in self._links):
            moves.append(self.end_leaderless)
        if (self.choice.leaderless or self.endpoint not in self.endpoints) and self.better():
            moves.append(self.move_on)
        for stream, link in self._links.items():
            if link.can_receive:
                moves.append(partial(self.receive, stream))
            if link.can_send:
                moves.append(link.send)
            if link.out and self._is_read(stream):
                moves.append(partial(self.read, stream))
            if self._feeds[stream].behind and not stream.paused:
                moves.append(partial(self.step, stream))

    def receive(self, stream: WatchStream, rng: random.Random) -> None:
        """Have the server handle a request, or end the stream because of it."""
        link = self._links.get(stream)
        if link is None:
            return
        if self.poisoned and link.requests:
            request = rpc_pb2.WatchRequest.FromString(link.requests[0])
            create = request.create_request
            if request.HasField("create_request") and (create.key, create.range_end) in self.poisoned:
                self.poisonings += 1
                self._end(stream, RESOURCE_EXHAUSTED, self.poison_text)
                return
        link.receive(rng)

    def read(self, stream: WatchStream, rng: random.Random) -> None:
        """Read one response, or several, if there still are any; a large one comes in pieces that others overtake."""
        feed = self._feeds.get(stream)
        if feed is None:
            return
        feed.feed(b"")
        # Only in some worlds: the other ones stay as they were.
        late = self._late if self.channel_max == 2 else None
        read = [self._read_one(stream, rng) for _ in range(1 if late is None else late.randint(1, 3))]
        responses = [response for response in read if response is not None]
        if late is not None and not stream.held and self._joins.random() < 0.3:
            # The server's own responses must not change.
            copies = [copy.copy(response) for response in responses]
            for each in copies:
                each.events = list(each.events)
            responses = self._parts.feed.joined(copies, lambda _: 1)
        # The turn has lasted too long for some of them.
        for response in feed.pass_on(
            responses,
            lambda _: late is not None and late.random() < 0.2,
        ):
            if stream in self._links:
                self._do(self.state.received(stream, response))

    def _read_one(self, stream: WatchStream, rng: random.Random) -> WatchResponse | None:
        """Read one response; None: it waits, or there is none."""
        link, feed = self._links[stream], self._feeds[stream]
        if not link.out or not self._is_read(stream):
            return None
        if stream.paused:
            self._in_flight[stream] -= 1
        response = link.out.popleft()
        dice = self._dice or rng
        count = len(response.events)
        if count > 1 and response.plain and dice.random() < 0.3:
            cuts = sorted(dice.sample(range(1, count), dice.randint(1, min(3, count - 1))))
            sizes = [high - low for low, high in zip([0, *cuts], [*cuts, count], strict=True)]
            # The server's own response must not change.
            whole = WatchResponse(response.header, response.watch_id, events=list(response.events))
            feed.begin(Pieces(whole, sizes))
            return None
        if not feed.waiting and self.channel_max == 2 and self._late.random() < 0.5:
            return response
        # As if something waited, so that answers to progress requests come late.
        return response if feed.passes(response) else None

    def step(self, stream: WatchStream, _: random.Random | None = None) -> None:
        """Take the next piece of a large response, or the responses that waited for it."""
        feed = self._feeds.get(stream)
        clients = 1 if self.channel_max == 2 and not stream.held else 0
        for response in feed.step(lambda _: clients) if feed is not None and not stream.paused else ():
            if stream in self._links:
                self._do(self.state.received(stream, response))

    def _is_read(self, stream: WatchStream) -> bool:
        return not stream.paused or self._in_flight.get(stream, 0) > 0

    def _begin(self, stream: WatchStream) -> None:
        self._links[stream] = self._open(stream.token)
        stream.ordered = self._links[stream].member.ordered_progress
        self._feeds[stream] = self._parts.feed.ResponseOrder(scan_watch_response, 1 << 20)
        if not self.choice.leaderless:
            self._led[stream] = None

    def _open(self, token: bytes | None) -> AnyStream:
        assert self.member is not None
        if not isinstance(self.member, Member):
            return self.member.open_stream(token, self.channel_max)
        link = ServerStream(self.member, self.channel_max)
        link.permission = partial(self.permission, token)
        return link

    def _do(self, effects: list[watch_effects.WatchEffect]) -> None:
        for effect in effects:
            match effect:
                case watch_effects.WriteMessage():
                    link = self._links.get(effect.stream)
                    if link is not None:
                        link.requests.append(effect.message if self._whole else in_fragments(effect.message))
                    elif effect.stream in self._unopened:
                        self._unopened[effect.stream].append(effect.message)
                case watch_effects.OpenStream():
                    if self.limited or self._unopened:
                        self._unopened[effect.stream] = []
                    else:
                        self._begin(effect.stream)
                case watch_effects.CloseStream():
                    self._unopened.pop(effect.stream, None)
                    self._unlink(effect.stream)
                    self._led.pop(effect.stream, None)
                    self._leaving.pop(effect.stream, None)
                case watch_effects.WatchReceived():
                    self.on.received(effect.watch, effect.response)
                case watch_effects.Progressed():
                    self.on.progressed(effect.watches, effect.header, effect.number)
                case watch_effects.WatchLost():
                    self.on.lost(effect.watch, effect.status, effect.text)
                case watch_effects.TokenRefused():
                    # A new login gives the same token.
                    self._do(self.state.logged_in(effect.token))
                case _:
                    self.on.header(effect.header)
