"""A real clientv3 sees through the proxy what it sees at etcd itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.clients.clientv3 import Clientv3
from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.cluster import cluster
from tests.etcd.server import EtcdServer
from tests.proxy.scenario import run
from tests.proxy_process import ProxyProcess
from tests.waiting import until

NOTIFY_S = 2
NO_LEADER = "etcdserver: no leader"

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(params=etcds(), ids=lambda binary: binary.name)
def ways(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Yield an etcd's own endpoint and that of a proxy in front of it."""
    binary: EtcdBinary = request.param
    interval = f"--experimental-watch-progress-notify-interval={NOTIFY_S}s"
    with EtcdServer(binary, [interval]) as etcd, ProxyProcess(etcd.endpoint) as proxy:
        yield etcd.endpoint, proxy.endpoint


def test_catch_up_headers_are_those_of_its_events(ways: tuple[str, str]) -> None:
    """At etcd they are the store's: one response, with the revision of a key outside of the range."""
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
    """On a quiet key, where etcd answers itself; with writes elsewhere, whose revisions the answers reach."""
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


def test_clientv3_gets_a_catch_up_with_fragments_in_one(ways: tuple[str, str]) -> None:
    with Clientv3("load", ways[0], "--calls=10", "--key=a", "--value-bytes=1000000") as load:
        load.wait()
    for endpoint in ways:
        with Clientv3("watch", endpoint, "--key=a", "--prefix", "--rev=2", "--fragment", "--events=10") as watch:
            watch.wait()
        assert [line["events"] for line in watch.lines("response") if line["events"]] == [10]


def test_clientv3_that_requires_a_leader_is_refused_without_one() -> None:
    """Its watch ends when the leader is lost, a new one ends at once, and one is served after the election."""

    async def scenario() -> None:
        async with cluster(3) as members:
            loop = asyncio.get_running_loop()
            first, *others = members.members
            with ProxyProcess(first.endpoint) as proxy, ExitStack() as stack:
                flags = ("--key=a", "--require-leader")
                ends = (first.endpoint, proxy.endpoint)
                open_before = [stack.enter_context(Clientv3("watch", end, *flags)) for end in ends]
                patient = stack.enter_context(Clientv3("watch", proxy.endpoint, "--key=a"))

                def without_a_leader() -> None:
                    for watch in (*open_before, patient):
                        watch.until(lambda line: line.get("created"), "created")
                    for member in others:
                        member.kill()
                    for watch in open_before:
                        watch.until(lambda line: line.get("error") == NO_LEADER, "the loss of the leader", 30)
                        watch.until(lambda line: line["kind"] == "closed", "its end")
                    for end in ends:
                        with Clientv3("watch", end, *flags) as refused:
                            refused.until(lambda line: line.get("error") == NO_LEADER, "the refusal", 30)

                def with_one_again() -> None:
                    until(lambda: first.has_leader, "the election", 30)
                    for end in ends:
                        with Clientv3("watch", end, *flags, "--again") as watch:
                            watch.until(lambda line: line.get("created") and not line["canceled"], "created", 30)
                            assert first.ctl("put", "a", "b")
                            watch.until(lambda line: line.get("events"), "the event", 30)
                    patient.until(lambda line: line.get("events"), "the event")

                await loop.run_in_executor(None, without_a_leader)
                await asyncio.gather(*(loop.run_in_executor(None, member.start) for member in others))
                await loop.run_in_executor(None, with_one_again)

    run(scenario(), 120)
