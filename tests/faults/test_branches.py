"""Watches of many ranges and kinds while etcd is away: it is written to meanwhile, and returns."""

from __future__ import annotations

from itertools import product

from coalesce.guarantees.checkers import WatchLog, check
from proto.pb import rpc_pb2
from proxy.measuring.load.judge import read_truth
from proxy.measuring.load.target import LoadTarget
from tests.e2e.judging import log_of
from tests.e2e.raw_client import RawClient, WatchStream
from tests.e2e.running import Etcd, direct, next_to_etcd
from tests.etcd.server import EtcdServer
from tests.faults.relay import relay_to
from tests.faults.scene import PREFIX, PREFIX_END, also_with_a_cover, split_proxy
from tests.waiting import until_async

pytestmark = also_with_a_cover()

NOPUT, NODELETE = rpc_pb2.WatchCreateRequest.FilterType.values()
KEYS = [PREFIX + key for key in (b"a", b"b", b"b/1", b"b/2", b"c")]
RANGES = [
    *((key, b"") for key in (*KEYS[:3], PREFIX + b"quiet")),
    (PREFIX, PREFIX_END),
    (PREFIX + b"b/", PREFIX + b"b0"),
    (PREFIX + b"a", PREFIX + b"b/2"),
]
KINDS: list[dict[str, object]] = [
    {},
    {"prev_kv": True, "progress_notify": True},
    {"filters": [NOPUT]},
    {"filters": [NODELETE], "fragment": True},
]


class Watched:
    """One watch, on a stream of its own."""

    def __init__(self, stream: WatchStream, key: bytes, range_end: bytes, start: int, kind: dict[str, object]) -> None:
        self.stream = stream
        self._spec = key, range_end, start
        self._kind = kind
        stream.create(key, range_end, start, **kind)

    def log(self) -> WatchLog:
        """Return what it received, for the checkers."""
        filters = self._kind.get("filters", ())
        assert isinstance(filters, list | tuple)
        log = log_of(self.stream, *self._spec)
        log.no_put, log.no_delete = NOPUT in filters, NODELETE in filters
        log.prev_kv = bool(self._kind.get("prev_kv"))
        return log


async def watch_all(client: RawClient, start: int) -> list[Watched]:
    """Open a watch of each range and kind, and wait for their `created`."""
    made = [Watched(client.watch(), *span, start, kind) for span, kind in product(RANGES, KINDS)]
    for each in made:
        await each.stream.created()
    return made


async def write(store: Etcd, rounds: int) -> int:
    """Put, delete, and do both in one transaction over all keys; return the last revision."""
    for number in range(rounds):
        value = b"%d" % number
        await store.put(KEYS[number % len(KEYS)], value)
        await store.kv.DeleteRange(rpc_pb2.DeleteRangeRequest(key=KEYS[0]))
        puts = [rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=key, value=value)) for key in KEYS[1:]]
        drop = rpc_pb2.RequestOp(request_delete_range=rpc_pb2.DeleteRangeRequest(key=KEYS[0]))
        last = await store.kv.Txn(rpc_pb2.TxnRequest(success=[*puts, drop]))
    return int(last.header.revision)


async def test_writes_while_etcd_is_away_reach_each_range(etcd: EtcdServer) -> None:
    async with (
        relay_to(etcd.client_port) as way,
        split_proxy(etcd.endpoint, way.endpoint) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port) as client,
    ):
        first = await write(store, 3)
        watched = await watch_all(client, 0) + await watch_all(client, first - 4)
        stats = next_to_etcd(proxy).engine.stats
        for number in range(2):
            await until_async(lambda n=number: stats.upstream_resumed > n, "the connection")  # type: ignore[misc]
            way.cut()
            await until_async(lambda n=number: stats.upstream_broken > n, "the break")  # type: ignore[misc]
            revision = await write(store, 20)
            # From now, from the window, and from revisions that the proxy has not received.
            for start in (0, first, revision - 5, revision + 5):
                span, kind = RANGES[len(watched) % len(RANGES)], KINDS[start % len(KINDS)]
                watched.append(Watched(client.watch(), *span, start, kind))
            way.mend()
            last = await write(store, 5)
            await until_async(lambda: proxy.engine.core.stats.watches == len(watched), "all watches")
        last = await write(store, 1)
        for each in watched:
            each.stream.progress()
        truth = await read_truth(LoadTarget(address=etcd.endpoint), PREFIX, 1, last)
        for each in watched:
            await until_async(
                lambda e=each: any(answer.watch_id == -1 for answer in e.stream.responses),  # type: ignore[misc]
                "progress",
            )
            assert check(each.log(), truth, last, safe_headers=True) == [], each.log()
