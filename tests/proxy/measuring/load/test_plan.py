"""The load's plan: the requested numbers, evenly distributed, and the same every time."""

from __future__ import annotations

from collections import Counter

import pytest

from proxy.measuring.load.plan import LoadShape, deal, make_ranges, make_streams

SHAPE = LoadShape(watches=1000, ranges=10, streams=200, channels=40, processes=2, pause_s=2.0)


def test_all_watches_are_distributed_evenly() -> None:
    streams = make_streams(SHAPE, [5, 6, 7])
    watches = [watch for stream in streams for watch in stream.watches]
    assert len(watches) == 1000
    assert {len(stream.watches) for stream in streams} == {5}
    assert set(Counter(watch.range for watch in watches).values()) == {100}
    assert len({stream.channel for stream in streams}) == 40
    for stream in streams:
        assert len({watch.range for watch in stream.watches}) == len(stream.watches)


def test_the_plan_has_past_starts_options_and_a_slow_stream() -> None:
    streams = make_streams(SHAPE, [5, 6, 7])
    watches = [watch for stream in streams for watch in stream.watches]
    assert {watch.start_revision for watch in watches} == {0, 5, 6, 7}
    assert sum(watch.start_revision > 0 for watch in watches) == 200
    for having in ("no_put", "no_delete", "prev_kv"):
        count = sum(getattr(watch, having) for watch in watches)
        assert 50 < count < 500
    assert not any(watch.no_put and watch.no_delete for watch in watches)
    assert [stream.pause_s for stream in streams if stream.pause_s] == [2.0]


def test_every_range_has_watches_with_each_option() -> None:
    watches = [watch for stream in make_streams(SHAPE, [5]) for watch in stream.watches]
    for having in ("no_put", "no_delete", "prev_kv", "start_revision"):
        assert {watch.range for watch in watches if getattr(watch, having)} == set(range(10))


def test_a_plain_load_has_no_options() -> None:
    shape = LoadShape(watches=30, ranges=3, streams=10, channels=2, plain=True)
    watches = [watch for stream in make_streams(shape, [1]) for watch in stream.watches]
    assert {(watch.start_revision, watch.no_put, watch.no_delete, watch.prev_kv) for watch in watches} == {
        (0, False, False, False)
    }


def test_the_plan_is_the_same_every_time() -> None:
    assert make_streams(SHAPE, [1, 2]) == make_streams(SHAPE, [1, 2])


def test_ranges_are_prefixes_and_single_keys_that_do_not_overlap() -> None:
    ranges = make_ranges(b"/x/", LoadShape(ranges=8))
    assert [bool(span.range_end) for span in ranges] == [True, True, True, False] * 2
    for span in ranges:
        for other in ranges:
            if other is not span:
                end = span.range_end or span.key + b"\0"
                assert not any(span.key <= key < end for key in other.keys(3))
        end = span.range_end or span.key + b"\0"
        assert all(span.key <= key < end for key in span.keys(16))


def test_unique_keys_have_one_watch_each() -> None:
    shape = LoadShape(watches=1000, ranges=1000, streams=200, unique=True)
    watches = [watch for stream in make_streams(shape, []) for watch in stream.watches]
    assert sorted(watch.range for watch in watches) == list(range(1000))
    ranges = make_ranges(b"/x/", shape)
    assert len({span.key for span in ranges}) == 1000
    assert not any(span.range_end for span in ranges)
    assert shape.title == "1,000 watches over unique keys"


@pytest.mark.parametrize("processes", [1, 2, 3, 100])
def test_streams_of_a_channel_stay_in_one_process(processes: int) -> None:
    streams = make_streams(SHAPE, [])
    parts = deal(streams, processes)
    assert sum(len(part) for part in parts) == 200
    assert all(parts)
    homes: dict[int, set[int]] = {}
    for number, part in enumerate(parts):
        for stream in part:
            homes.setdefault(stream.channel, set()).add(number)
    assert all(len(home) == 1 for home in homes.values())
