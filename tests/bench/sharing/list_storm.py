"""List storms: many clients, each on a connection of its own, list the same keys at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from typing import cast

from proto.pb import rpc_pb2
from tests.bench.caller import RANGE
from tests.bench.cases import PEER, Case
from tests.bench.profiles import DATA, HEADERS, frame
from tests.bench.sharing.bystander import MemoryPeak, load, load_command, quantiles
from tests.bench.sharing.front import Figures, Front, Scenario
from tests.bench.sharing.lists import cpu_s
from tests.bench.targets import TARGETS, Target
from tests.bench.wire import END_STREAM, RawClient, RequestBlocks, message_frame
from tests.e2e.running import direct
from tests.etcd.server import HOST, EtcdServer
from tests.upstream.certificates import Certificates

KEYS = 20_000
VALUE_BYTES = 1_000
CONNECTING = 100
"""Connections opened at a time."""
LIMIT_S = 900.0
SENT = "etcd_network_client_grpc_sent_bytes_total"
RANGES = 'grpc_server_started_total{grpc_method="Range",grpc_service="etcdserverpb.KV",grpc_type="unary"}'


class Lister(RawClient):
    """One client that lists all keys once."""

    def __init__(self, authority: str) -> None:
        super().__init__()
        self._blocks = RequestBlocks(RANGE, authority)
        self._began = 0.0
        self.received = 0
        self.delay = 0.0
        """Seconds until the answer was complete; 0 before."""
        self.over = asyncio.Event()

    def list(self) -> None:
        """Send the request."""
        message = rpc_pb2.RangeRequest(key=b"list/", range_end=b"list0").SerializeToString()
        self._began = time.perf_counter()
        head = frame(HEADERS, 4, 1, self._blocks.take())
        self.transport.write(head + message_frame(1, message, END_STREAM))

    def on_frame(self, kind: int, flags: int, stream: int, data: bytes, start: int, end: int) -> None:
        del stream, data
        if kind == DATA:
            self.received += end - start
        if flags & END_STREAM:
            self.delay = time.perf_counter() - self._began
            self.over.set()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.over.set()


async def storm(port: int, count: str) -> str:
    """List with so many clients at once; return the seconds and bytes of each, as JSON."""
    loop, listers, clients = asyncio.get_running_loop(), list[Lister](), int(count)
    for _ in range(0, clients, CONNECTING):
        made = (
            loop.create_connection(lambda: Lister(f"{HOST}:{port}"), HOST, port)
            for _ in range(min(CONNECTING, clients - len(listers)))
        )
        listers += [lister for _, lister in await asyncio.gather(*made)]
    for lister in listers:
        lister.list()
    async with asyncio.timeout(LIMIT_S):
        await asyncio.gather(*(lister.over.wait() for lister in listers))
    return json.dumps({"delays": [each.delay for each in listers], "bytes": [float(each.received) for each in listers]})


async def _write(etcd: EtcdServer) -> None:
    async with direct(etcd) as store:
        for first in range(0, KEYS, 100):
            puts = [
                rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=b"list/%06d" % number, value=b"v" * VALUE_BYTES))
                for number in range(first, first + 100)
            ]
            await store.kv.Txn(rpc_pb2.TxnRequest(success=puts))


@contextlib.contextmanager
def server_before(front: Front, etcd: EtcdServer, *flags: str) -> Iterator[Target]:
    """Yield the clients' server."""
    if front.name == PEER:
        # No certificates: the case has no TLS.
        with TARGETS[PEER](Case("list storm", "", 0, 0), etcd, cast("Certificates", None)) as target:
            yield target
        return
    with front.before(etcd.endpoint, *flags):
        yield front.server(etcd)


def storm_of(clients: int) -> Scenario:
    """Make the scenario of so many clients."""

    async def listed(port: int) -> dict[str, list[float]]:
        async with load("tests.bench.sharing.list_storm", "list", str(clients), str(port)) as said:
            found: dict[str, list[float]] = json.loads(await said)
        return found

    def scenario(front: Front) -> Figures:
        with EtcdServer() as etcd:
            asyncio.run(_write(etcd))
            with server_before(front, etcd) as server:
                before, cpu = etcd.metrics(), cpu_s(etcd)
                with MemoryPeak(server) as peak:
                    found = asyncio.run(listed(server.port))
                after = etcd.metrics()
                whole = max(found["bytes"])
                assert whole > KEYS * VALUE_BYTES, "an answer with all keys"
                return {
                    "complete answers": sum(size == whole for size in found["bytes"]),
                    "ranges at etcd": after[RANGES] - before[RANGES],
                    "etcd CPU s": cpu_s(etcd) - cpu,
                    "etcd sent MiB": (after[SENT] - before[SENT]) / 2**20,
                    **quantiles("list", found["delays"]),
                    "server memory peak MiB": peak.mib,
                }

    return scenario


SCENARIOS: dict[str, Scenario] = {f"list storm: {clients:,} clients": storm_of(clients) for clients in (50, 200, 1_000)}


main = load_command({"list": storm})


if __name__ == "__main__":
    main()
