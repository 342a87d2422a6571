"""The metadata of the proxy's own calls and streams, as etcd sees it."""

from __future__ import annotations

from tests.e2e.raw_client import RawClient
from tests.e2e.running import proxy_for
from tests.etcd.server import EtcdServer

REQUESTS = "etcd_server_client_requests_total"


async def test_own_streams_and_calls_name_their_api_version() -> None:
    """etcd counts requests by `client-api-version`, and as "unknown" without."""
    with EtcdServer() as etcd:
        async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port) as client:
            stream = client.watch()
            stream.create(b"a")
            assert (await stream.next()).created
            counted = {name: count for name, count in etcd.metrics().items() if name.startswith(REQUESTS)}
            assert set(counted) == {
                f'{REQUESTS}{{client_api_version="3.5",type="{kind}"}}' for kind in ("stream", "unary")
            }
            assert all(counted.values())
