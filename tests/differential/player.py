"""Runs a program against an address, etcd's or the proxy's, and records the responses.

The client is raw: messages on an HTTP/2 library, nothing joined, resumed or dropped. A wait that times out is not an
error here but part of the recording: whether etcd and the proxy agree is decided later, on the whole.

At the end each open stream gets one more watch, and two puts to its key: once the second event has arrived, everything
that etcd sent before the first has arrived too. So "nothing more is sent" is tested as well, without a timeout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from proto.framing import frame
from proto.pb import rpc_pb2
from tests.differential import steps as do
from tests.differential.recording import FENCE_ID, Recording, StreamLog, StreamRecord
from tests.differential.steps import Program
from tests.differential.target import Target
from tests.e2e.raw_client import RawClient, RawStream

LIMIT_S = 30.0
"""How long a wait for what must come may take: six megabytes on three routes at once take seconds on a busy machine."""
AGAIN_S = 0.1
"""The interval at which an unanswered progress request is repeated."""
PIPELINED = 100
"""Concurrent puts."""
FENCE = b"\x7ffence"
ROOT = "root"
UNAVAILABLE = 14


class Player:
    """One run of one program."""

    def __init__(self, program: Program, target: Target, limit_s: float = LIMIT_S) -> None:
        self.program = program
        self.target = target
        self._limit_s = limit_s
        self.logs: dict[str, StreamLog] = {}
        self.tokens: dict[str, str] = {}
        self._connections: dict[str, RawClient] = {}
        self._clients: list[RawClient] = []
        self._calls: RawClient | None = None
        self._heard = asyncio.Event()
        self.recording = Recording(proxied=target.proxied, base=0, newest=0, ids=(0, 0, 0))

    async def play(self) -> Recording:
        """Run all steps."""
        record = self.recording
        if self.program.auth:
            await self._login(do.Login(ROOT))
        empty = rpc_pb2.DeleteRangeRequest(key=b"\x00", range_end=b"\x00")
        answer = rpc_pb2.DeleteRangeResponse.FromString(await self._unary("KV/DeleteRange", empty, quiet=True))
        record.base = answer.header.revision
        record.ids = (answer.header.cluster_id, answer.header.member_id, answer.header.raft_term)
        try:
            for step in self.program.steps:
                await _PLAYS[type(step)](self, step)
            await self._finish()
        finally:
            for client in self._clients:
                await client.close()
        return record

    # streams

    async def log(self, name: str) -> StreamLog:
        """Return a stream, opened if necessary."""
        if name not in self.logs:
            await self._open(do.Open(name))
        return self.logs[name]

    async def _connect(self, port: int, window: int = 2**31 - 1) -> RawClient:
        client = await _Client.connect(port, window)
        client.heard = self._heard
        self._clients.append(client)
        return client

    async def _open(self, step: do.Open) -> None:
        name = step.on.partition(":")[0]
        if name not in self._connections or self._connections[name].lost:
            self._connections[name] = await self._connect(self.target.port, step.window)
        metadata = []
        if step.has_leader:
            metadata.append(("hasleader", "true"))
        if step.user or step.token:
            metadata.append((step.header, step.token or self.tokens[step.user]))
        client = self._connections[name]
        self.logs[step.on] = StreamLog(step.on, client, client.watch(metadata))

    async def until(self, what: str, condition: Callable[[], bool]) -> bool:
        """Wait until a condition on the received responses holds; a timeout is recorded."""
        if await self._hears(condition, self._limit_s):
            return True
        self.recording.vain.append(what)
        return False

    async def _hears(self, condition: Callable[[], bool], limit_s: float) -> bool:
        deadline = asyncio.get_running_loop().time() + limit_s
        while True:
            for log in self.logs.values():
                log.refresh()
            if condition():
                return True
            self._heard.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._heard.wait()
            except TimeoutError:
                return False

    async def _create(self, step: do.Create) -> None:
        log = await self.log(step.on)
        start = step.raw_start if step.start is None else self.recording.base + step.start
        log.creates.append(step)
        log.watch.create(
            step.key,
            step.end,
            start_revision=start,
            watch_id=step.id,
            filters=step.filters,
            prev_kv=step.prev_kv,
            fragment=step.fragment,
            progress_notify=step.progress_notify,
        )
        if not step.pipelined:
            await self._answered(log, f"the answer to {step}")

    async def _answered(self, log: StreamLog, what: str) -> None:
        count = len(log.creates)
        await self.until(what, lambda: log.over or sum(answer.created for answer in log.controls) >= count)

    async def _cancel(self, step: do.Cancel) -> None:
        log = await self.log(step.on)
        log.refresh()
        count = len(log.controls)
        log.watch.cancel(step.id)
        if not step.silent and not step.pipelined:
            await self.until(f"the answer to {step}", lambda: log.over or len(log.controls) > count)

    async def _ask(self, step: do.Ask) -> None:
        log = await self.log(step.on)
        log.refresh()
        count = len(log.answers)
        log.watch.progress()
        if step.again is not None:
            await self._ask_again(log, self.recording.base + step.again)
        elif step.answered:
            await self.until(f"the answer to {step}", lambda: log.over or len(log.answers) > count)

    async def _ask_again(self, log: StreamLog, revision: int) -> None:
        for _ in range(int(self._limit_s / AGAIN_S)):
            if await self._hears(lambda: log.over or max(log.answers, default=0) >= revision, AGAIN_S):
                return
            log.watch.progress()
        self.recording.vain.append(f"progress of {revision - self.recording.base}")

    async def _raw(self, step: do.Raw) -> None:
        log = await self.log(step.on)
        if step.creates:
            log.creates.append(do.Create(on=step.on))
        log.watch.raw.send(step.message)
        if step.creates:
            await self._answered(log, f"the answer to {step}")

    async def _half_close(self, step: do.HalfClose) -> None:
        log = await self.log(step.on)
        log.half_closed = True
        log.watch.raw.send_raw(b"", end=True)

    async def _cancel_stream(self, step: do.CancelStream) -> None:
        log = await self.log(step.on)
        log.watch.raw.cancel()
        log.canceled = True

    async def _disconnect(self, step: do.Disconnect) -> None:
        client = (await self.log(step.on)).client
        await client.close()

    async def _resume(self, step: do.Resume) -> None:
        if step.of not in self.logs and self.program.over_breaks:
            return
        log = await self.log(step.of)
        gone = await self._hears(lambda: log.over, 0.0 if self.target.proxied else LIMIT_S)
        if not gone:
            if not self.program.over_breaks:
                self.recording.vain.append(f"the end of {step.of}")
            return
        create, answer = log.created(step.watch)
        seen = [
            event.kv.mod_revision
            for each in log.responses
            if each.watch_id == step.watch and not each.fragment
            for event in each.events
        ]
        at = max([answer.header.revision if create.start is None else 0, *seen]) - self.recording.base
        start = max(at + 1, create.start or 0)
        self.recording.follows[step.of] = step.on
        again = do.Create(create.key, create.end, start, prev_kv=create.prev_kv, filters=create.filters, on=step.on)
        await self._create(again)

    async def _stop_reading(self, step: do.StopReading) -> None:
        (await self.log(step.on)).watch.raw.taking = False

    async def _read_on(self, step: do.ReadOn) -> None:
        (await self.log(step.on)).watch.raw.take()

    async def _wait(self, step: do.Wait) -> None:
        log = await self.log(step.on)
        base = self.recording.base

        def there() -> bool:
            return (
                len(log.controls) >= step.controls
                and sum(each.event_count for each in self._chain(step.on)) >= step.events
                and (
                    sum(len(each.compacted) for each in self._chain(step.on)) >= step.compacted
                    or self._brought(step.on)
                )
                and len(set(log.answers)) >= step.progress
                and (step.notified is None or log.notified >= base + step.notified)
                and (log.over or not step.end)
            )

        if self.target.proxied or not step.better:
            await self.until(repr(step), there)

    def _brought(self, name: str) -> bool:
        """Return whether the proxy serves from its history what etcd has compacted."""
        may = self.target.proxied and bool(self.program.from_history)
        return may and any(each.event_count for each in self._chain(name))

    def _chain(self, name: str) -> Iterator[StreamLog]:
        """Yield a stream and the streams that resumed its watches."""
        while name in self.logs:
            yield self.logs[name]
            name = self.recording.follows.get(name, "")

    # unary calls

    async def _unary(self, method: str, request: Any, user: str = "", quiet: bool = False) -> bytes:
        """Make a call, through the target or (if so given) directly, and record its outcome."""
        token = self.tokens.get(user or (ROOT if self.program.auth else ""))
        metadata = [("token", token)] if token else []
        while True:
            if self._calls is None or self._calls.lost:
                self._calls = await self._connect(self.target.calls_port)
            call = self._calls.call(f"/etcdserverpb.{method}", metadata)
            await self._send(call, frame(request.SerializeToString()))
            await self._hears(lambda call=call: call.over, LIMIT_S)  # type: ignore[misc]
            if not (self.program.over_breaks and call.status in (UNAVAILABLE, None)):
                break
        message = call.messages[0] if call.messages else b""
        if not quiet:
            header = rpc_pb2.PutResponse.FromString(message).header  # every response has its header in field 1
            at = header.revision - self.recording.base if header.revision else None
            self.recording.calls.append(f"{method}: {call.status} {call.text!r} @{at}")
        return message

    async def _send(self, call: RawStream, data: bytes) -> None:
        """Send a request's only message, as the windows allow."""
        connection = call.client.h2
        while data and not call.over:
            room = min(connection.local_flow_control_window(call.id), connection.max_outbound_frame_size)
            if room <= 0:
                await self._hears(lambda: connection.local_flow_control_window(call.id) > 0 or call.over, LIMIT_S)
                continue
            connection.send_data(call.id, data[:room], end_stream=room >= len(data))
            data = data[room:]
            call.client.flush()

    async def _put(self, step: do.Put) -> None:
        if step.pipelined:
            await self._put_all(step)
            return
        for number in range(step.times):
            value = step.value if step.times == 1 else b"%b%d" % (step.value, number)
            request = rpc_pb2.PutRequest(key=step.key, value=value, lease=step.lease)
            await self._unary("KV/Put", request, step.user)

    async def _put_all(self, step: do.Put) -> None:
        client = await self._connect(self.target.calls_port)
        message = rpc_pb2.PutRequest(key=step.key, value=step.value).SerializeToString()
        for first in range(0, step.times, PIPELINED):
            calls = [client.call("/etcdserverpb.KV/Put") for _ in range(min(PIPELINED, step.times - first))]
            for call in calls:
                call.send(message, end=True)
            await self.until("all puts", lambda calls=calls: all(call.over for call in calls))  # type: ignore[misc]
            assert all(call.status == 0 for call in calls)

    async def _delete(self, step: do.Delete) -> None:
        await self._unary("KV/DeleteRange", rpc_pb2.DeleteRangeRequest(key=step.key, range_end=step.end))

    async def _txn(self, step: do.Txn) -> None:
        await self._unary("KV/Txn", do.txn_request(step.writes))

    async def _compact(self, step: do.Compact) -> None:
        revision = self.recording.base + step.at
        await self._unary("KV/Compact", rpc_pb2.CompactionRequest(revision=revision, physical=True))

    async def _grant(self, step: do.Grant) -> None:
        await self._unary("Lease/LeaseGrant", rpc_pb2.LeaseGrantRequest(ID=step.id, TTL=3600))

    async def _revoke(self, step: do.Revoke) -> None:
        await self._unary("Lease/LeaseRevoke", rpc_pb2.LeaseRevokeRequest(ID=step.id))

    async def _login(self, step: do.Login) -> None:
        request = rpc_pb2.AuthenticateRequest(name=step.user, password=step.user)
        answer = await self._unary("Auth/Authenticate", request, quiet=True)
        self.tokens[step.user] = rpc_pb2.AuthenticateResponse.FromString(answer).token

    # etcd itself

    async def _ctl(self, step: do.Ctl) -> None:
        extra = (f"--user={ROOT}:{ROOT}",) if step.root else ()
        await asyncio.to_thread(self.target.etcds[0].ctl, *extra, *step.arguments)

    async def _restart(self, step: do.Restart) -> None:
        await asyncio.to_thread(self.target.restart, step.kill, step.flags)

    async def _lose_leader(self, step: do.LoseLeader) -> None:
        del step
        await asyncio.to_thread(self.target.lose_leader)

    async def _find_leader(self, step: do.FindLeader) -> None:
        del step
        await asyncio.to_thread(self.target.find_leader)

    # the end

    async def _finish(self) -> None:
        """Wait until everything in transit has arrived, then record it."""
        fenced = [log for log in self.logs.values() if not log.over and not log.half_closed]
        before = {log.name: len(log.creates) for log in fenced}
        for log in fenced:
            await self._create(do.Create(FENCE, id=FENCE_ID, on=log.name))
        fenced = [log for log in fenced if not log.over and log.controls and not log.controls[-1].canceled]
        revisions = []
        for number in (1, 2):
            message = await self._unary("KV/Put", rpc_pb2.PutRequest(key=FENCE, value=b"fence"), quiet=True)
            revisions.append(rpc_pb2.PutResponse.FromString(message).header.revision)
            await self.until(
                f"fence {number}",
                lambda number=number: all(log.over or log.events.get(FENCE_ID, 0) >= number for log in fenced),  # type: ignore[misc]
            )
        self.recording.newest = revisions[-1]
        for log in self.logs.values():
            raw = log.watch.raw
            log.refresh()
            ended = raw.ended or raw.reset is not None
            self.recording.streams.append(
                StreamRecord(
                    log.name,
                    list(log.responses),
                    f"{raw.status} {raw.text!r}" if ended else "lost" if log.over else "",
                    revisions[1] if log in fenced else revisions[0],
                    log.creates[: before.get(log.name)],
                )
            )


class _Client(RawClient):
    """A raw client that signals received data."""

    heard = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.heard.set()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.heard.set()


_PLAYS: dict[type, Callable[[Player, Any], Any]] = {
    do.Open: Player._open,
    do.Create: Player._create,
    do.Cancel: Player._cancel,
    do.Ask: Player._ask,
    do.Raw: Player._raw,
    do.HalfClose: Player._half_close,
    do.CancelStream: Player._cancel_stream,
    do.Disconnect: Player._disconnect,
    do.Resume: Player._resume,
    do.StopReading: Player._stop_reading,
    do.ReadOn: Player._read_on,
    do.Wait: Player._wait,
    do.Put: Player._put,
    do.Delete: Player._delete,
    do.Txn: Player._txn,
    do.Compact: Player._compact,
    do.Grant: Player._grant,
    do.Revoke: Player._revoke,
    do.Login: Player._login,
    do.Ctl: Player._ctl,
    do.Restart: Player._restart,
    do.LoseLeader: Player._lose_leader,
    do.FindLeader: Player._find_leader,
}
