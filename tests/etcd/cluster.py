"""Three members of one cluster, and ways to make them a bad one: held still, cut off from the others, lagging.

What members say to each other goes through a relay in front of each. Who connects to a member says so in the head of
its first request (X-Server-From, server/etcdserver/api/rafthttp), so the relay can cut off one member of the others.
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
        """What the others connect to."""
        self.flags: dict[str, str] = {}
        """Flags that replace those of a single etcd."""
        self.member_id = ""
        """As it names itself to the others; "" until known."""
        self.still = False
        """Held by SIGSTOP."""

    def arguments(self) -> list[str]:
        kept = [text for text in super().arguments() if text.partition("=")[0] not in self.flags]
        return [*kept, *(f"{name}={value}" for name, value in self.flags.items())]

    @property
    def peer_url(self) -> str:
        """Where the others find it."""
        return f"http://{HOST}:{self.relay.port}"

    def hold_still(self) -> None:
        """Let it do nothing: its connections stay open, and silent."""
        self._signal(signal.SIGSTOP)
        self.still = True

    def go_on(self) -> None:
        """Let it go on."""
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
        """It knows of a leader."""
        return self.metric("etcd_server_has_leader") == 1.0

    @property
    def is_leader(self) -> bool:
        """It is the leader."""
        return self.metric("etcd_server_is_leader") == 1.0


class Cluster:
    """Some members. Use `cluster`."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self._cut_off: set[str] = set()
        self._late: dict[str, Fault] = {}

    @property
    def endpoints(self) -> str:
        """All of them, for a proxy."""
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
            lambda: [member for member in self.members if not member.still and member.is_leader], "a leader", 30
        )
        return for_now[0]

    def cut_off(self, member: Member) -> None:
        """Let a member and the others hear nothing of each other; its clients still reach it."""
        self._cut_off.add(member.member_id)
        for each in self.members:
            for link in tuple(each.relay.links):
                if self._is_cut(link.opening, each):
                    link.abort()

    def make_late(self, member: Member, seconds: float) -> None:
        """Have a member hear everything from the others later."""
        self._late[member.member_id] = Fault(delay_s=seconds)

    def mend(self) -> None:
        """Let all of them hear each other again."""
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
        # A member gets what the others post to it, and the answers to the streams that it opens itself.
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
