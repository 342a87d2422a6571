"""Finding an etcd for watches: connect, read its status; the first good answer wins.

A connection is used for watches only after its server has answered Maintenance.Status: its version decides whether
manual progress requests can be trusted, and the answer gives the revision of its store and whether it has a leader. All
endpoints are tried concurrently, slightly staggered, so that an endpoint that does not answer delays no other.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from proto.etcd_errors import is_auth_refusal
from proto.fields import ScanError
from proto.framing import Status
from proto.messages import MemberStatus, decode_status
from proto.scan import Header
from upstream.connecting import connect
from upstream.connection import ClientConnection, NotSent
from upstream.endpoints import Backoff, Endpoint
from upstream.errors import CallFailed, Unreachable
from upstream.fitness import STATUS_PATH
from upstream.problems import WATCHES, EndpointProblems
from upstream.settings import WATCH_LIMITS, UpstreamSettings
from upstream.unary import Metadata, call_unary
from upstream.watch_route import LoopOfProxies, Route, RouteIds, parse, shown, unusable, up_to
from upstream.watching.lineage import RaftPosition

_VERSION: Final = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")


def has_ordered_progress(version: str) -> bool:
    """Whether an etcd of this version answers manual progress requests in order with events, for quiet watches too.

    Fixed in 3.4.31 and 3.5.13 (etcd pull requests 15237, 17563 and their backports).
    """
    match = _VERSION.match(version)
    if match is None:
        return False
    numbers = (int(match[1]), int(match[2]), int(match[3] or 0))
    return numbers >= (3, 5, 13) or (3, 4, 31) <= numbers < (3, 5, 0)


def _position_of(status: MemberStatus) -> RaftPosition:
    return RaftPosition(status.header, status.raft_applied_index, status.raft_index)


async def read_position(connection: ClientConnection, timeout_s: float) -> RaftPosition | None:
    """Read a server's position from its status; None when it does not answer."""
    try:
        answer, _ = await call_unary(connection, STATUS_PATH, b"", (), timeout_s)
        return _position_of(decode_status(answer))
    except (NotSent, CallFailed, ScanError):
        return None


class ServerInUse(NamedTuple):
    """The server that carries the watches: its endpoint, version and member id; "" and 0 if it did not report them."""

    endpoint: str
    version: str
    member_id: int


class Server:
    """A server that answered, and its status."""

    def __init__(self, target: Target, connection: ClientConnection) -> None:
        self.target = target
        self.connection = connection
        # From its status, such as "3.5.30"; "" when it refused to give it.
        self.version = ""
        self.ordered_progress = False
        # From its status; None when it refused to give it.
        self.header: Header | None = None
        self.position: RaftPosition | None = None
        # It knows a leader; assumed when it refused to give its status.
        self.has_leader = True

    @property
    def in_use(self) -> ServerInUse:
        """Return its description."""
        return ServerInUse(self.target.endpoint.text, self.version, self.header.member_id if self.header else 0)


class Examined(NamedTuple):
    """What is wrong with endpoints that have answered; "" if nothing is."""

    # The problem of one that leads back to this proxy.
    loop: str
    # One that belongs to another cluster than the watched one.
    foreign: str


class Target:
    """One endpoint, and its state between attempts."""

    def __init__(self, endpoint: Endpoint, settings: UpstreamSettings, is_proxy: bool = False) -> None:
        self.endpoint = endpoint
        # It is one of --watch-endpoints.
        self.is_proxy = is_proxy
        self.backoff = Backoff(settings.backoff_first_s, settings.backoff_max_s)
        self.settings = settings.connection
        # When it may be tried again, in loop time.
        self.not_before = 0.0
        # How often it has failed.
        self.turn = 0
        # It has failed since the present search began.
        self.tried = False
        # Its last answer was that it has no leader.
        self.leaderless = False
        # Where it leads, while it has no server.
        self.route: Route = ()
        # The addresses by which it leads back to this proxy; "" if it does not.
        self.loop = ""
        # Its last answer was that it has no Watch service.
        self.unimplemented = False

    def failed(self, now: float) -> None:
        """Record a failure, and set when the endpoint may be tried again."""
        self.tried = True
        self.turn += 1
        self.not_before = now + self.backoff.failed(now)


class Dialer:
    """Tries the endpoints until one serves."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        tls: ssl.SSLContext | None,
        settings: UpstreamSettings,
        problems: EndpointProblems,
        ids: RouteIds | None = None,
        *,
        are_proxies: bool = False,
    ) -> None:
        """`problems`: where the problems of endpoints are logged. `ids`: of this proxy.

        `are_proxies`: the endpoints are proxies whose watches must have a server.
        """
        self._ids = ids or RouteIds()
        self.targets = [Target(endpoint, settings, are_proxies) for endpoint in endpoints]
        self._tls = tls
        self._settings = settings
        self._problems = problems
        # Targets in the order of attempts: the one that worked last is first.
        self._order = list(self.targets)
        # Attempts and connections that ended at a limit, by its name.
        self.timeouts = Counter(dict.fromkeys(WATCH_LIMITS, 0))
        # Set, and replaced, when the endpoints change.
        self.changed = asyncio.Event()

    def set_endpoints(self, endpoints: Sequence[Endpoint], are_proxies: bool) -> None:
        """Replace the endpoints; those that stay what they are keep their state. A search in progress restarts."""
        for target in self.targets:
            self.works(target)
        known = {target.endpoint: target for target in self.targets if target.is_proxy == are_proxies}
        self.targets = [known.get(endpoint) or Target(endpoint, self._settings, are_proxies) for endpoint in endpoints]
        self._order = list(self.targets)
        self.changed.set()
        self.changed = asyncio.Event()

    @property
    def onward(self) -> Route:
        """The address that is tried for watches, and the route from there; one in a loop if there is one."""
        known = sorted((target for target in self.targets if target.route), key=lambda target: not target.loop)
        return (known[0].endpoint.text, *known[0].route) if known else ()

    @property
    def loop(self) -> str:
        """The problem of proxies that take their watches from each other; "" when there is none."""
        found = next((target for target in self.targets if target.loop), None)
        if found is None:
            return ""
        flag = "--watch-endpoints" if found.is_proxy else "--endpoints"
        return f"watchmux: watches lead back to this proxy, in a loop: {found.loop}; check {flag}"

    @property
    def looping(self) -> list[str]:
        """The endpoints at which calls lead back to this proxy, as far as searches have found them."""
        return [each.endpoint.text for each in self.targets if each.loop and not each.is_proxy]

    async def examine(self, endpoints: Sequence[Endpoint], cluster_id: int, *, are_proxies: bool) -> Examined:
        """Try each endpoint once; those that do not answer are left out. `cluster_id`: the watched one; 0: any."""
        loop = asyncio.get_running_loop()
        targets = [Target(endpoint, self._settings, are_proxies) for endpoint in endpoints]
        attempts = [loop.create_task(self.attempt(target)) for target in targets]
        try:
            answers = await asyncio.gather(*attempts, return_exceptions=True)
        finally:
            _close_found(attempts)
        headers = [(answer.target, answer.header) for answer in answers if isinstance(answer, Server)]
        foreign = [each.endpoint.text for each, seen in headers if seen and cluster_id not in (0, seen.cluster_id)]
        loops = [str(answer) for answer in answers if isinstance(answer, LoopOfProxies)]
        return Examined(next(iter(loops), ""), next(iter(foreign), ""))

    async def dial(self, accept: Callable[[Server], bool], on_failure: Callable[[], None]) -> Server:
        """Try all endpoints concurrently, each repeatedly with backoff, until `accept` is true for a server.

        `on_failure` is called after each failed attempt.
        """
        while True:
            winner = await self._search(accept, on_failure)
            if winner is not None and winner.target in self.targets:
                self.prefer(winner.target)
                return winner
            if winner is not None:
                winner.connection.close()

    async def dial_unless(
        self, accept: Callable[[Server], bool], on_failure: Callable[[], None], *events: asyncio.Event
    ) -> Server | None:
        """Search as `dial` does; None when one of the events is set before."""
        loop = asyncio.get_running_loop()
        search = loop.create_task(self.dial(accept, on_failure))
        change = loop.create_task(any_of(*events))
        try:
            await asyncio.wait((search, change), return_when=asyncio.FIRST_COMPLETED)
            return search.result() if search.done() else None
        finally:
            change.cancel()
            search.cancel()
            await asyncio.gather(change, search, return_exceptions=True)

    async def _search(self, accept: Callable[[Server], bool], on_failure: Callable[[], None]) -> Server | None:
        """Search as `dial` does; None when the endpoints change before."""
        loop = asyncio.get_running_loop()
        for target in self.targets:
            target.tried = False
        tasks = [
            loop.create_task(self._attempts(target, rank, accept, on_failure))
            for rank, target in enumerate(self._order)
        ]
        changed = loop.create_task(self.changed.wait())
        winner: Server | None = None
        try:
            done, _ = await asyncio.wait((*tasks, changed), return_when=asyncio.FIRST_COMPLETED)
            winner = next((task.result() for task in tasks if task in done), None)
        finally:
            changed.cancel()
            await self._discard(tasks, winner)
        return winner

    def prefer(self, target: Target) -> None:
        """Try this endpoint first in the next search."""
        self._order.remove(target)
        self._order.insert(0, target)

    def count(self, failure: Unreachable) -> None:
        """Count an endpoint that was given up at a limit."""
        if failure.limit:
            self.timeouts[failure.limit] += 1

    def problem(self, target: Target, text: str) -> None:
        """Log an endpoint's problem, unless it is known."""
        self._problems.met(WATCHES, target.endpoint.text, text)

    def works(self, target: Target) -> None:
        """Note that a target can be used."""
        self._problems.over(WATCHES, target.endpoint.text)

    async def _discard(self, tasks: list[asyncio.Task[Server]], winner: Server | None) -> None:
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
        except asyncio.CancelledError:
            # The search itself was cancelled: the winner is not used.
            winner = None
            raise
        finally:
            _close_found(tasks, winner)

    async def _attempts(
        self, target: Target, rank: int, accept: Callable[[Server], bool], on_failure: Callable[[], None]
    ) -> Server:
        loop = asyncio.get_running_loop()
        delay_s = rank * self._settings.stagger_s
        while True:
            await asyncio.sleep(max(delay_s, target.not_before - loop.time()))
            delay_s = 0.0
            try:
                server = await self.attempt(target)
            except Unreachable as error:
                self.count(error)
                target.failed(loop.time())
                self.problem(target, str(error))
            else:
                if accept(server):
                    # Another endpoint may fail before the search ends: this one is not without a leader.
                    target.tried = False
                    return server
                server.connection.close()
                target.failed(loop.time())
                self.problem(
                    target, f"{target.endpoint.text}: it has no leader; check the other members of the cluster"
                )
            on_failure()

    async def attempt(self, target: Target) -> Server:
        """Connect to an endpoint and read the server's status. Raises Unreachable."""
        target.loop, target.route = "", ()
        connection = await connect(target.endpoint, self._tls, target.settings, turn=target.turn)
        server = Server(target, connection)
        try:
            await self._ask(server)
        except BaseException:
            connection.close()
            raise
        return server

    @property
    def has_route(self) -> bool:
        """The endpoints are proxies, and there is more than one."""
        return len(self.targets) > 1 and self.targets[0].is_proxy

    async def read_status(self, target: Target, connection: ClientConnection) -> bytes:
        """Read the status of the server that this connection to a target leads to. Raises NotSent, CallFailed."""
        asks: Metadata = self._ids.metadata(target.is_proxy)
        return (await call_unary(connection, STATUS_PATH, b"", asks, self._settings.status_timeout_s))[0]

    def without_server(self, target: Target, route: Route) -> Unreachable:
        """Record that a target leads to no server; return the problem, with the loop if it is in one."""
        where, own_id = target.endpoint.text, self._ids.own(target.is_proxy)
        own = up_to(route, own_id)
        target.route, target.loop = own or route, shown(where, own) if own else ""
        return unusable(where, target.route, own_id, target.is_proxy)

    async def _ask(self, server: Server) -> None:
        """Read a server's status. Raises Unreachable when it cannot be used for watches."""
        where = server.target.endpoint.text
        try:
            status = decode_status(await self.read_status(server.target, server.connection))
        except NotSent as error:
            raise Unreachable(where, str(error), "check that etcd runs there") from None
        except ScanError:
            raise Unreachable(where, "its status cannot be read", "check that it is an etcd") from None
        except CallFailed as error:
            if is_auth_refusal(error.status, error.text):
                # Only releases that have ordered progress require a token here.
                server.ordered_progress = True
                return
            if error.status == Status.UNIMPLEMENTED and server.connection.healthy:
                return
            if not server.connection.healthy and server.connection.failure is not None:
                raise server.connection.failure from None
            if route := parse(error.text):
                raise self.without_server(server.target, route) from None
            limit = "status_timeout_s" if error.status == Status.DEADLINE_EXCEEDED else ""
            what = f"it did not return its status ({error})"
            raise Unreachable(where, what, "check that etcd is up", limit) from None
        if status.is_learner:
            raise Unreachable(where, "it is a learner, which serves no watches", "promote it or leave it out")
        server.version = status.version
        server.ordered_progress = has_ordered_progress(status.version)
        server.position = _position_of(status)
        server.header = server.position.header
        server.has_leader = status.leader != 0
        server.target.leaderless = not server.has_leader


async def any_of(*events: asyncio.Event) -> None:
    """Wait until one of the events is set."""
    loop = asyncio.get_running_loop()
    waits = [loop.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


def _close_found(attempts: Sequence[asyncio.Task[Server]], kept: Server | None = None) -> None:
    """Close the servers found, except `kept`; cancelled attempts have closed their own connections."""
    for task in attempts:
        if task.done() and not task.cancelled() and task.exception() is None and task.result() is not kept:
            task.result().connection.close()
