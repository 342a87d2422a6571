"""A load client: one process with many real gRPC Watch streams, which records every response.

The parent runs it as `python -m proxy.measuring.load.client`. It uses grpc.aio, as other programs do, instead of the
proxy's own HTTP/2, so that it also tests the proxy's understanding of the protocol. Responses are recorded as received
bytes with their time of arrival; the client decodes them only to know when all events have arrived.
"""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import click
import grpc
import grpc.aio
import msgspec

from proto.pb import rpc_pb2
from proto.spans import prefix_end
from proxy.measuring.load.plan import ROOT, SLOW_AFTER_MESSAGES, ClientPlan, LoadRange, PlannedStream, PlannedWatch
from proxy.process.child import ChildReady, Parent, on_signals

WATCH = "/etcdserverpb.Watch/Watch"
RANGE = "/etcdserverpb.KV/Range"
REPORT_S = 0.1
_BLOCK = 512


def failure_of(error: grpc.aio.AioRpcError, secure: bool = False) -> str:
    """Describe why a call failed, more clearly than gRPC's own texts do for common cases; `secure`: TLS was used."""
    details = error.details() or ""
    if "Connection refused" in details:
        return "connection refused; check that it runs and listens on that address and port"
    if secure and ("Socket closed" in details or "WRONG_VERSION_NUMBER" in details or "Connection reset" in details):
        return "TLS failed: the server there closed the connection; use http:// if it does not use TLS"
    if "Expected SETTINGS frame" in details or "Failed parsing HTTP/2" in details or "Socket closed" in details:
        return "the server there does not speak gRPC in plain text; give the client port, with https:// if it uses TLS"
    if found := re.search(r"CERTIFICATE_VERIFY_FAILED: ([\w ]+)", details):
        return f"its certificate is not trusted ({found[1]}); check the address and --cacert"
    if "handshake" in details or "certificate" in details.lower():
        return f"TLS failed; check the address, --cacert, --cert and --key: {details}"
    if error.code() is grpc.StatusCode.PERMISSION_DENIED:
        return f"PERMISSION_DENIED: {details}; the user needs readwrite on the prefix {ROOT.decode()}"
    if "user name is empty" in details:
        return f"{details}; the server demands a user: give --user"
    return f"{error.code().name}: {details}"


class ListOrder(msgspec.Struct, frozen=True, tag="list"):
    """Every stream lists all keys with this prefix, all at the same time."""

    prefix: bytes


class FinalRevisions(msgspec.Struct, frozen=True, tag="final"):
    """The last revisions of each range: a watch that has the ones matching its filters has all its events."""

    puts: list[int]
    deletes: list[int]


class ClientReport(msgspec.Struct, kw_only=True):
    """The progress of a client process; sent to the parent ten times a second."""

    opened: int = 0
    """Watches whose `created` has arrived."""
    messages: int = 0
    events: int = 0
    finished: int = 0
    """Watches that have all events up to the final revisions."""
    listed: int = 0
    """Lists that were answered."""
    failed: list[str] = msgspec.field(default_factory=list)
    """Why streams ended, one text for each."""
    recorded: bool = False
    """Whether the record is complete; then this is the last report."""


class RecordedResponse(msgspec.Struct, frozen=True, array_like=True):
    """One response: the stream's place in the plan, the monotonic time of arrival in ns, the message."""

    stream: int
    at_ns: int
    message: bytes


class EventRecorder:
    """Writes responses to a file, in blocks."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("wb")  # noqa: SIM115 - closed by close()
        self._encoder = msgspec.msgpack.Encoder()
        self._block: list[RecordedResponse] = []

    def add(self, stream: int, message: bytes) -> None:
        """Record a response that has just arrived."""
        self._block.append(RecordedResponse(stream, time.monotonic_ns(), message))
        if len(self._block) >= _BLOCK:
            self._flush()

    def _flush(self) -> None:
        data = self._encoder.encode(self._block)
        self._file.write(len(data).to_bytes(4, "big"))
        self._file.write(data)
        self._block = []

    def close(self) -> None:
        """Write the rest and close the file."""
        self._flush()
        self._file.close()


def read_record(path: str) -> list[RecordedResponse]:
    """Read a Recorder's file; an incomplete last block, left by a killed process, is skipped."""
    data = memoryview(Path(path).read_bytes())
    decoder = msgspec.msgpack.Decoder(list[RecordedResponse])
    records: list[RecordedResponse] = []
    position = 0
    while position < len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        position += 4 + size
        if position <= len(data):
            records += decoder.decode(data[position - size : position])
    return records


def create_request(watch: PlannedWatch, span: LoadRange) -> bytes:
    """Encode the request that opens a planned watch."""
    create = rpc_pb2.WatchCreateRequest(
        key=span.key,
        range_end=span.range_end,
        start_revision=watch.start_revision,
        prev_kv=watch.prev_kv,
    )
    if watch.no_put:
        create.filters.append(rpc_pb2.WatchCreateRequest.NOPUT)
    if watch.no_delete:
        create.filters.append(rpc_pb2.WatchCreateRequest.NODELETE)
    return rpc_pb2.WatchRequest(create_request=create).SerializeToString()


class LoadStream:
    """One Watch call and the position of each of its watches."""

    def __init__(self, number: int, plan: PlannedStream, client: LoadClient) -> None:
        self.number = number
        self.plan = plan
        self.client = client
        self.ids: list[int] = []
        """The ids of the watches created so far, in the order of the plan, which is the order of the answers."""
        self.positions = [0] * len(plan.watches)
        self._messages = 0

    async def run(self, call: Any) -> None:
        """Open every watch and read until the stream ends."""
        for watch in self.plan.watches:
            await call.write(create_request(watch, self.client.plan.ranges[watch.range]))
        while True:
            message = await call.read()
            if message is grpc.aio.EOF:
                text = f"{await call.code()}: {await call.details()}"
                raise ConnectionError(text)
            self.client.recorder.add(self.number, message)
            self.take(rpc_pb2.WatchResponse.FromString(message))
            self._messages += 1
            if self._messages == SLOW_AFTER_MESSAGES and self.plan.pause_s:
                await asyncio.sleep(self.plan.pause_s)

    def take(self, response: rpc_pb2.WatchResponse) -> None:
        """Update the position of the response's watch."""
        report = self.client.report
        report.messages += 1
        if response.created:
            self.ids.append(response.watch_id)
            index = len(self.ids) - 1
            self.positions[index] = 0 if self.plan.watches[index].start_revision else response.header.revision
            report.opened += 1
        if response.canceled:
            report.failed.append(f"a watch was cancelled: {response.cancel_reason or 'compacted'}")
        if response.events:
            report.events += len(response.events)
            self.positions[self.ids.index(response.watch_id)] = response.events[-1].kv.mod_revision

    def finished(self, final: FinalRevisions) -> int:
        """Return how many watches have the last event that matches them."""
        count = 0
        for watch, position in zip(self.plan.watches, self.positions, strict=True):
            last_put = 0 if watch.no_put else final.puts[watch.range]
            last_delete = 0 if watch.no_delete else final.deletes[watch.range]
            count += position >= max(last_put, last_delete)
        return count if len(self.ids) == len(self.positions) else 0


class LoadClient:
    """All the streams of one process."""

    def __init__(self, plan: ClientPlan) -> None:
        self.plan = plan
        self.report = ClientReport()
        self.recorder = EventRecorder(plan.record)
        self.final: FinalRevisions | None = None
        self.streams = [LoadStream(number, stream, self) for number, stream in enumerate(plan.streams)]
        self._channels: dict[int, grpc.aio.Channel] = {}
        self._lists: set[asyncio.Task[None]] = set()
        self._leaving = asyncio.Event()

    def leave(self) -> None:
        """Stop as soon as possible."""
        self._leaving.set()

    def read_order(self, line: bytes) -> None:
        """Handle a message of the parent: writing has ended, at these revisions; or list the keys."""
        order: FinalRevisions | ListOrder = msgspec.json.decode(line, type=FinalRevisions | ListOrder)
        if isinstance(order, FinalRevisions):
            self.final = order
            return
        for stream in self.streams:
            task = asyncio.create_task(self._list(self._channel(stream.plan), order.prefix))
            self._lists.add(task)
            task.add_done_callback(self._lists.discard)

    async def _list(self, channel: grpc.aio.Channel, prefix: bytes) -> None:
        request = rpc_pb2.RangeRequest(key=prefix, range_end=prefix_end(prefix))
        try:
            call: Any = channel.unary_unary(RANGE)
            await call(request.SerializeToString(), metadata=self.plan.target.metadata)
        except grpc.aio.AioRpcError as error:
            self.report.failed.append(f"a list failed: {failure_of(error)}")
        else:
            self.report.listed += 1

    def _channel(self, stream: PlannedStream) -> grpc.aio.Channel:
        # A local subchannel pool gives each channel its own connection. The slow stream has a connection to itself with
        # a small window, so that the server soon notices that it is not read, and no other stream is affected.
        number = -1 if stream.pause_s else stream.channel
        if number not in self._channels:
            options: list[tuple[str, Any]] = [
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.max_receive_message_length", -1),
            ]
            if stream.pause_s:
                options += [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
            self._channels[number] = self.plan.target.channel(*options)
        return self._channels[number]

    async def _run_stream(self, stream: LoadStream) -> None:
        call: Any = self._channel(stream.plan).stream_stream(WATCH)(metadata=self.plan.target.metadata)
        try:
            await stream.run(call)
        except (grpc.aio.AioRpcError, ConnectionError) as error:
            text = str(error)
            if isinstance(error, grpc.aio.AioRpcError):
                # Once a server has answered, its closing the connection says nothing about TLS or gRPC.
                refused = not stream.ids
                text = (
                    failure_of(error, self.plan.target.secure) if refused else f"{error.code().name}: {error.details()}"
                )
            self.report.failed.append(f"a stream ended: {text}")
        finally:
            call.cancel()

    async def run(self, parent: Parent) -> None:
        """Open all streams, record, and report until `leave` is called."""
        tasks = [asyncio.create_task(self._run_stream(stream)) for stream in self.streams]
        try:
            while not self._leaving.is_set():
                if self.final is not None:
                    self.report.finished = sum(stream.finished(self.final) for stream in self.streams)
                parent.write_line(self.report)
                try:
                    await asyncio.wait_for(self._leaving.wait(), REPORT_S)
                except TimeoutError:
                    continue
        finally:
            for task in (*tasks, *self._lists):
                task.cancel()
            await asyncio.gather(*tasks, *self._lists, return_exceptions=True)
            for channel in self._channels.values():
                await channel.close()
            self.recorder.close()
            self.report.recorded = True
            parent.write_line(self.report)


async def _main(plan: ClientPlan, parent_fd: int | None) -> None:
    client = LoadClient(plan)
    parent = await Parent.join(parent_fd, client.read_order, client.leave)
    on_signals(client.leave)
    parent.write_line(ChildReady())
    await client.run(parent)
    await parent.leave()


@click.command()
@click.option("--plan", "path", required=True)
@click.option("--parent-fd", type=int, default=None)
def main(path: str, parent_fd: int | None) -> None:
    """Run a plan (a msgpack file) and report to the parent process."""
    plan = msgspec.msgpack.decode(Path(path).read_bytes(), type=ClientPlan)
    asyncio.run(_main(plan, parent_fd))


if __name__ == "__main__":
    main()
