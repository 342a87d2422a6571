"""The benchmarks count correctly: the expected events, the markers in the bytes, the tables."""

from __future__ import annotations

import asyncio
import socket
import time
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest

from proto.pb import kv_pb2, rpc_pb2
from tests.bench import report, several
from tests.bench.arrivals import Arrivals
from tests.bench.caller import stamped
from tests.bench.cases import CASES, OLD_PEER, VARIANTS, WITH_SEVERAL, Case, Kind
from tests.bench.load import Client, Crowd, Tally, quantile_ms, watch
from tests.bench.measure import Results
from tests.bench.profiles import DATA, PING, WINDOW_UPDATE, CCore, GrpcGo, GrpcJs, frame
from tests.bench.wire import MARKER, frames, message_frame
from tests.etcd.server import HOST
from tests.waiting import LIMIT_S


def test_each_watch_of_a_range_gets_each_write() -> None:
    assert CASES["burst"].expected() == 1000 * 300
    assert CASES["ranges"].expected() == 2000 * 10
    assert CASES["catch-up"].expected() == 1000 * 10_000
    assert Case("odd", "", 1, 3, ranges=2, writes=3).expected() == 2 + 1 + 2


def test_mixed_watches_get_the_events_their_options_allow() -> None:
    case = Case("mixed", "", 1, len(VARIANTS), writes=3, behind=6, mixed=True)
    assert case.expected() == sum(variant.events for variant in VARIANTS)
    # Earlier writes, here twice as many, are sent to watches that start at the first one.
    assert case.expected(early=True) == 2 * sum(variant.events for variant in VARIANTS if variant.from_start)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_cases_are_complete(case: Case) -> None:
    assert set(case.targets) <= set(WITH_SEVERAL)
    assert not case.mixed or (case.writes % 3 == 0 and case.behind % 3 == 0)
    if case.kind is Kind.CALLS:
        assert case.in_flight % case.connections == 0
    else:
        assert case.streams >= case.connections


def answer(size: int) -> bytes:
    """Return a response with one event whose value has a stamp at its start and one at its end."""
    value = stamped(size) + stamped(0)
    event = kv_pb2.Event(kv=kv_pb2.KeyValue(key=b"k", value=value))
    return rpc_pb2.WatchResponse(events=[event]).SerializeToString()


@pytest.mark.parametrize("chunk", [1, 7, 1000, 100_000])
def test_stamps_cut_anywhere_are_found(chunk: int) -> None:
    """Cut by frames of a large message, and by reads."""
    tally = Tally(2, 0, 8)
    client = Client(tally, Case("any", "", 1, 2))
    client.transport = cast(Any, SimpleNamespace(write=bytes.__len__))
    created = message_frame(1, rpc_pb2.WatchResponse(created=True).SerializeToString())[9:]
    large = message_frame(1, answer(30_000))[9:]
    # The answers to two creates in frames that are cut between and inside the messages.
    wire = frame(DATA, 0, 1, created + created[:3]) + frame(DATA, 0, 1, created[3:])
    # The last cut goes through the marker of the last stamp; small windows cut anywhere, also between two messages.
    last = [len(large) - 22, len(large)]
    for cuts in ([0, *last], [0, 8000, *last], [0, 8000, 16_000, *last]):
        for start, end in pairwise(cuts):
            wire += frame(DATA, 0, 1, large[start:end])
    small = message_frame(1, answer(40))[9:]
    cut = small.rindex(MARKER) + 2
    wire += frame(DATA, 0, 1, small[:cut]) + frame(DATA, 0, 1, small[cut:])
    for start in range(0, len(wire), chunk):
        client.data_received(wire[start : start + chunk])
    assert (tally.created, tally.stamps) == (2, 8)
    assert tally.complete.is_set()
    assert 0 <= quantile_ms(tally.delays, 1.0) < 60_000


async def test_a_delay_ends_when_the_bytes_arrive() -> None:
    """The kernel begins to stamp packets a moment after the first socket has asked for it."""
    loop = asyncio.get_running_loop()
    arrivals = Arrivals()
    reads: asyncio.Queue[tuple[bytes, int, int]] = asyncio.Queue()
    with socket.create_server((HOST, 0)) as listener:
        transport, _ = await loop.create_connection(asyncio.Protocol, *listener.getsockname())
        peer, _ = listener.accept()
        with peer:
            number = arrivals.read(transport, lambda *read: reads.put_nowait(read))
            deadline, arrived_ns, read_from_ns = loop.time() + LIMIT_S, 0, 0
            while arrived_ns >= read_from_ns and loop.time() < deadline:
                arrivals.pause(number)
                peer.sendall(b"event")
                read_from_ns = time.monotonic_ns()
                arrivals.resume(number)
                data, arrived_ns, now = await reads.get()
            arrivals.close(number)
            transport.abort()
    assert data == b"event"
    assert arrived_ns < read_from_ns < now


async def test_creates_that_never_come_end_at_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    orders = asyncio.StreamReader()
    orders.feed_eof()
    case = Case("silent", "", 1, 1, at_a_time=1, limit_s=0.05)
    with socket.create_server((HOST, 0)) as silent:
        host, port = silent.getsockname()
        crowd = Crowd(case, host, (port,), ("", ""))
        await watch(case, crowd, orders)
        crowd.go()
    assert '{"ready": false, "created": 0,' in capsys.readouterr().out


def kinds_of(data: bytes) -> list[tuple[int, int]]:
    """Return (kind, stream) of each frame."""
    return [(kind, stream) for kind, _, stream, _, _ in frames(data)]


def test_grpc_go_pings_once_per_round_trip() -> None:
    profile = GrpcGo()
    assert kinds_of(profile.received({1: 100})) == [(WINDOW_UPDATE, 0), (PING, 0)]
    assert profile.received({1: 100}) == b""
    # A quarter of the windows of 64 KiB is used.
    assert kinds_of(profile.received({1: 16_383})) == [(WINDOW_UPDATE, 1), (WINDOW_UPDATE, 0)]
    profile.acknowledged()
    assert kinds_of(profile.received({1: 100})) == [(WINDOW_UPDATE, 0), (PING, 0)]


def test_other_profiles_send_less() -> None:
    core, js = CCore(), GrpcJs()
    assert kinds_of(core.received({1: 100, 3: 50})) == [
        (WINDOW_UPDATE, 0),
        (WINDOW_UPDATE, 1),
        (WINDOW_UPDATE, 3),
        (PING, 0),
    ]
    assert core.received({1: 100}) == b""
    assert js.received({1: 30_000}) == b""
    assert kinds_of(js.received({3: 3000})) == [(WINDOW_UPDATE, 0)]


def test_tables_show_ratios_and_missed_goals() -> None:
    figures = {"cpu_us": 2.0, "p50_ms": 1.0, "p99_ms": 8.0, "memory_mib": 50.0, "lost": 0.0}
    results: Results = {
        "burst": {"grpc-proxy": figures, "watchmux": {**figures, "cpu_us": 0.5, "lost": 3.0}},
    }
    assert "| **burst** | grpc-proxy | 2.00 |" in report.markdown_of(results)
    assert "|  | watchmux | 0.50 (0.25) |" in report.markdown_of(results)
    assert (
        "| burst | 0.250 of 0.20 **missed** | 1.000 of 0.45 **missed** | 1.000 of 0.45 **missed** |"
        in report.goals_of(results)
    )
    assert report.clients_of(results) == ""
    clients = report.clients_of({"single-c-core": results["burst"]})
    assert "| single-c-core | C-core | 0.250 | 1.000 | 1.000 |" in clients
    results["burst"]["grpc-proxy-3.4"] = {**figures, "cpu_us": 5.0}
    assert "| burst | 0.100 of 0.20 |" in report.goals_of(results, OLD_PEER)
    assert len(report.tables_of(results)) == 1
    assert report.median_of([{"cpu_us": 1.0}, {"cpu_us": 9.0}, {"cpu_us": 2.0}]) == {"cpu_us": 2.0}


def test_bounds_apply_to_watchmux_alone() -> None:
    costs = {"scale-10": 30.0, "scale-100": 4.0, "scale-1000": 1.0, "scale-10000": 1.5}
    results: Results = {name: {"watchmux": {"cpu_us": cost, "lost": 0.0}} for name, cost in costs.items()}
    results["idle"] = {"watchmux": {"create_s": 0.5}, "grpc-proxy": {"create_s": 9.0}}
    results["idle-watches"] = {"watchmux": {"memory_mib": 300.5}}
    results["burst"] = {"watchmux": {"lost": 2.0}, "grpc-proxy": {"lost": 7.0}}
    assert report.bounds_of(results).splitlines()[2:] == [
        "| seconds until 10,000 watches are there | 0.50 | 3 |",
        "| MiB for 100,000 watches on 1,000 streams | 300.50 **missed** | 300 |",
        "| CPU of an event with ten times the watches, at most times | 1.50 **missed** | 1.2 |",
        "| events lost and calls failed, all cases together | 2.00 **missed** | 0 |",
    ]


def workers(cpu_us: float, hub_us: float, worker_us: float) -> dict[str, float]:
    return {"cpu_us": cpu_us, "parent_us": 0.0, "hub_us": hub_us, "worker_us": worker_us}


def test_costs_of_workers_follow_from_two_fan_outs() -> None:
    # One process: 300 us + 1 us a delivery; a worker: 200 us + 1 us a delivery; the hub: 100 us.
    results: Results = {
        "scale-100": {"watchmux": {"cpu_us": 4.0}, "watchmux-workers": workers(6.0, 100, 250)},
        "scale-10000": {"watchmux": {"cpu_us": 1.03}, "watchmux-workers": workers(1.05, 100, 5200)},
    }
    costs = several.costs_of(results)["50 streams on a connection"]
    assert costs.of(2, 1000) == pytest.approx(100 + 2 * 200 + 1000)
    # 500 + n = 1.25 * (300 + n)
    assert costs.clients_for(1.25, 2) == pytest.approx(500)
    assert costs.speedup(4, 10_000) == pytest.approx(4 * 10_300 / 10_900)
    assert (
        "| 50 streams on a connection | 300 + 1.00 a delivery | 100 | 200 + 1.00 a delivery |"
        in several.calculated_of(results)
    )
    assert several.calculated_of({}) == ""


def test_two_workers_are_judged_by_one_process() -> None:
    one = {"cpu_us": 1.0, "p50_ms": 2.0, "pss_mib": 28.0}
    two = {**workers(1.5, 50, 60), "least_share": 0.7, "p50_ms": 2.4, "pss_mib": 65.0}
    by_target = {"watchmux": one, "watchmux-workers": two, "watchmux-twice": {"cpu_us": 1.3}}
    floors = {"floor": {"cpu_us": 0.5}, "floor-workers": {"cpu_us": 0.7}}
    table = several.measured_of({"paced": by_target, "burst": by_target | floors})
    cpu, rest = "1.00 | 1.50 (1.50 of 1.25 **missed**)", "0 + 50 + 60 | 0.70 **missed** | 2.00 | 2.40 | 28.0 | 65.0 |"
    assert table.splitlines()[2:] == [
        f"| paced | {cpu} |  | 1.30 (1.30) |  | {rest}",
        f"| burst | {cpu} |  | 1.30 (1.30) | 0.70 (1.40) | {rest}",
    ]
