"""One run of the load in the parent process: start the clients, wait until they watch, write, wait, collect.

All waits are limited. If the watches do not open, or some events do not arrive after the last write, the run ends with
a line about how far the clients got; the judge then finds the missing events.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from proxy.measuring.load.client import ClientReport, FinalRevisions, ListOrder
from proxy.measuring.load.plan import ClientPlan, LoadRange, PlannedStream, deal
from proxy.measuring.load.target import LoadTarget
from proxy.process.child import Child, ChildFailed, python_command

STILL_LIMIT_S = 15.0
"""How long opening watches, or waiting for the last events, may go without progress (seconds). Progress on a slow
machine extends the wait: its late events are not lost."""

FINISH_LIMIT_S = 300.0
"""How long the clients may take after the last write to get all events, even with progress (seconds)."""

RECORD_LIMIT_S = 10.0


class LoadFailed(Exception):
    """The load could not be started; the text is one line."""


class Load:
    """The client processes of one run."""

    def __init__(
        self, target: LoadTarget, ranges: list[LoadRange], streams: list[PlannedStream], processes: int
    ) -> None:
        self._target = target.without_password()
        self._ranges = ranges
        self._parts = deal(streams, processes)
        self.streams = len(streams)
        self.watches = sum(len(stream.watches) for stream in streams)
        self.plans: list[ClientPlan] = []
        self._children: list[Child] = []
        self._readers: list[asyncio.Task[None]] = []
        self._reports: list[ClientReport] = []

    @property
    def total(self) -> ClientReport:
        """The sum of the client processes' last reports."""
        total = ClientReport(recorded=bool(self._reports) and all(report.recorded for report in self._reports))
        for report in self._reports:
            total.opened += report.opened
            total.messages += report.messages
            total.events += report.events
            total.finished += report.finished
            total.listed += report.listed
            total.failed += report.failed
        return total

    async def start(self, directory: Path) -> None:
        """Start the client processes, with their plans and records in `directory`. Raises LoadFailed."""
        self.plans = [
            ClientPlan(self._target, self._ranges, part, str(directory / f"record-{number}"))
            for number, part in enumerate(self._parts)
        ]
        try:
            await asyncio.gather(*(self._start_one(number, directory) for number in range(len(self.plans))))
        except ChildFailed as error:
            raise LoadFailed(str(error)) from None

    async def _start_one(self, number: int, directory: Path) -> None:
        path = directory / f"plan-{number}"
        path.write_bytes(msgspec.msgpack.encode(self.plans[number]))
        command = python_command("proxy.measuring.load.client", f"--plan={path}")
        child = await Child.start("a load client", command)
        self._children.append(child)
        self._reports.append(ClientReport())
        self._readers.append(asyncio.create_task(self._read(child, len(self._reports) - 1)))

    async def _read(self, child: Child, index: int) -> None:
        decoder = msgspec.json.Decoder(ClientReport)
        while not self._reports[index].recorded:
            try:
                self._reports[index] = decoder.decode(await child.read_line())
            except ChildFailed as error:
                self._reports[index].failed.append(str(error))
                return

    async def wait_opened(self) -> None:
        """Wait until every watch is created. Raises LoadFailed."""
        await self._wait(lambda total: total.opened)
        total = self.total
        if total.failed:
            raise LoadFailed(f"{len(total.failed)} client streams failed while opening, first: {total.failed[0]}")
        if total.opened < self.watches:
            raise LoadFailed(
                f"only {total.opened} of {self.watches} watches were opened, and no more came for {STILL_LIMIT_S:g} s"
            )

    async def wait_finished(self, final: FinalRevisions) -> bool:
        """Send the clients the last revisions; return whether all watches reached them in time."""
        for child in self._children:
            child.write_line(final)
        return await self._wait(lambda total: total.finished)

    async def list_all(self, prefix: bytes) -> bool:
        """Let every stream list all keys with this prefix, at the same time; return whether all were answered."""
        for child in self._children:
            child.write_line(ListOrder(prefix))
        return await self._wait(lambda total: total.listed, self.streams)

    async def _wait(self, count: Callable[[ClientReport], int], wanted: int | None = None) -> bool:
        """Wait until `count` reaches `wanted` (all watches); return False if a client failed or progress stopped."""
        wanted = self.watches if wanted is None else wanted
        now = time.monotonic()
        deadline, still_since, seen = now + FINISH_LIMIT_S, now, (0, 0)
        while count(total := self.total) < wanted:
            now = time.monotonic()
            if seen != (count(total), total.events):
                still_since, seen = now, (count(total), total.events)
            if total.failed or now > min(deadline, still_since + STILL_LIMIT_S):
                return False
            await asyncio.sleep(0.02)
        return True

    async def leave(self) -> None:
        """Stop the clients; afterwards their records are complete."""
        await asyncio.gather(*(child.stop(RECORD_LIMIT_S) for child in self._children))
        for reader in self._readers:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
        self._children = []
