"""One process of clients: `python -m tests.soak.client KIND ENDPOINT DIRECTORY SEED`, driven by lines on stdin.

`settle REVISION`: receive everything through it, then print `settled`; or `waits`, if that requires a further write.
`leave`: close all, write the summary, exit.
The records are in DIRECTORY/KIND.spool, the summary in DIRECTORY/KIND.json.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc.aio
import msgspec

from tests.soak import callers
from tests.soak.spool import Spool, WatchPlan
from tests.soak.watcher import CHANNEL, SLOW_CHANNEL, Habits, Seen, Stream

WIDE = [(b"/s/", b"/s/e"), (b"/s/a/", b"/s/a0"), (b"/s/b/", b"/s/b0"), (b"/s/c/", b"/s/d0"), (b"\0", b"/s/e")]
SETTLE_S = 90.0


class Summary(msgspec.Struct):
    """The final report of a process, besides its spool."""

    endings: dict[str, int]
    calls: dict[str, int]
    faults: list[str]
    acknowledged: list[tuple[int, bytes]]


def plan_wide(seen: Seen) -> WatchPlan:
    """A watch of one of a few ranges, from now mostly, else from the past or the near future."""
    start = random.choice((0, 0, max(1, seen.revision - random.randrange(3000)), seen.revision + random.randrange(30)))
    plan = WatchPlan(*random.choice(WIDE), start_revision=start)
    plan.prev_kv, plan.fragment = random.random() < 0.25, random.random() < 0.3
    plan.no_put, plan.no_delete = random.random() < 0.1, random.random() < 0.1
    plan.progress_notify = random.random() < 0.3
    return plan


def plan_narrow(seen: Seen) -> WatchPlan:
    """A watch of one key or a few: nearly all are different."""
    plan = plan_wide(seen)
    plan.key, plan.range_end = callers.any_key(), b""
    if random.random() < 0.5:
        plan.range_end = plan.key[:-1] + bytes([plan.key[-1] + random.randrange(1, 4)])
    return plan


def plan_huge(seen: Seen) -> WatchPlan:
    """A watch of revisions that come in fragments."""
    start = random.choice((0, max(1, seen.revision - random.randrange(300))))
    return WatchPlan(b"/s/huge/", b"/s/huge0", start, prev_kv=True, fragment=True)


KINDS: dict[str, list[tuple[int, int, Habits, Callable[[Seen], WatchPlan]]]] = {
    "steady": [
        (14, 2, Habits(), plan_wide),
        (8, 2, Habits(progress=0.7), plan_wide),
        (2, 1, Habits(progress=0.2, drop=0.02), plan_huge),
    ],
    "narrow": [(16, 16, Habits(progress=0.1, drop=0.02, swap=0.3), plan_narrow)],
    "restless": [
        (8, 2, Habits(turn_s=0.5, progress=0.1, drop=0.3, swap=0.3), plan_wide),
        (8, 2, Habits(pause=0.05, pause_s=4.0, progress=0.1, swap=0.05), plan_wide),
    ],
    "callers": [],
}
"""Number of streams, watches on each, their behaviour, their ranges. The slow ones have separate channels."""


class Clients:
    """All clients of one process."""

    def __init__(self, kind: str, endpoint: str, directory: Path) -> None:
        self._spool = Spool(directory / f"{kind}.spool")
        self._summary = directory / f"{kind}.json"
        self._seen = Seen()
        self._calls: Counter[str] = Counter()
        self._channels: list[grpc.aio.Channel] = []
        self._endpoint = endpoint
        self.streams: list[Stream] = []
        self.callers: list[callers.Caller] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._kind = kind

    def start(self) -> None:
        """Open everything."""
        shared = self._channel(CHANNEL)
        for streams, watches, habits, plan in KINDS[self._kind]:
            for _ in range(streams):
                channel = self._channel(SLOW_CHANNEL) if habits.pause else shared
                stream = Stream(channel, self._spool, self._seen, habits, lambda plan=plan: plan(self._seen))  # type: ignore[misc]  # bound
                for _ in range(watches):
                    stream.add()
                self.streams.append(stream)
                self._tasks.append(asyncio.create_task(stream.run()))
        if self._kind == "callers":
            steps = [*[(callers.write, 0.08)] * 4, (callers.write_huge, 10.0), *[(callers.use_lease, 0.5)] * 2]
            steps += [(callers.read, 0.1)] * 3
            for step, pace_s in steps:
                caller = callers.Caller(shared, self._seen, self._calls)
                self.callers.append(caller)
                self._tasks.append(asyncio.create_task(caller.run(step, pace_s)))

    def _channel(self, options: tuple[tuple[str, int], ...]) -> grpc.aio.Channel:
        channel = grpc.aio.insecure_channel(
            self._endpoint, options=[*options, ("grpc.max_receive_message_length", 16 << 20)]
        )
        self._channels.append(channel)
        return channel

    async def settle(self, revision: int) -> bool:
        """Wait until every watch has progress through `revision`, the store's.

        False: all incomplete watches are on streams on which etcd sends nothing before a further write.
        """
        for stream in self.streams:
            stream.hurried = True
        for caller in self.callers:
            caller.stopping = True
        if self.callers:
            await asyncio.gather(*self._tasks)
        deadline = asyncio.get_running_loop().time() + SETTLE_S
        while lacking := [stream for stream in self.streams if not stream.has_all(revision)]:
            stalled = [stream for stream in lacking if not stream.waits_for_the_future(revision)]
            if not stalled:
                return False
            if asyncio.get_running_loop().time() > deadline:
                for stream in stalled[:5]:
                    wanting = [(w.plan, w.next_revision) for w in stream.watches if w.next_revision <= revision]
                    what = f"not complete through {revision} after {SETTLE_S} s: {wanting[:2]}, {stream.state()}"
                    self._seen.faults.append(what)
                break
            await asyncio.sleep(0.1)
        return True

    async def leave(self) -> None:
        """Close everything and write the summary."""
        for stream in self.streams:
            stream.stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            await channel.close()
        self._spool.close()
        acknowledged = [each for caller in self.callers for each in caller.acknowledged]
        summary = Summary(dict(self._seen.endings), dict(self._calls), self._seen.faults, acknowledged)
        self._summary.write_bytes(msgspec.json.encode(summary))


async def main(kind: str, endpoint: str, directory: str, seed: str) -> None:
    """Run until `leave`, or until stdin ends."""
    random.seed(f"{seed} {kind}")
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    clients = Clients(kind, endpoint, Path(directory))
    clients.start()
    while words := (await lines.readline()).split():
        if words[0] == b"settle":
            sys.stdout.write("settled\n" if await clients.settle(int(words[1])) else "waits\n")
            sys.stdout.flush()
        else:
            break
    await clients.leave()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
