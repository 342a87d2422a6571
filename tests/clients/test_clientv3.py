"""A real clientv3 sees the same through the proxy as at etcd itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.clients.clientv3 import Clientv3, Line
from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.cluster import Member, cluster
from tests.etcd.server import EtcdServer
from tests.proxy_process import ProxyProcess
from tests.waiting import until

NOTIFY_S = 2
NO_LEADER = "etcdserver: no leader"

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


PROXIES: dict[str, tuple[EtcdBinary, tuple[str, ...]]] = {
    **{each.name: (each, ()) for each in etcds()},
    "workers": (etcds()[0], ("--workers=2",)),
}
"""The etcd, and flags of the proxy."""


@pytest.fixture(params=PROXIES.values(), ids=list(PROXIES))
def ways(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Yield an etcd's own endpoint and that of a proxy in front of it."""
    binary, flags = request.param
    interval = f"--experimental-watch-progress-notify-interval={NOTIFY_S}s"
    with EtcdServer(binary, [interval]) as etcd, ProxyProcess(etcd.endpoint, flags) as proxy:
        yield etcd.endpoint, proxy.endpoint


def test_catch_up_headers_are_those_of_its_events(ways: tuple[str, str]) -> None:
    """At etcd they are the store's: one response, with the revision of a key outside the range."""
    with Clientv3("load", ways[0], "--calls=10", "--key=a", "--value-bytes=1000000") as load:
        load.wait()
    with Clientv3("load", ways[0], "--calls=1", "--key=z") as load:
        load.wait()
    seen = []
    for endpoint in ways:
        with Clientv3("watch", endpoint, "--key=a", "--prefix", "--rev=2", "--events=10") as watch:
            watch.wait()
        assert watch.events() == list(range(2, 12))
        seen.append([(line["revision"], line["revisions"][-1]) for line in watch.lines("response") if line["events"]])
    assert seen[0] == [(12, 11)]
    assert len(seen[1]) > 1
    assert all(header == last for header, last in seen[1])


def test_clientv3_sees_the_same_events(ways: tuple[str, str]) -> None:
    flags = ("--key=load", "--prefix", "--rev=1", "--events=120")
    with Clientv3("load", ways[1], "--workers=4", "--calls=10", "--mode=kubernetes") as load:
        load.wait()
    summary = load.summary()
    assert [summary[kind]["lost"] for kind in ("creates", "updates", "gets")] == [0, 0, 0]
    assert summary["tries_most"] == 1
    with Clientv3("load", ways[1], "--workers=4", "--calls=10") as load:
        load.wait()
    seen = []
    for endpoint in ways:
        with Clientv3("watch", endpoint, *flags) as watch:
            watch.wait()
        seen.append(watch.events())
    assert seen[0] == seen[1] == list(range(2, 122))


def test_clientv3_is_notified_at_the_interval_of_etcd(ways: tuple[str, str]) -> None:
    """Directly, through the proxy, and through two in a row; on a quiet key."""
    with ExitStack() as stack:
        second = stack.enter_context(ProxyProcess(ways[1])).endpoint
        flags = ("--key=quiet", "--progress-notify")
        watches = [stack.enter_context(Clientv3("watch", endpoint, *flags)) for endpoint in (*ways, second)]

        def progress(watch: Clientv3) -> list[float]:
            return [line["time"] for line in watch.lines() if line.get("progress")]

        until(lambda: all(len(progress(watch)) >= 4 for watch in watches), "four notifications each", 10 * NOTIFY_S)
        for watch in watches:
            revisions = [line["revision"] for line in watch.lines("response")]
            assert revisions == sorted(revisions)


def test_clientv3_is_answered_when_it_requests_progress() -> None:
    """On a quiet key, where etcd answers by itself; with writes elsewhere, whose revisions the answers reach."""
    with EtcdServer() as etcd, ProxyProcess(etcd.endpoint) as proxy, ExitStack() as stack:
        flags = ("--key=quiet", "--ask-progress=0.1")
        watches = [stack.enter_context(Clientv3("watch", end, *flags)) for end in (etcd.endpoint, proxy.endpoint)]
        for watch in watches:
            watch.until(lambda line: line.get("created"), "created")
        with Clientv3("load", etcd.endpoint, "--calls=20") as load:
            load.wait()
        for watch in watches:
            watch.until(lambda line: line.get("progress") and line["revision"] == 21, "progress of all writes")
            assert watch.events() == []


def test_clientv3_gets_a_catch_up_with_fragments_in_one(ways: tuple[str, str], request: pytest.FixtureRequest) -> None:
    """With --workers in several, each with whole revisions: the hub replays them to the worker in its own portions."""
    split = "workers" in request.node.name
    with Clientv3("load", ways[0], "--calls=10", "--key=a", "--value-bytes=1000000") as load:
        load.wait()
    for endpoint in ways:
        with Clientv3("watch", endpoint, "--key=a", "--prefix", "--rev=2", "--fragment", "--events=10") as watch:
            watch.wait()
        responses = [line["events"] for line in watch.lines("response") if line["events"]]
        assert sum(responses) == len(watch.events()) == 10
        assert responses == [10] or (split and endpoint == ways[1])


def then(watch: Clientv3, seen: int, found: Callable[[Line], Any], what: str) -> int:
    """Wait for a line after the first `seen` ones; return the number of lines up to it."""
    until(lambda: any(map(found, watch.lines()[seen:])), what, 30)
    return seen + 1 + next(place for place, line in enumerate(watch.lines()[seen:]) if found(line))


async def test_clientv3_that_requires_a_leader_is_refused_without_one() -> None:
    """Its watch ends when the leader is lost, and is served again after the election; other watches stay open."""

    def story(first: Member, others: list[Member], proxy: ProxyProcess, stack: ExitStack) -> None:
        flags = ("--key=a", "--rev=1", "--require-leader", "--again")
        ends = (first.endpoint, proxy.endpoint)
        watches = {stack.enter_context(Clientv3("watch", end, *flags)): 0 for end in ends}
        patient = stack.enter_context(Clientv3("watch", proxy.endpoint, "--key=a"))
        then(patient, 0, is_served, "created")
        for watch in watches:
            watches[watch] = then(watch, 0, is_served, "created")
        for member in others:
            member.kill()
        for watch, seen in watches.items():
            lost = then(watch, seen, has_no_leader, "the loss of the leader")
            watches[watch] = then(watch, lost, has_no_leader, "the refusal of another watch")
        for member in others:
            member.start()
        for watch, seen in watches.items():
            watches[watch] = then(watch, seen, is_served, "created")
        first.ctl("put", "a", "b")
        for watch, seen in watches.items():
            then(watch, seen, has_events, "the event")
        then(patient, 0, has_events, "the event")
        assert [line for line in patient.lines() if line.get("error")] == []

    async with cluster(3) as members:
        first, *others = members.members
        with ProxyProcess(first.endpoint) as proxy, ExitStack() as stack:
            await asyncio.to_thread(story, first, others, proxy, stack)


def is_served(line: Line) -> bool:
    """Return whether a watch was created."""
    return bool(line.get("created")) and not line["canceled"]


def has_no_leader(line: Line) -> bool:
    """Return whether a watch ended because there is no leader."""
    return bool(line.get("error") == NO_LEADER)


def has_events(line: Line) -> bool:
    """Return whether a response has events."""
    return bool(line["kind"] == "response" and line["events"])
