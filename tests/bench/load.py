"""The load generator: raw HTTP/2 connections that open Watch streams and count what arrives.

A bench client must cost less than its subject, so it decodes nothing: once all watches are created, it searches the
received bytes for the marker that every value has; the time of the write follows the marker, which gives the delay. It
runs as a separate process: the case and the target are arguments, commands come on standard input, results go to
standard output, one line of JSON each.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import ssl
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import uvloop

from proto.pb import rpc_pb2
from tests.bench.arrivals import Arrivals
from tests.bench.caller import PUT, RANGE, connect, drive, stamped
from tests.bench.cases import CASES, Case, Kind
from tests.bench.profiles import DATA, GOAWAY, HEADERS, PROFILES, RST_STREAM, frame
from tests.bench.wire import (
    MARKER,
    STAMP_DIGITS,
    RawClient,
    RequestBlocks,
    key_of,
    message_frame,
    range_of,
    unpack_head,
)

WATCH = "/etcdserverpb.Watch/Watch"
CREATED = b"\x18\x01"
_message_bytes = struct.Struct(">xI").unpack_from
CONTROL_BYTES_MAX = 120
"""A `created` answer is shorter; a response with events has a value with a marker, or is a delete (mixed cases)."""
CREATES_AT_ONCE = 1000
"""Creates of a stream that are sent without waiting for answers: they fit into the 64 KiB window of a server."""

SILENCE_S = 15.0
"""Once all writes are done and nothing was received for so long, the rest is lost."""
READ_SLICE_S = 0.02
_stamps = re.compile(MARKER + b"([0-9]{%d})" % STAMP_DIGITS).findall
_stamp = re.compile(MARKER + b"([0-9]{%d})" % STAMP_DIGITS).search


@functools.lru_cache(10_000)
def _key_request(index: int) -> bytes:
    create = rpc_pb2.WatchCreateRequest(key=key_of(index))
    return rpc_pb2.WatchRequest(create_request=create).SerializeToString()


def create_request(case: Case, watch: int, start_revision: int) -> bytes:
    """Encode the request of the watch of this number."""
    if case.keys:
        return _key_request(watch % case.ranges)
    key, end = range_of(watch % case.ranges)
    options = cast(dict[str, Any], {"start_revision": start_revision} | case.variant(watch).options)
    create = rpc_pb2.WatchCreateRequest(key=key, range_end=end, **options)
    return rpc_pb2.WatchRequest(create_request=create).SerializeToString()


class Client(RawClient):
    """One connection with its streams."""

    def __init__(self, tally: Tally, case: Case, arrivals: Arrivals | None = None) -> None:
        super().__init__(PROFILES[case.profile]())
        self.arrivals = arrivals
        """Reads the connection; None: its transport does."""
        self.tally = tally
        self.case = case
        self.number = -1
        """Among the arrivals."""
        self.split: dict[int, bytes] = {}
        """The end of a stream's last frame, if that was not one whole message."""
        self.parts: dict[int, bytes] = {}
        """Before all watches are created: the messages of such streams."""
        self.seams = 0
        self.taken = 0
        self.counted = True
        self.created = 0
        self.watches = 0
        self.there = asyncio.Event()
        """All of its watches are created."""
        self.unsent: list[bytes] = []
        """Creates that wait for the answers to those before them."""
        self.sent = 0

    def open(self, first: int, streams: int, authority: str, start_revision: int) -> None:
        """Open streams, the first with the watch of number `first`."""
        case = self.case
        self.watches = streams * case.watches
        blocks = RequestBlocks(WATCH, authority, "https" if case.tls else "http")
        out = []
        for stream in range(1, 2 * streams, 2):
            out.append(frame(HEADERS, 4, stream, blocks.take()))
            for number in range(case.watches):
                create = message_frame(stream, create_request(case, first, start_revision))
                (out if number < CREATES_AT_ONCE else self.unsent).append(create)
                first += 1
        self.sent = self.watches - len(self.unsent)
        self.transport.write(b"".join(out))

    def _go_on(self) -> None:
        """Send further creates, once those before them are answered."""
        if self.unsent and self.created >= self.sent:
            part, self.unsent = self.unsent[:CREATES_AT_ONCE], self.unsent[CREATES_AT_ONCE:]
            self.sent += len(part)
            self.transport.write(b"".join(part))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.arrivals is not None:
            self.number = self.arrivals.read(self.transport, self.take)

    def data_received(self, data: bytes) -> None:
        """Take bytes whose time of arrival is not known."""
        now = time.monotonic_ns()
        self.take(data, now, now)

    def take(self, data: bytes, arrived_ns: int, now: int) -> None:
        """Count what arrived at that time and is read now."""
        size = len(data)
        if self.rest:
            data = self.rest + data
        at = self._walk(data)
        self.rest = data[at:]
        count = data.count(MARKER, 0, at) + self.seams
        if count:
            self.seams = 0
            self.tally.count(count, data, arrived_ns, now, self.case.mixed)
        if not self.tally.all_created:
            self.tally.look()
        elif self.case.read_bytes_s:
            self._slow_down(size)
        self.answer()

    def _walk(self, data: bytes) -> int:
        """Walk the frames; return the start of the first incomplete one."""
        at, size = 0, len(data)
        split = self.split
        used = self.used if self.profile.counts else None
        opening = not self.tally.all_created
        before = self.created
        while size - at >= 9:
            word, _, stream = unpack_head(data, at)
            end = at + 9 + (word >> 8)
            if end > size:
                break
            kind = word & 0xFF
            if kind != DATA:
                self.tally.broken += kind in (RST_STREAM, GOAWAY)
                self.control(kind, data[at + 4], data[at + 9 : end])
            else:
                if used is not None:
                    used[stream] = used.get(stream, 0) + (word >> 8)
                if end - at < 14 or _message_bytes(data, at + 9)[0] != end - at - 14:
                    self._seam(stream, data, at + 9, end)
                    if opening:
                        self._count_created(stream, data[at + 9 : end])
                    at = end
                    continue
                if stream in split:
                    del split[stream]
                if opening and end - at < CONTROL_BYTES_MAX and data.find(CREATED, at, end) >= 0:
                    self.created += data.find(MARKER, at, end) < 0
            at = end
        if self.created > before:
            self.tally.created += self.created - before
            self._go_on()
            if self.created >= self.watches:
                self.there.set()
        return at

    def _seam(self, stream: int, data: bytes, start: int, end: int) -> None:
        """Find a marker split over two frames: with small windows, a frame may end anywhere."""
        reach = len(MARKER) - 1
        tail = self.split.get(stream, b"")
        self.seams += MARKER in tail + data[start : min(end, start + reach)]
        self.split[stream] = (tail + data[max(start, end - reach) : end])[-reach:]

    def _count_created(self, stream: int, data: bytes) -> None:
        """Count the answers in frames that are not one whole message each."""
        data = self.parts.pop(stream, b"") + data
        at, size = 0, len(data)
        while size - at >= 5 and size - at >= (length := 5 + _message_bytes(data, at)[0]):
            message = data[at : at + length]
            self.created += length < CONTROL_BYTES_MAX and CREATED in message and MARKER not in message
            at += length
        if at < size:
            self.parts[stream] = data[at:]

    def _slow_down(self, size: int) -> None:
        self.taken += size
        if self.taken >= self.case.read_bytes_s * READ_SLICE_S:
            assert self.arrivals is not None, "no such case has TLS"
            self.arrivals.pause(self.number)
            pause_s = self.taken / self.case.read_bytes_s
            self.taken = 0
            asyncio.get_running_loop().call_later(pause_s, self.arrivals.resume, self.number)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.arrivals is not None:
            self.arrivals.close(self.number)
        if self.counted:
            self.tally.broken += 1


def quantile_ms(times: list[tuple[int, int]], share: float) -> float:
    """Return the ms that `share` of the events stayed below; `times`: nanoseconds, and events."""
    times.sort()
    wanted = share * sum(count for _, count in times)
    for time_ns, count in times:
        wanted -= count
        if wanted <= 0:
            return time_ns / 1e6
    return 0.0


class Tally:
    """The sum of what all connections have received."""

    def __init__(self, creates: int, early: int, expected: int) -> None:
        self.creates = creates
        self.created = 0
        self.early = early
        """Stamps of writes before the watches."""
        self.expected = expected
        self.stamps = 0
        self.broken = 0
        self.delays: list[tuple[int, int]] = []
        """Nanoseconds from the write to the arrival, and events."""
        self.lags: list[tuple[int, int]] = []
        """Nanoseconds from the arrival until this process read it, and events."""
        self.all_created = False
        self.ready = asyncio.Event()
        self.complete = asyncio.Event()
        self.first_ns = self.last_ns = 0

    def count(self, count: int, data: bytes, arrived_ns: int, now: int, mixed: bool) -> None:
        """Count stamps; the first of a chunk, the oldest, gives the delay of all (mixed: a prev_kv has an old one)."""
        self.stamps += count
        self.first_ns = self.first_ns or arrived_ns
        self.last_ns = max(self.last_ns, arrived_ns)
        self.look()
        if self.stamps >= self.expected:
            self.complete.set()
        if mixed:
            at = int(max(_stamps(data), default=b"0"))
        else:
            found = _stamp(data)
            if found is None:
                return
            at = int(found[1])
        self.delays.append((arrived_ns - at, count))
        self.lags.append((now - arrived_ns, count))

    def look(self) -> None:
        """Check whether all watches are created."""
        if self.created >= self.creates:
            self.all_created = True
            if self.stamps >= self.early:
                self.ready.set()

    async def all_came(self, event: asyncio.Event) -> bool:
        """Wait for an event as long as data arrives; return whether it happened."""
        seen = (-1, -1)
        while not event.is_set():
            if seen == (self.stamps, self.created):
                return False
            seen = (self.stamps, self.created)
            try:
                await asyncio.wait_for(event.wait(), SILENCE_S)
            except TimeoutError:
                continue
        return True


class Crowd:
    """All connections of a case."""

    def __init__(self, case: Case, host: str, ports: Sequence[int], certificate: tuple[str, str]) -> None:
        """`ports`: of servers that get the same number of connections each."""
        self.case = case
        self.host, self.ports = host, ports
        self.clients: list[Client] = []
        self.tls: ssl.SSLContext | None = None
        if case.tls:
            # The certificate is not verified here; only the cost of TLS matters.
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self.tls.check_hostname = False
            self.tls.verify_mode = ssl.CERT_NONE
            self.tls.set_alpn_protocols(["h2"])
            self.tls.load_cert_chain(*certificate)

    async def come(self, tally: Tally, start_revision: int = 0) -> None:
        """Open all connections and their streams."""
        case = self.case
        loop = asyncio.get_running_loop()
        share, rest = divmod(case.streams, case.connections)
        host = self.host

        # The transport decrypts TLS, so it must read as well.
        arrivals = None if self.tls else Arrivals()
        at_a_time = asyncio.Semaphore(case.at_a_time or case.connections)

        async def one(index: int) -> None:
            async with at_a_time:
                client = await connected(index)
                if case.at_a_time:
                    await client.there.wait()

        async def connected(index: int) -> Client:
            port = self.ports[index % len(self.ports)]
            _, client = await loop.create_connection(lambda: Client(tally, case, arrivals), host, port, ssl=self.tls)
            self.clients.append(client)
            first = (index * share + min(index, rest)) * case.watches
            client.open(first, share + (index < rest), f"{host}:{port}", start_revision)
            return client

        self.clients = []
        await asyncio.gather(*map(one, range(case.connections)))

    def go(self) -> None:
        """Cut all connections."""
        for client in self.clients:
            client.counted = False
            client.transport.abort()


async def watch(case: Case, crowd: Crowd, orders: asyncio.StreamReader) -> None:
    """Open everything, report it, wait for all events, report the counts; what exceeds the case's limit is missing."""
    early = case.expected(stamps=True, early=True)
    tally = Tally(case.watch_count, early, early + case.expected(stamps=True))
    started = time.monotonic()
    ready = False
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(case.limit_s):
            await crowd.come(tally, 2 if case.kind is Kind.CATCH_UP else 0)
            ready = await tally.all_came(tally.complete if case.kind is Kind.CATCH_UP else tally.ready)
    create_s = time.monotonic() - started
    say({"ready": ready, "created": tally.created, "create_s": create_s, "stamps": tally.stamps})
    if case.kind is Kind.CATCH_UP:
        report(tally, tally.stamps, 0)
    elif case.writes:
        early = tally.stamps
        tally.delays.clear()
        tally.lags.clear()
        tally.first_ns = 0
        await orders.readline()  # everything is written
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(case.limit_s):
                await tally.all_came(tally.complete)
        report(tally, tally.stamps - early, early)
    if case.kind is Kind.STORM:
        await orders.readline()
        behind = case.writes // 2
        again = Tally(case.watch_count, behind * case.watch_count, behind * case.watch_count)
        started = time.monotonic()
        crowd.go()
        await crowd.come(again, 2 + case.writes - behind)
        await again.all_came(again.ready)
        say({"create_s": time.monotonic() - started})
        report(again, again.stamps, 0)
    await orders.readline()


async def call(case: Case, host: str, port: int, orders: asyncio.StreamReader) -> None:
    """Make the case's calls."""
    path = PUT if case.call == "put" else RANGE
    key = range_of(0)[0] + b"k"

    def message() -> bytes:
        if path == PUT:
            return rpc_pb2.PutRequest(key=key, value=stamped(case.value_bytes)).SerializeToString()
        return rpc_pb2.RangeRequest(key=key).SerializeToString()

    callers = [await connect(host, port, PROFILES[case.profile]()) for _ in range(case.connections)]
    each = case.calls // case.connections
    in_flight = case.in_flight // case.connections

    async def all_calls(count: int) -> None:
        await asyncio.gather(*(drive(one, path, (message() for _ in range(count)), in_flight) for one in callers))

    await all_calls(each // 10)
    for caller in callers:
        caller.delays.clear()
    say({"ready": True})
    await orders.readline()
    started = time.monotonic()
    await all_calls(each)
    spent_s = time.monotonic() - started
    delays = sorted(delay for caller in callers for delay in caller.delays)
    say(
        {
            "stamps": len(delays),
            "lost": sum(caller.failed for caller in callers),
            "events_s": len(delays) / spent_s,
            "p50_ms": 1e3 * delays[len(delays) // 2],
            "p99_ms": 1e3 * delays[len(delays) * 99 // 100],
            "p100_ms": 1e3 * delays[-1],
        }
    )
    await orders.readline()


def report(tally: Tally, stamps: int, early: int) -> None:
    """Report the counts since it was ready."""
    span_s = max(1e-9, (tally.last_ns - tally.first_ns) / 1e9)
    figures = {f"p{share:g}_ms": quantile_ms(tally.delays, share / 100) for share in (50, 99, 100)}
    figures["unread_p99_ms"] = quantile_ms(tally.lags, 0.99)
    load_cpu_s = time.process_time()
    say(
        {
            "stamps": stamps,
            "missing": tally.expected - early - stamps,
            "stamps_s": stamps / span_s,
            "broken": tally.broken,
            "load_cpu_s": load_cpu_s,
            **figures,
        }
    )


async def run(case: Case, host: str, ports: Sequence[int], certificate: tuple[str, str]) -> None:
    """Run the case."""
    orders = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    if case.kind is Kind.CALLS:
        await call(case, host, ports[0], orders)
    else:
        await watch(case, Crowd(case, host, ports, certificate), orders)


def say(what: dict[str, Any]) -> None:
    """Report one line to the parent."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    name, profile, host, ports, certificate, key = sys.argv[1:]
    addressed = [int(port) for port in ports.split(",")]
    uvloop.run(run(replace(CASES[name], profile=profile), host, addressed, (certificate, key)))
