"""The watch client with different members: streams on connections to servers of several versions."""

from __future__ import annotations

from proto.framing import Status
from tests.upstream.recorder import Recorder, watching
from tests.upstream.scripted import ScriptedCall, scripted
from tests.upstream.stories import Opened, request
from tests.waiting import until_async


def requests(call: ScriptedCall) -> list[str]:
    """Return the requests of a Watch call in words."""
    return [request(message) for message in call.messages]


async def test_progress_order_is_known_per_stream() -> None:
    """During an upgrade, behind a load balancer: the new connection leads to a member with ordered progress."""
    async with scripted() as etcd:
        etcd.version = "3.5.12"
        seen = Recorder()
        a, fill = Opened(b"a"), Opened(b"f", start_revision=1, is_backfill=True)
        async with watching(etcd.endpoint, seen) as client:
            await seen.open(client, a)
            first = etcd.watches()[0]
            etcd.version = "3.5.30"
            first.connection.go_away(2**31 - 1)
            await seen.open(client, fill)
            assert client.ordered_progress
            client.request_progress(1)
            await until_async(lambda: seen.progress(fill) == 10, "the proof of the new stream")
            await until_async(lambda: "probe" in requests(first), "the probe of the old stream")
            assert requests(first) == ["create a from 0", "probe"]
            first.end(Status.UNAVAILABLE, "gone")
            await until_async(lambda: len(etcd.watches()) == 3 and etcd.watches()[2].messages, "the watch again")
            client.request_progress(2)
            await until_async(lambda: seen.progress(a) == 10, "the proof of the watch")
