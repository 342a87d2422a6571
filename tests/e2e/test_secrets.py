"""The log holds no secrets: a run at debug level with tokens, passwords and values, whose log is searched for them."""

from __future__ import annotations

import asyncio
import base64
import io
import logging

import pytest
import structlog

from proto.pb import rpc_pb2
from proxy import logs
from proxy.passthrough.settings import PassthroughSettings
from tests.e2e.attacks import ATTACKS
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct, proxy_for
from tests.e2e.scenario import run
from tests.etcd.server import EtcdServer
from tests.waiting import until_async

SECRETS = (b"tok3n-of-a-client", b"passw0rd-of-somebody", b"valu3-of-somebody", b"metadat4-of-somebody")


def test_a_debug_log_holds_no_secrets(etcd: EtcdServer, capfd: pytest.CaptureFixture[str]) -> None:
    token, password, value, private = SECRETS
    stream = io.StringIO()
    logs.configure("debug", "json", stream)
    root = logging.getLogger()
    everything = logging.StreamHandler(stream)
    root.addHandler(everything)
    level = root.level
    root.setLevel(logging.DEBUG)
    metadata = [("token", token.decode()), ("authorization", token.decode()), ("x-private", private.decode())]

    async def scenario() -> None:
        async with (
            proxy_for(etcd, passthrough=PassthroughSettings(call_wait_s=0.2)) as proxy,
            direct(etcd) as store,
            await RawClient.connect(proxy.port) as client,
        ):
            stream = await client.open_watch(b"a", prev_kv=True, metadata=metadata)
            for _ in range(3):
                await store.put(b"a", value)
            await until_async(lambda: len(stream.values) == 3, "the events")
            put = rpc_pb2.PutRequest(key=b"a", value=value).SerializeToString()
            assert (await client.unary("/etcdserverpb.KV/Put", put, metadata)).status == 0
            login = rpc_pb2.AuthenticateRequest(name="root", password=password.decode()).SerializeToString()
            await client.unary("/etcdserverpb.Auth/Authenticate", login, metadata)
            await client.unary("/no.Such/Method", value, [*metadata, ("grpc-timeout", "nonsense")])
            # Malformed heads and messages, whose error texts could quote the input.
            client.request([(":method", "GET"), (":scheme", "http"), (":path", "/x"), (":authority", "x"), *metadata])
            client.call("/etcdserverpb.Watch/Watch", [*metadata, ("grpc-timeout", private.decode())])
            client.watch(metadata).raw.send(b"\xff" + value)
            await ATTACKS["metadata bomb"].run(proxy.port)
            await asyncio.to_thread(etcd.kill)
            await until_async(lambda: proxy.pool.down, "the proxy to notice")
            await client.unary("/etcdserverpb.KV/Put", put, metadata)

    try:
        run(scenario())
    finally:
        root.removeHandler(everything)
        root.setLevel(level)
        structlog.reset_defaults()
    output = capfd.readouterr()
    text = stream.getvalue() + output.out + output.err
    assert "upstream watches are at this etcd" in text
    for secret in SECRETS:
        for form in (secret.decode(), base64.b64encode(secret).decode()[:16]):
            assert form not in text, [line for line in text.splitlines() if form in line][:3]
