"""The recipe in docs/operations.md, "Will it help?": etcd's metrics show to how many watches each write goes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import grpc.aio

from proto.pb import rpc_pb2, rpc_pb2_grpc
from tests.etcd.server import EtcdServer
from tests.waiting import run, until_async

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
NAMES = {
    "events": "etcd_debugging_mvcc_events_total",
    "puts": "etcd_mvcc_put_total",
    "deletes": "etcd_mvcc_delete_total",
    "streams": "etcd_debugging_mvcc_watch_stream_total",
}


def test_the_recipe_names_exactly_these_metrics() -> None:
    recipe = PAGE.read_text().partition("## Will it help?")[2].partition("\n## ")[0]
    assert set(re.findall(r"\betcd_[a-z_]+\b", recipe)) == set(NAMES.values())


def test_etcd_counts_to_how_many_watches_a_write_goes(etcd: EtcdServer) -> None:
    async def scenario() -> dict[str, float]:
        async with grpc.aio.insecure_channel(etcd.endpoint) as channel:
            calls = []
            for _ in range(6):
                call: Any = rpc_pb2_grpc.WatchStub(channel).Watch()
                create = rpc_pb2.WatchCreateRequest(key=b"/recipe/", range_end=b"/recipe0")
                await call.write(rpc_pb2.WatchRequest(create_request=create))
                assert (await call.read()).created
                calls.append(call)
            before = etcd.metrics()
            kv = rpc_pb2_grpc.KVStub(channel)
            for _ in range(10):
                await kv.Put(rpc_pb2.PutRequest(key=b"/recipe/a", value=b"1"))
                await kv.DeleteRange(rpc_pb2.DeleteRangeRequest(key=b"/recipe/a"))

            def counted() -> dict[str, float]:
                after = etcd.metrics()
                return {name: after[metric] - before[metric] for name, metric in NAMES.items()}

            await until_async(lambda: counted()["events"] >= 120, "all events")
            assert before[NAMES["streams"]] >= len(calls)
            return counted()

    counts = run(scenario())
    assert counts["events"] / (counts["puts"] + counts["deletes"]) == 6
