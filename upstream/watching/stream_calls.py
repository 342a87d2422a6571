"""The effects of `WatchState`, carried out: its streams are Watch calls at the server in use.

What arrives on a call passes through the state to the listener within the same function call, without a task or a
future. After a call has ended, `choice` decides where its watches register again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from proto import etcd_errors
from proto.framing import Status
from proto.scan import WatchResponse, scan_watch_response
from upstream.connections import Connections
from upstream.credentials import Credentials
from upstream.dial import Dialer, Server
from upstream.errors import CallFailed, Logger
from upstream.settings import UpstreamSettings
from upstream.unary import HAS_LEADER, Metadata
from upstream.watching import effects as watch_effects
from upstream.watching.call import UpstreamWatchCall
from upstream.watching.choice import on_stream_end
from upstream.watching.listener import WatchListener
from upstream.watching.own_user import OwnUserLogin
from upstream.watching.places import StreamPlaces
from upstream.watching.state import WatchState
from upstream.watching.stream import StreamEndAction, WatchStream
from upstream.watching.unanswered import UnansweredCreates


class StreamCalls:
    """See the module; the `CallOwner` of the calls."""

    def __init__(
        self,
        state: WatchState,
        dialer: Dialer,
        listener: WatchListener[Any],
        settings: UpstreamSettings,
        log: Logger,
        credentials: Credentials | None,
        give_up: Callable[[Server, str], None],
    ) -> None:
        """`credentials`: of the proxy's own user. `give_up`: stop using this server, for this reason."""
        self._state = state
        self._dialer = dialer
        self._listener = listener
        self._settings = settings
        self._log = log
        self._give_up = give_up
        # Reads a response; with a namespace, all watches are in it.
        self.scan = scan_watch_response if state.namespace is None else state.namespace.scan
        # The connections to the server in use, and the streams that wait for a place there.
        self.places = places = StreamPlaces(self._metadata)
        self.own_user = OwnUserLogin(credentials, state, self.apply, places.own, settings.status_timeout_s, log)
        # Streams are opened with `hasleader`.
        self._needs_leader = True
        self._unanswered = UnansweredCreates(settings.create_timeout_s)
        # A pending registration of watches whose stream ended.
        self._register_timer: asyncio.TimerHandle | None = None
        # What exceeded a step of the state is to be done in the next turn of the loop.
        self._goes_on = False
        # DATA of watch streams read since the start, in bytes.
        self.received_bytes = 0

    @property
    def problem(self) -> str:
        """Why watches wait at the server in use; "" when they do not wait, or not for long."""
        return self._unanswered.problem or self.places.full

    def use(self, server: Server, connections: Connections, *, needs_leader: bool) -> None:
        """Open streams at this server from now on."""
        self._needs_leader = needs_leader
        self.places.use(server, connections)

    def close(self) -> None:
        """End all calls; nothing that arrives on them counts any more. Watches wait for the next server."""
        streams = list(self._state.streams())
        self._state.disconnect()
        self.apply([watch_effects.CloseStream(stream) for stream in streams])

    def leave(self) -> None:
        """End all calls and close the connections: the server is left."""
        self.own_user.leave()
        self._state.disconnect()
        self.places.leave()
        if self._register_timer is not None:
            self._register_timer.cancel()
            self._register_timer = None
        self._unanswered.streams = 0

    def apply(self, effects: list[watch_effects.WatchEffect]) -> None:
        """Carry out effects of the state."""
        listener = self._listener
        for effect in effects:
            match effect:
                case watch_effects.WatchReceived():
                    listener.received(effect.watch, effect.response)
                case watch_effects.WriteMessage():
                    shell = effect.stream.shell
                    if isinstance(shell, UpstreamWatchCall):
                        shell.write(effect.message)
                case watch_effects.Progressed():
                    listener.progressed(effect.watches, effect.header, effect.number)
                case watch_effects.HeaderSeen():
                    listener.header_seen(effect.header)
                case watch_effects.OpenStream():
                    self._open_stream(effect.stream)
                case watch_effects.CloseStream():
                    self.places.forget(effect.stream)
                    shell = effect.stream.shell
                    if isinstance(shell, UpstreamWatchCall):
                        shell.leave()
                case watch_effects.WatchLost():
                    listener.lost(effect.watch, effect.status, effect.text)
                case watch_effects.TokenRefused():
                    self.own_user.refused(effect.token, self.places.server)
        if self._state.goes_on and not self._goes_on:
            self._goes_on = True
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        self._goes_on = False
        self.apply(self._state.go_on())

    def take(self, stream: WatchStream, response: WatchResponse) -> None:
        """Handle a response that arrived on a stream."""
        watch = self._state.received_events(stream, response)
        if watch is not None:
            self._listener.received(watch, response)
        else:
            self.apply(self._state.received(stream, response))

    def _open_stream(self, stream: WatchStream) -> None:
        stream.shell = call = UpstreamWatchCall(self, stream, self._settings)
        self.places.open(stream, call)

    def _metadata(self, stream: WatchStream) -> Metadata:
        metadata: list[tuple[bytes, bytes]] = []
        if self._needs_leader:
            metadata.append(HAS_LEADER)
        if stream.token is not None:
            metadata.append((b"token", stream.token))
        return metadata

    def stream_ended(self, stream: WatchStream, status: int, text: str) -> None:
        """Handle a stream that the server ended: decide whether to retry it here, elsewhere, or not at all."""
        server = self.places.server
        if server is None or stream not in self._state.streams():
            return
        shell = stream.shell
        follows = on_stream_end(
            stream,
            status,
            text,
            server.target,
            self._dialer.targets,
            moved=isinstance(shell, UpstreamWatchCall) and shell.moved,
            healthy=self.places.alive,
            works=self._state.works,
            streams=self._state.streams(),
        )
        self.apply(self._state.over(stream, follows, status, text))
        if follows is StreamEndAction.MOVED:
            asyncio.get_running_loop().call_soon(self._register_moved)
        elif follows is StreamEndAction.HERE:
            self._register_later(server)
        elif follows is StreamEndAction.APART and self._register_timer is None:
            # Without a delay: each create is retried a bounded number of times.
            self._register_timer = asyncio.get_running_loop().call_later(0, self._register)
        elif follows is StreamEndAction.ELSEWHERE:
            self._give_up(server, f"it ended the watch stream: {CallFailed(status, text)}")

    def _register_moved(self) -> None:
        if self.places.server is not None and self._register_timer is None:
            self.apply(self._state.register())

    def _register_later(self, server: Server) -> None:
        """Register watches without a stream again, at this server: at once the first time, then with backoff."""
        if self._register_timer is None:
            loop = asyncio.get_running_loop()
            server.target.failed(loop.time())
            self._register_timer = loop.call_at(server.target.not_before, self._register)

    def _register(self) -> None:
        self._register_timer = None
        if self.places.server is not None:
            self.places.server.target.backoff.succeeded(asyncio.get_running_loop().time())
            self.apply(self._state.register())

    def look_at_creates(self) -> bool:
        """Report creates that stay unanswered, and give up the streams of those that have a token.

        Return whether `problem` may have changed.
        """
        before = self._unanswered.problem
        given_up, reported = self._unanswered.look(self._state.streams(), asyncio.get_running_loop().time())
        for _ in range(reported):
            self._dialer.timeouts["create_timeout_s"] += 1
            self._log.warning("etcd does not answer requests for watches", waited_s=self._settings.create_timeout_s)
        for stream in given_up:
            if isinstance(stream.shell, UpstreamWatchCall):
                stream.shell.leave()
            self.apply(self._state.refused(stream, Status.UNAUTHENTICATED, etcd_errors.INVALID_TOKEN))
        return before != self._unanswered.problem
