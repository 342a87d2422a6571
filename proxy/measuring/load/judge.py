"""Compares the recorded responses of every client with the store's real history, and gives a verdict.

The history is read from the upstream itself, by one watch of all keys from the first revision of the run, with prev_kv.
The clients' records are decoded into logs for the guarantee checkers (coalesce/guarantees/checkers.py), and all
checkers run on every watch.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import grpc
import grpc.aio
import msgspec

from coalesce.guarantees.checkers import (
    Bookmark,
    Canceled,
    Change,
    Created,
    Opened,
    PreviousValue,
    Received,
    Truth,
    Violation,
    WatchLog,
    check,
)
from proto.pb import kv_pb2, rpc_pb2
from proxy.measuring.load.client import WATCH, read_record
from proxy.measuring.load.plan import ClientPlan
from proxy.measuring.load.target import LoadTarget
from proxy.measuring.load.writer import read_stamp

TRUTH_LIMIT_S = 20.0

LOST = frozenset({"reliable", "resumable", "bookmarkable"})
DUPLICATED = frozenset({"unique"})
OUT_OF_ORDER = frozenset({"ordered", "atomic", "header_safe"})


class NoTruth(Exception):
    """The upstream's own history could not be read; the text is one line."""


class RunVerdict(msgspec.Struct, kw_only=True):
    """The verdict on the clients of a run."""

    watches: int = 0
    messages: int = 0
    events: int = 0
    lost: int = 0
    duplicated: int = 0
    out_of_order: int = 0
    wrong: int = 0
    """Events that differ from the store's: another value, outside the range, against a filter, a wrong prev_kv."""
    examples: list[str] = msgspec.field(default_factory=list)
    p50_ms: float = 0.0
    p99_ms: float = 0.0

    @property
    def faultless(self) -> bool:
        """Whether no event was lost, duplicated, out of order or wrong."""
        return not (self.lost or self.duplicated or self.out_of_order or self.wrong)


def change_of(event: kv_pb2.Event) -> Change:
    """Convert an event from the wire to the checkers' form."""
    kv = event.kv
    previous = None
    if event.HasField("prev_kv"):
        prev = event.prev_kv
        previous = PreviousValue(prev.value, prev.create_revision, prev.mod_revision, prev.version, prev.lease)
    return Change(event.type, kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease, previous)


async def read_truth(target: LoadTarget, prefix: bytes, first: int, last: int) -> Truth:
    """Read every change below `prefix` in [first, last] from the store at `target`, with previous values.

    Raises NoTruth.
    """
    create = rpc_pb2.WatchCreateRequest(
        key=prefix, range_end=prefix[:-1] + bytes([prefix[-1] + 1]), start_revision=first, prev_kv=True
    )
    request = rpc_pb2.WatchRequest(create_request=create).SerializeToString()
    changes: list[Change] = []
    async with target.channel(("grpc.max_receive_message_length", -1)) as channel:
        call: Any = channel.stream_stream(WATCH)(metadata=target.metadata)
        try:
            async with asyncio.timeout(TRUTH_LIMIT_S):
                await call.write(request)
                while not changes or changes[-1].mod_revision < last:
                    message = await call.read()
                    if message is grpc.aio.EOF:
                        raise NoTruth(f"reading the store's history ended: {await call.details()}")
                    response = rpc_pb2.WatchResponse.FromString(message)
                    if response.canceled:
                        reason = response.cancel_reason or f"compacted at revision {response.compact_revision}"
                        raise NoTruth(f"the store's history cannot be read: {reason}")
                    changes.extend(change_of(event) for event in response.events)
        except TimeoutError:
            raise NoTruth(f"the store did not send its history up to revision {last} in {TRUTH_LIMIT_S:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise NoTruth(f"the store's history cannot be read: {error.details()}") from None
        finally:
            call.cancel()
    return Truth(changes)


class _Stream:
    """The logs of one recorded stream's watches."""

    def __init__(self, plan: ClientPlan, number: int) -> None:
        planned = plan.streams[number]
        self.slow = planned.pause_s > 0
        self.logs = [
            WatchLog(
                plan.ranges[watch.range].key,
                plan.ranges[watch.range].range_end,
                no_put=watch.no_put,
                no_delete=watch.no_delete,
                prev_kv=watch.prev_kv,
                records=[Opened(watch.start_revision or None)],
            )
            for watch in planned.watches
        ]
        self.live = [watch.start_revision == 0 for watch in planned.watches]
        self._ids: dict[int, int] = {}

    def take(self, response: rpc_pb2.WatchResponse, at_ns: int, delays_ns: list[int]) -> None:
        """Add one response to the log of its watch, and the delays of its events to `delays_ns`.

        Raises LookupError for a response with an unknown watch id.
        """
        if response.created:
            index = len(self._ids)
            self._ids[response.watch_id] = index
            self.logs[index].records.append(Created(response.header.revision))
        if response.events:
            index = self._ids[response.watch_id]
            changes = [change_of(event) for event in response.events]
            self.logs[index].records.append(Received(response.header.revision, changes, response.fragment))
            if self.live[index] and not self.slow:
                delays_ns.extend(at_ns - sent for change in changes if (sent := read_stamp(change.value)))
        elif response.canceled:
            canceled = Canceled(response.compact_revision, response.cancel_reason)
            self.logs[self._ids[response.watch_id]].records.append(canceled)
        elif not response.created:
            logs = self.logs if response.watch_id == -1 else [self.logs[self._ids[response.watch_id]]]
            for log in logs:
                log.records.append(Bookmark(response.header.revision))


def judge(plans: Iterable[ClientPlan], truth: Truth, last: int, *, safe_headers: bool) -> RunVerdict:
    """Judge every watch of the plans by its record; each must have all its events up to revision `last`.

    `safe_headers`: also check the guarantee that only the proxy gives (see coalesce/guarantees/checkers.py).
    """
    verdict = RunVerdict()
    delays_ns: list[int] = []
    faults: Counter[str] = Counter()
    for plan in plans:
        streams = [_Stream(plan, number) for number in range(len(plan.streams))]
        for recorded in read_record(plan.record):
            response = rpc_pb2.WatchResponse.FromString(recorded.message)
            verdict.messages += 1
            verdict.events += len(response.events)
            try:
                streams[recorded.stream].take(response, recorded.at_ns, delays_ns)
            except LookupError:
                text = f"a response for watch id {response.watch_id}, which does not exist"
                _note(verdict, faults, [Violation("matching", text)], f"stream {recorded.stream}")
        for number, stream in enumerate(streams):
            for log in stream.logs:
                verdict.watches += 1
                violations = check(log, truth, last, safe_headers=safe_headers)
                _note(verdict, faults, violations, f"stream {number}, range {log.key!r}")
    verdict.lost = sum(faults[name] for name in LOST)
    verdict.duplicated = sum(faults[name] for name in DUPLICATED)
    verdict.out_of_order = sum(faults[name] for name in OUT_OF_ORDER)
    verdict.wrong = sum(faults.values()) - verdict.lost - verdict.duplicated - verdict.out_of_order
    verdict.p50_ms, verdict.p99_ms = percentile_ms(delays_ns, 50), percentile_ms(delays_ns, 99)
    return verdict


def _note(verdict: RunVerdict, faults: Counter[str], violations: Sequence[Violation], where: str) -> None:
    for violation in violations:
        faults[violation.guarantee] += 1
        if len(verdict.examples) < 5:
            verdict.examples.append(f"{violation.guarantee}: {violation.text} ({where})")


def percentile_ms(values_ns: list[int], percent: int) -> float:
    """Return a percentile of durations in ns, in ms; 0 when there are none."""
    if not values_ns:
        return 0.0
    ordered = sorted(values_ns)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] / 1e6
