"""The simulator's side of the upstream watch client: the real `WatchState` on model connections that break.

The pure state of the watch client decides everything; the shell of the real one only moves bytes, and so does this
one: between each pair of its calls anything can go missing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from proto.scan import Header, WatchResponse
from tests.sim.model_store import Member
from tests.sim.model_stream import ServerStream
from tests.sim.store_member import StoreMember, StoreStream
from upstream.watching import effects as watch_effects
from upstream.watching.state import WatchState
from upstream.watching.stream import WatchStream

AnyMember = Member | StoreMember
AnyStream = ServerStream | StoreStream


@dataclass(slots=True)
class UpstreamShell:
    """One watch client: connected to one member at a time, or to none."""

    members: Sequence[AnyMember]
    channel_max: int
    permission: Callable[[bytes | None, bytes, bytes], str]
    # What to do with what the state says, as in upstream/watching/client.py.
    on_received: Callable[[Any, WatchResponse], None]
    on_progressed: Callable[[list[Any], Header, int], None]
    on_lost: Callable[[Any, int, str], None]
    on_header: Callable[[Header], None]
    on_connected: Callable[[bool], None]
    state: WatchState = field(default_factory=WatchState)
    member: AnyMember | None = None
    # Streams that ended alone: their watches wait to be registered again.
    unregistered: bool = False
    opened: int = 0
    breaks: int = 0
    _links: dict[WatchStream, AnyStream] = field(default_factory=dict)
    # How many responses of a paused stream are read all the same, since they had come before the pause.
    _in_flight: dict[WatchStream, int] = field(default_factory=dict)

    # what the engine calls

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

    def request_progress(self, number: int) -> None:
        """Ask for manual progress on every stream."""
        self._do(self.state.request_progress(number))

    def store_went_back(self, revision: int) -> None:
        """Note that the store is at an earlier revision than it was."""
        self.state.newest_revision = revision

    # what the network does

    def connect(self, rng: random.Random) -> None:
        """Connect to some member, which may lag."""
        self.member = rng.choice(self.members)
        self.on_connected(self.member.ordered_progress)
        self._do(self.state.connect(self.member.ordered_progress, self.member.revision))

    def disconnect(self) -> None:
        """Lose the connection with everything that was on its way."""
        self.breaks += 1
        self.member = None
        self.unregistered = False
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._in_flight.clear()
        self.state.disconnect()

    def end_stream(self, rng: random.Random) -> None:
        """Lose one stream."""
        if self._links:
            stream = rng.choice(list(self._links))
            self._links.pop(stream).close()
            self.state.ended(stream)
            self.unregistered = True
            self.breaks += 1

    def register(self, _: random.Random | None = None) -> None:
        """Register again what was on streams that ended."""
        self.unregistered = False
        self._do(self.state.register())

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
        """Append what can happen on the streams: requests and responses go on."""
        for stream, link in self._links.items():
            if link.can_receive:
                moves.append(link.receive)
            if link.can_send:
                moves.append(link.send)
            if link.out and self._is_read(stream):
                moves.append(partial(self.read, stream))

    def read(self, stream: WatchStream, _: random.Random | None = None) -> None:
        """Read one response, if there still is one."""
        link = self._links.get(stream)
        if link is None or not link.out or not self._is_read(stream):
            return
        if stream.paused:
            self._in_flight[stream] -= 1
        self._do(self.state.received(stream, link.out.popleft()))

    def _is_read(self, stream: WatchStream) -> bool:
        return not stream.paused or self._in_flight.get(stream, 0) > 0

    def _open(self, token: bytes | None) -> AnyStream:
        assert self.member is not None
        if isinstance(self.member, StoreMember):
            return self.member.open_stream(token, self.channel_max)
        link = ServerStream(self.member, self.channel_max)
        link.permission = partial(self.permission, token)
        return link

    def _do(self, effects: list[watch_effects.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, watch_effects.Write):
                link = self._links.get(effect.stream)
                if link is not None:
                    link.requests.append(effect.message)
            elif isinstance(effect, watch_effects.OpenStream):
                self._links[effect.stream] = self._open(effect.stream.token)
            elif isinstance(effect, watch_effects.CloseStream):
                link = self._links.pop(effect.stream, None)
                if link is not None:
                    link.close()
            elif isinstance(effect, watch_effects.Received):
                self.on_received(effect.watch, effect.response)
            elif isinstance(effect, watch_effects.Progressed):
                self.on_progressed(effect.watches, effect.header, effect.number)
            elif isinstance(effect, watch_effects.Lost):
                self.on_lost(effect.watch, effect.status, effect.text)
            elif isinstance(effect, watch_effects.TokenRefused):
                raise AssertionError("nobody here has given it a token of its own")
            else:
                self.on_header(effect.header)
