"""The engine: the only driver of the core.

The core (`coalesce`) is a value: inputs go in, effects come back. The engine passes it the requests of clients (from
`service`), the responses of etcd (from `upstream.watching.client`) and the time, and carries out the effects in order:
those that write to clients by `delivery`. Inputs never nest: an input that arises meanwhile waits in the inbox, so the
core gets one at a time, without a lock.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from coalesce.core import Coalescer
from coalesce.effects import (
    CheckPermission,
    CloseUpstream,
    Deliver,
    Effect,
    EndSession,
    OpenUpstream,
    PauseUpstream,
    ReadRevision,
    RequestProgress,
    ResumeUpstream,
    Send,
    TakeRequests,
)
from coalesce.ending import OTHER_HISTORY
from coalesce.inputs import CreateRefusal, CreateRequest, Identity, UpstreamLost
from coalesce.limits import CoreLimits
from coalesce.model import PendingCreate, PendingRead, Session, Upstream
from proto.framing import Status
from proto.scan import Header, WatchResponse
from proxy import logs
from proxy.auth.model import Outcome, PermissionCheck
from proxy.auth.queries import RevisionRead
from proxy.auth.reads import AuthReader
from proxy.watch.delivery import Delivery
from proxy.watch.outlets import Outlet, Output
from upstream.watching.stream import OpenedWatch

log = logs.logger("engine")


class UpstreamWatches(Protocol):
    """The part of `upstream.watching.client.WatchClient` that the engine uses."""

    @property
    def newest_revision(self) -> int: ...
    @property
    def ordered_progress(self) -> bool: ...
    @property
    def leaderless(self) -> bool: ...
    def watch_leader(self) -> None: ...
    @property
    def own_token(self) -> bytes | None: ...
    def open(self, watch: OpenedWatch) -> None: ...
    def close(self, watch: OpenedWatch) -> None: ...
    def pause(self, watch: OpenedWatch) -> None: ...
    def resume(self, watch: OpenedWatch) -> None: ...
    def request_progress(self, number: int, watches: Iterable[OpenedWatch]) -> None: ...
    def revision_regressed(self, revision: int) -> None: ...
    def check_history(self) -> None: ...


@dataclass(slots=True)
class EngineStats:
    """Counts since the start, of events that only the engine sees."""

    upstream_paused: int = 0
    """Times a backfill was paused because its clients could not keep up."""

    upstream_lost: int = 0
    upstream_broken: int = 0
    """Times the connection that carries the watches broke."""

    upstream_resumed: int = 0
    """Times a connection for the watches was established, the first one included."""

    went_back: int = 0
    """Times the store was found to have another history than before."""

    failures: int = 0
    """Times the core failed by a bug and was restarted."""


class Engine:
    """Drives one Coalescer. Create it in the running event loop; call `attach` before the first client."""

    def __init__(self, core: Coalescer, reader: AuthReader, output: Output) -> None:
        self.core = core
        self.stats = EngineStats()
        self.delivery = delivery = Delivery(core, output)
        self.failed: Callable[[], None] | None = None
        """Ends every session, by `Outlet.end`, when the core has failed."""

        self.upstream_changed: Callable[[], None] | None = None
        """Called when the connection that carries the watches is lost or established."""

        self._reader = reader
        self._output = output
        self._loop = asyncio.get_running_loop()
        self._upstream: UpstreamWatches | None = None
        self._inbox: deque[tuple[Callable[..., list[Effect]], tuple[Any, ...]]] = deque()
        self._busy = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._arming = False
        """The timer will be set at the end of this turn."""
        self._stopped = False
        reader.listener = self
        self._open: dict[Upstream, None] = {}
        self._cover_problems: dict[bytes, str] = {}
        """The newest problem that was logged, by cover."""
        self._carry_out: dict[type, Callable[[Any], None]] = {
            Deliver: delivery.deliver,
            Send: delivery.send,
            TakeRequests: lambda effect: effect.session.outlet.take_requests(),
            EndSession: lambda effect: effect.session.outlet.end(effect.status, effect.text),
            OpenUpstream: self._open_upstream,
            CloseUpstream: self._close_upstream,
            PauseUpstream: self._pause_upstream,
            ResumeUpstream: lambda effect: self._client().resume(effect.upstream),
            ReadRevision: lambda effect: reader.read(RevisionRead(effect.read)),
            CheckPermission: lambda effect: reader.check(PermissionCheck.of(effect.check)),
            RequestProgress: lambda effect: self._client().request_progress(effect.number, effect.upstreams),
        }

    def attach(self, upstream: UpstreamWatches) -> None:
        """Set the watch client for upstream watches; that client has the engine as its listener."""
        self._upstream = upstream

    def has_no_leader(self, find_out: bool = True) -> bool:
        """Whether no endpoint of etcd is known to have a leader; `find_out`: the watch client checks from now on."""
        if find_out:
            self._client().watch_leader()
        return self._client().leaderless

    def set_limits(self, limits: CoreLimits) -> None:
        """Replace the limits of the core."""
        self.core.limits = limits
        self._input(self.core.expire)

    def stop(self) -> None:
        """Accept no more inputs."""
        self._stopped = True
        self._reader.stop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # clients (the Watch service)

    def open_session(self, outlet: Outlet, identity: Identity) -> Session:
        """Open a session whose answers go to `outlet`. This has no effects, so it does not wait in the inbox."""
        return self.core.open_session(outlet, identity, self._loop.time())

    def create(self, session: Session, request: CreateRequest) -> None:
        """A client creates a watch."""
        auth_off = self._reader.admit(session, (request.key or b"\x00", request.range_end))
        if auth_off is None:
            self._input(self.core.create, session, request)
        else:
            self._input(self.core.create_admitted, session, request, auth_off)

    def cancel(self, session: Session, watch_id: int) -> None:
        """A client cancels a watch."""
        self._input(self.core.cancel, session, watch_id)

    def progress(self, session: Session) -> None:
        """A client requests progress."""
        self._input(self.core.progress, session)

    def close(self, session: Session) -> None:
        """A client's stream has ended."""
        self._reader.session_over(session)
        self._input(self.core.close, session)

    def abandon(self, session: Session) -> None:
        """A session of a core that failed has been ended; answers to its queries are ignored."""
        session.ended = True
        self._reader.session_over(session)

    def drained(self, session: Session, room_bytes: int) -> None:
        """A client has read everything that waited for it, and now takes so many bytes."""
        self._input(self.core.drained, session, room_bytes)

    # etcd (the listener of `upstream.watching.client.WatchClient`)

    def received(self, watch: Upstream, response: WatchResponse) -> None:
        """An upstream watch received a response."""
        if response.canceled:
            self._open.pop(watch, None)
            if response.cancel_reason == OTHER_HISTORY and not watch.closed:
                # Another proxy says so, which has detected it before this one could. Once, for all watches.
                self.other_history(response.header)
            self._input(self.core.upstream_response, watch, response)
            self._report_covers()
            return
        if self._busy or self._stopped:
            self._input(self.core.upstream_response, watch, response)
            return
        # The same as in `_input`, except that each client gets one write at the end, and the payload of a read that
        # brought only one is written at once.
        output = self._output
        if output.on_written is not None:
            self.delivery.received_at = time.perf_counter()
        self._busy = True
        try:
            effects = self.core.upstream_response(watch, response, self._loop.time())
            if len(effects) != 1 or output.corks or not self.delivery.deliver_alone(effects[0]):
                output.cork()
                try:
                    for effect in effects:
                        self._carry_out[type(effect)](effect)
                finally:
                    output.uncork()
            if self._inbox:
                self._empty_inbox()
        except Exception:
            self._start_over()
        finally:
            self._busy = False
            self.delivery.received_at = 0.0
        if self.core.deadline_moved:
            self._arm()

    def progressed(self, watches: Iterable[Upstream], header: Header, number: int) -> None:
        """Watches are complete through the header's revision, as of the progress request with this number."""
        self._input(self.core.upstream_progress, watches, header, number)

    def lost(self, watch: Upstream, status: int, text: str) -> None:
        """An upstream watch has ended for good."""
        self.stats.upstream_lost += 1
        self._open.pop(watch, None)
        log.warning("upstream watch ended", key=watch.key, status=status, reason=text)
        self._input(self.core.upstream_lost, watch, UpstreamLost(status, text))
        self._report_covers()

    def _report_covers(self) -> None:
        """Log covers that etcd refuses, once for each reason."""
        for prefix, stats in self.core.stats.covers.items():
            if stats.problem and self._cover_problems.get(prefix) != stats.problem:
                self._cover_problems[prefix] = stats.problem
                log.warning(
                    "etcd refuses a cover; its ranges have upstream watches of their own",
                    cover=prefix,
                    problem=stats.problem,
                    remedy="with auth, --user must be allowed to read the whole prefix; tried again every minute",
                )

    def no_leader(self) -> None:
        """No endpoint has a leader."""
        self._input(self.core.no_leader)

    def header_seen(self, header: Header) -> None:
        """A newer header arrived with any answer. This has no effects."""
        self.core.header_seen(header)

    def other_history(self, header: Header) -> None:
        """The store upstream has been replaced by one with another history."""
        self._reader.other_history(header)
        self.went_back(header)

    def broken(self) -> None:
        """The connection is lost; the watch client resumes by itself."""
        self._reader.broken()
        self.stats.upstream_broken += 1
        if self.upstream_changed is not None:
            self.upstream_changed()

    def resumed(self) -> None:
        """A connection is established, maybe to another member, or to a store restored from a snapshot."""
        self.stats.upstream_resumed += 1
        self.core.ordered_progress = self._client().ordered_progress
        if self.upstream_changed is not None:
            self.upstream_changed()
        self._reader.connected(self._open)

    def calls_resumed(self) -> None:
        """Calls reach etcd again; the connection for the watches leads to a proxy, and may have outlived a restore."""
        self._client().check_history()
        self._reader.connected(self._open)

    # driving

    def _input(self, step: Callable[..., list[Effect]], *arguments: Any) -> None:
        """Pass one input to the core and carry out its effects, then do the same with inputs that arose meanwhile."""
        if self._busy:
            self._inbox.append((step, arguments))
            return
        if self._stopped:
            return
        self._busy = True
        try:
            for effect in step(*arguments, self._loop.time()):
                self._carry_out[type(effect)](effect)
            if self._inbox:
                self._empty_inbox()
        except Exception:
            self._start_over()
        finally:
            self._busy = False
        if self.core.deadline_moved and not self._arming:
            # Once for all inputs of a turn: it takes as long as a tenth of a create.
            self._arming = True
            self._loop.call_soon(self._arm_again)

    def _empty_inbox(self) -> None:
        while self._inbox:
            step, arguments = self._inbox.popleft()
            for effect in step(*arguments, self._loop.time()):
                self._carry_out[type(effect)](effect)

    def _start_over(self) -> None:
        """Replace a core that failed by a bug, and end all of its sessions; called in the exception handler.

        The state of the failed core may be wrong, so continuing with it might lose events silently. Clients reconnect
        by themselves and resume from the exact revision that they have.
        """
        self.stats.failures += 1
        log.exception("core failed; ending all watch sessions and restarting the core")
        header = self.core.header
        self.core = self.delivery.core = Coalescer(self.core.limits, self.core.ordered_progress)
        if header is not None:
            self.core.header_seen(header)
        self._inbox.clear()
        upstreams, self._open = self._open, {}
        for upstream in upstreams:
            self._client().close(upstream)
        if self.failed is not None:
            self.failed()

    def _arm_again(self) -> None:
        """Set the timer after the inputs of a turn."""
        self._arming = False
        if self.core.deadline_moved and not self._stopped:
            self._arm()

    def _arm(self) -> None:
        """Set the timer to the core's next deadline. If the deadline moved later, the timer fires early, harmlessly."""
        deadline = self.core.next_deadline()
        if deadline is None:
            return
        timer = self._timer
        if timer is not None:
            if self._timer_at <= deadline:
                return
            timer.cancel()
        self._timer_at = deadline
        self._timer = self._loop.call_at(deadline, self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        deadline = self.core.next_deadline()
        if deadline is not None and deadline <= self._loop.time():
            self._input(self.core.expire)
        if not self._stopped:
            self._arm()

    # carrying out

    def end_session(self, session: Session, status: int, text: str) -> None:
        """End a session for a reason that the core does not know."""
        outlet: Outlet = session.outlet
        outlet.end(status, text)
        self.close(session)

    def _open_upstream(self, effect: OpenUpstream) -> None:
        self._open[effect.upstream] = None
        self._client().open(effect.upstream)

    def _close_upstream(self, effect: CloseUpstream) -> None:
        self._open.pop(effect.upstream, None)
        self._client().close(effect.upstream)

    def _pause_upstream(self, effect: PauseUpstream) -> None:
        self.stats.upstream_paused += 1
        self._client().pause(effect.upstream)

    # reads (the listener of `AuthReader`)

    @property
    def newest_revision(self) -> int:
        """The newest revision that the watches have seen."""
        return self._client().newest_revision

    @property
    def own_token(self) -> bytes | None:
        """The token of the proxy's own user, which it may also read with."""
        return self._client().own_token

    def permission(self, create: PendingCreate, outcome: Outcome) -> None:
        """The permission check of a create has its outcome."""
        self._input(self.core.permission, create, outcome)

    def revision_read(self, read: PendingRead, header: Header) -> None:
        """A read of the revision is answered; a core that has been replaced since is not the one that wants it."""
        self._input(self.core.revision_read, read, header)

    def not_authorized(self, session: Session, refusal: CreateRefusal) -> None:
        """End a session that was admitted while auth was off or whose permission was revoked: it has to reconnect."""
        self.end_session(session, Status.UNAVAILABLE, f"watchmux: not authorized any more: {refusal.text}")

    def went_back(self, header: Header) -> None:
        """The store's revision went backwards, or the store was replaced."""
        self.stats.went_back += 1
        self._client().revision_regressed(header.revision)
        self._input(self.core.other_history, header)

    def _client(self) -> UpstreamWatches:
        assert self._upstream is not None, "attach() comes before the first client"
        return self._upstream
