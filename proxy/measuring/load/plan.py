"""The plan of the load clients' watches: deterministic, made before anything runs.

The parent makes the plan, the client processes run it, and the judge reads it to know the request of each recorded
watch. It has no randomness: two runs, one directly and one through the proxy, make the same requests.
"""

from __future__ import annotations

import msgspec

from proxy.measuring.load.target import LoadTarget

ROOT = b"/watchmux-load/"
"""All keys of all loads are below this prefix."""

PAST_EVERY = 5
"""In the demo's plan every fifth watch starts in the past."""

SLOW_AFTER_MESSAGES = 20
"""The slow stream reads this many messages before it pauses: first it is in step, then it lags."""


class LoadRange(msgspec.Struct, frozen=True):
    """A range that many clients watch: a single key (`range_end` empty), or every key that starts with `key`."""

    key: bytes
    range_end: bytes

    def keys(self, count: int) -> list[bytes]:
        """Return the keys to write in the range: its single key, or `count` keys below the prefix."""
        return [self.key + b"%03d" % number for number in range(count)] if self.range_end else [self.key]


class PlannedWatch(msgspec.Struct, frozen=True):
    """One watch: the index of its range, its start (0: now), and its options as in WatchCreateRequest."""

    range: int
    start_revision: int = 0
    no_put: bool = False
    no_delete: bool = False
    prev_kv: bool = False


class PlannedStream(msgspec.Struct, frozen=True):
    """One Watch call: its watches in the order of their creates; streams with the same `channel` share a connection.

    `pause_s`: how long it stops reading, once, after SLOW_AFTER_MESSAGES messages; 0 for all but the slow stream.
    """

    channel: int
    watches: list[PlannedWatch]
    pause_s: float = 0.0


class ClientPlan(msgspec.Struct, frozen=True):
    """The plan of one client process: its streams to `target`, recorded in the file `record`."""

    target: LoadTarget
    ranges: list[LoadRange]
    streams: list[PlannedStream]
    record: str


class LoadShape(msgspec.Struct, frozen=True, kw_only=True):
    """The size of a load."""

    watches: int = 1000
    ranges: int = 10
    streams: int = 200
    channels: int = 40
    processes: int = 2
    pause_s: float = 0.0
    plain: bool = False
    """Every watch starts from now and has no options."""
    unique: bool = False
    """Every watch has a key of its own; then there are as many ranges as watches."""

    @property
    def title(self) -> str:
        """What is watched, for people."""
        ranges = "unique keys" if self.unique else f"{self.ranges} ranges"
        return f"{self.watches:,} watches over {ranges}"


def make_ranges(prefix: bytes, shape: LoadShape) -> list[LoadRange]:
    """Return the ranges of a load below `prefix`: single keys if they are unique, else three of four are prefixes."""
    if shape.unique:
        return [LoadRange(prefix + b"%06d" % number, b"") for number in range(shape.ranges)]
    ranges = []
    for number in range(shape.ranges):
        key = prefix + b"%03d" % number
        single = number % 4 == 3
        # A prefix ends in "/", and "0" is the byte after it.
        ranges.append(LoadRange(key, b"") if single else LoadRange(key + b"/", key + b"0"))
    return ranges


def make_streams(shape: LoadShape, past: list[int]) -> list[PlannedStream]:
    """Return the streams of a load.

    Watches are distributed so that the watches of a stream have different ranges. `past`: revisions at which watches
    may start in the past. Unless the shape is plain, a fifth of the watches start there, and of each twelve one filters
    puts, one filters deletes and three have prev_kv. The first stream is the slow one.
    """
    watches: list[list[PlannedWatch]] = [[] for _ in range(shape.streams)]
    for number in range(shape.watches):
        # The watches of a stream have different ranges, and all ranges have equally many watches.
        stream = number % shape.streams
        which = number if shape.unique else (stream + number // shape.streams) % shape.ranges
        watches[stream].append(_watch(number, which, shape, past))
    return [
        PlannedStream(
            channel=number % shape.channels,
            watches=own,
            pause_s=shape.pause_s if number == 0 else 0.0,
        )
        for number, own in enumerate(watches)
    ]


def _watch(number: int, which: int, shape: LoadShape, past: list[int]) -> PlannedWatch:
    if shape.plain:
        return PlannedWatch(which)
    start = past[number // PAST_EVERY % len(past)] if past and number % PAST_EVERY == 0 else 0
    kind = number % 12
    return PlannedWatch(which, start, no_put=kind == 3, no_delete=kind == 7, prev_kv=kind in (1, 5, 9))


class WatchMix(msgspec.Struct, frozen=True):
    """The number of watches of each kind; a watch can be of several kinds."""

    past: int
    filtered: int
    prev_kv: int


def count_kinds(shape: LoadShape) -> WatchMix:
    """Count the kinds of watches in a load of this shape."""
    watches = [watch for stream in make_streams(shape, [1]) for watch in stream.watches]
    return WatchMix(
        past=sum(watch.start_revision > 0 for watch in watches),
        filtered=sum(watch.no_put or watch.no_delete for watch in watches),
        prev_kv=sum(watch.prev_kv for watch in watches),
    )


def deal(streams: list[PlannedStream], processes: int) -> list[list[PlannedStream]]:
    """Distribute streams to processes by channel, to keep streams of a connection together; omit empty processes."""
    dealt: list[list[PlannedStream]] = [[] for _ in range(processes)]
    for stream in streams:
        dealt[stream.channel % processes].append(stream)
    return [part for part in dealt if part]
