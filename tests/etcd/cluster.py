"""Three members of one cluster, with faults: suspended, cut off from the others, lagging.

Traffic between members goes through a relay in front of each. A connecting member names itself in the head of its first
request (X-Server-From, server/etcdserver/api/rafthttp), so the relays can cut one member off from the others.
"""

from __future__ import annotations

import asyncio
import re
import signal
import urllib.error
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from tests.etcd.binaries import EtcdBinary
from tests.etcd.server import HOST, EtcdServer
from tests.faults.relay import Fault, Relay, Way
from tests.waiting import until_async

HEARTBEAT_MS, ELECTION_MS = 25, 500
_FROM = re.compile(rb"X-Server-From: ([0-9a-f]+)\r\n", re.IGNORECASE)


class Member(EtcdServer):
    """One member of a cluster."""

    def __init__(self, name: str, binary: EtcdBinary | None = None, extra: Sequence[str] = ()) -> None:
        super().__init__(binary, extra)
        self.name = name
        self.relay = Relay(self.peer_port)
        """The relay that the others connect to."""
        self.flags: dict[str, str] = {}
        """Flags that replace those of a single etcd."""
        self.member_id = ""
        """Its name towards the others; "" until known."""
        self.still = False
        """Suspended by SIGSTOP."""

    def arguments(self) -> list[str]:
        kept = [text for text in super().arguments() if text.partition("=")[0] not in self.flags]
        return [*kept, *(f"{name}={value}" for name, value in self.flags.items())]

    @property
    def peer_url(self) -> str:
        """Its address for the others."""
        return f"http://{HOST}:{self.relay.port}"

    def hold_still(self) -> None:
        """Suspend it: its connections stay open, and silent."""
        self._signal(signal.SIGSTOP)
        self.still = True

    def go_on(self) -> None:
        """Resume it."""
        if self.still:
            self._signal(signal.SIGCONT)
            self.still = False

    def _signal(self, what: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(what)

    def metric(self, name: str) -> float | None:
        """Return one of its metrics; None while it does not answer."""
        try:
            return self.metrics().get(name)
        except (urllib.error.URLError, OSError):
            return None

    @property
    def has_leader(self) -> bool:
        """Whether it knows a leader."""
        return self.metric("etcd_server_has_leader") == 1.0

    @property
    def is_leader(self) -> bool:
        """Whether it is the leader."""
        return self.metric("etcd_server_is_leader") == 1.0


class Cluster:
    """Some members. Use `cluster`."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self._cut_off: set[str] = set()
        self._late: dict[str, Fault] = {}

    @property
    def endpoints(self) -> str:
        """The endpoints of all members, for a proxy."""
        return ",".join(member.endpoint for member in self.members)

    async def start(self) -> None:
        """Start all of them and wait until there is a leader."""
        for member in self.members:
            await member.relay.start()
            member.relay.where = lambda opening, way, to=member: self._fault(opening, way, to)  # type: ignore[misc]
        everyone = ",".join(f"{member.name}={member.peer_url}" for member in self.members)
        for member in self.members:
            member.flags |= {
                "--name": member.name,
                "--initial-advertise-peer-urls": member.peer_url,
                "--initial-cluster": everyone,
                "--heartbeat-interval": str(HEARTBEAT_MS),
                "--election-timeout": str(ELECTION_MS),
            }
        await asyncio.gather(*(asyncio.to_thread(member.start) for member in self.members))
        await self._learn_ids()

    async def stop(self) -> None:
        """Stop all of them."""
        for member in self.members:
            member.go_on()
            await asyncio.to_thread(member.__exit__, None, None, None)
            await member.relay.stop()

    async def _learn_ids(self) -> None:
        listed = await asyncio.to_thread(self.members[0].ctl, "member", "list")
        for line in listed.stdout.splitlines():
            parts = [part.strip() for part in line.split(",")]
            for member in self.members:
                if member.peer_url in parts:
                    member.member_id = parts[0]

    async def leader(self) -> Member:
        """Return the leader."""
        for_now: list[Member] = await until_async(
            lambda: [member for member in self.members if not member.still and member.is_leader], "a leader"
        )
        return for_now[0]

    def cut_off(self, member: Member) -> None:
        """Cut a member off from the others; its clients still reach it."""
        self._cut_off.add(member.member_id)
        for each in self.members:
            for link in tuple(each.relay.links):
                if self._is_cut(link.opening, each):
                    link.abort()

    def make_late(self, member: Member, seconds: float) -> None:
        """Delay all messages from the others to a member."""
        self._late[member.member_id] = Fault(delay_s=seconds)

    def mend(self) -> None:
        """End all faults between members."""
        self._cut_off.clear()
        self._late.clear()
        for member in self.members:
            for link in tuple(member.relay.links):
                if not link.opening:
                    link.abort()
            member.relay.flow()

    def _is_cut(self, opening: bytes, to: Member) -> bool:
        return to.member_id in self._cut_off or _sender(opening) in self._cut_off

    def _fault(self, opening: bytes, way: Way, to: Member) -> Fault | None:
        if self._is_cut(opening, to):
            return Fault(paused=True)
        # A member receives the others' posts, and the answers on the streams that it opens itself.
        hears = to.member_id if way is Way.THERE else _sender(opening)
        return self._late.get(hears)


def _sender(opening: bytes) -> str:
    match = _FROM.search(opening)
    return match[1].decode() if match is not None else ""


@asynccontextmanager
async def cluster(size: int = 3, binary: EtcdBinary | None = None, extra: Sequence[str] = ()) -> AsyncIterator[Cluster]:
    """Run a cluster in this event loop (its relays live there), with a leader."""
    made = Cluster([Member(f"m{number}", binary, extra) for number in range(size)])
    try:
        await made.start()
        await made.leader()
        yield made
    finally:
        await made.stop()
