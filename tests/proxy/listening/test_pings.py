"""Keep-alive enforcement: clients may ping as often as grpc-go's servers allow, and not more often."""

from __future__ import annotations

from collections import Counter

import pytest

from proxy.listening.pings import IDLE_MIN_S, PingPolicy
from proxy.listening.settings import ListenerSettings
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct, proxy_for
from tests.etcd.server import EtcdServer
from tests.waiting import until_async


def pings(policy: PingPolicy, *sent: tuple[float, int, bool]) -> list[bool]:
    """Return the results of pings: (time, progress at that time, whether streams are open)."""
    return [policy.too_many(*ping) for ping in sent]


def test_pings_at_the_allowed_interval_are_accepted() -> None:
    assert not any(pings(PingPolicy(5.0), *((5.0 * number, 7, True) for number in range(1000))))


def test_third_early_ping_is_too_many() -> None:
    """As in grpc-go: the first ping is free, and two strikes are tolerated."""
    assert pings(PingPolicy(5.0), *((4.99 * number, 7, True) for number in range(4))) == [False, False, False, True]


def test_output_between_pings_resets_the_strikes() -> None:
    assert not any(pings(PingPolicy(5.0), *((0.1 * number, number // 3, True) for number in range(100))))


def test_pings_without_streams_need_two_hours_between() -> None:
    assert not any(pings(PingPolicy(5.0), *((IDLE_MIN_S * number, 7, False) for number in range(9))))
    assert pings(PingPolicy(5.0), *((7000.0 * number, 7, False) for number in range(4)))[-1]


@pytest.mark.parametrize("with_stream", [True, False])
async def test_client_that_pings_too_often_gets_goaway(etcd: EtcdServer, with_stream: bool) -> None:
    async with (
        proxy_for(etcd, listener=ListenerSettings(reason_s=0.1)) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port) as good,
        await RawClient.connect(proxy.port) as bad,
    ):
        stream = await good.open_watch(b"a")
        if with_stream:
            await bad.open_watch(b"b")
        for number in range(3):
            bad.h2.ping(b"%08d" % number)
            bad.flush()
            await until_async(lambda: len(bad.pings) == number + 1, "the answer")  # noqa: B023  # called at once
        bad.h2.ping(b"the last")
        bad.flush()
        await until_async(lambda: bad.lost, "the end")
        assert (bad.goaways[-1].error_code, bad.goaways[-1].additional_data) == (11, b"too_many_pings")
        assert +proxy.listener.stats.cut_off == Counter(["too_many_pings"])
        for number in range(20):
            good.h2.ping(b"%08d" % number)
            good.flush()
            await store.put(b"a", b"%d" % number)
            await until_async(lambda: len(stream.values) == number + 1, "the event")  # noqa: B023  # called at once
        assert not good.lost
