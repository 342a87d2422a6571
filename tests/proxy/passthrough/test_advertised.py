"""`--advertise-client-url`: clients that take their endpoints from the cluster stay with the proxy."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from proto.framing import Status, frame
from proto.pb import rpc_pb2
from proxy.config.knobs import ListenerTable, Settings
from proxy.passthrough.advertised import MEMBER_LIST, rules
from proxy.process.serving import proxy_of
from tests.e2e.raw_client import RawClient, RawStream
from tests.e2e.running import proxy_for
from tests.etcd.server import HOST, EtcdServer, free_port
from tests.proxy_process import ProxyProcess
from tests.upstream.certificates import make_certificates

URL = "http://proxy.example:2379"
LINEARIZABLE = rpc_pb2.MemberListRequest(linearizable=True).SerializeToString()


async def member_list(port: int, body: bytes = frame(LINEARIZABLE), *metadata: tuple[str, str]) -> RawStream:
    """Request the member list, and return the call when it is over."""
    async with await RawClient.connect(port) as client:
        stream = client.call(MEMBER_LIST.decode(), list(metadata))
        stream.send_raw(body, end=True)
        await stream.end()
        return stream


def members(stream: RawStream) -> rpc_pb2.MemberListResponse:
    assert (stream.status, stream.text) == (Status.OK, "")
    return rpc_pb2.MemberListResponse.FromString(stream.messages[0])


async def test_members_have_the_advertised_url_without_other_changes(etcd: EtcdServer) -> None:
    learner = f"http://{HOST}:{free_port()}"
    etcd.ctl("member", "add", "later", "--learner", f"--peer-urls={learner}")
    theirs = await member_list(etcd.client_port)
    async with proxy_for(etcd) as plain, proxy_for(etcd, advertised=URL) as proxy:
        untouched, ours = await member_list(plain.port), await member_list(proxy.port)
        assert untouched.messages == theirs.messages
        expected = members(theirs)
        started, later = sorted(expected.members, key=lambda member: member.name, reverse=True)
        assert (list(started.clientURLs), list(later.clientURLs), later.isLearner) == ([etcd.url], [], True)
        started.clientURLs[:] = [URL]
        assert members(ours) == expected
        # With any encoding of the request and the response.
        packed = frame(gzip.compress(LINEARIZABLE), compressed=True)
        assert members(await member_list(proxy.port, packed, ("grpc-encoding", "gzip"))) == expected
        assert members(await member_list(proxy.port, frame(b""))) == expected
        # The proxy does not decode the request: etcd judges it.
        for body, metadata in ((frame(b"\xff\xff"), ()), (packed, (("grpc-encoding", "snappy"),))):
            refused = await member_list(proxy.port, body, *metadata)
            judged = await member_list(etcd.client_port, body, *metadata)
            assert refused.status not in (None, Status.OK)
            assert (refused.status, refused.text) == (judged.status, judged.text)
        assert proxy.passthrough.stats.partial_bytes == 0


def test_etcdctl_stays_with_the_proxy(etcd: EtcdServer) -> None:
    etcd.ctl("member", "add", "later", "--learner", f"--peer-urls=http://{HOST}:{free_port()}")
    proxy = ProxyProcess(etcd.endpoint, ["--namespace=/ns/"])
    proxy.extra.append(f"--advertise-client-url={proxy.endpoint}")
    with proxy:

        def ctl(*arguments: str) -> str:
            return etcd.ctl(*arguments, endpoint=proxy.endpoint).stdout

        url = f"http://{proxy.endpoint}"
        (started, later) = sorted(ctl("member", "list").splitlines(), key=lambda line: "unstarted" in line)
        assert url in started
        assert etcd.url not in started
        assert "unstarted" in later
        assert ctl("endpoint", "status", "--cluster").split(",")[0] == url
        assert ctl("endpoint", "health", "--cluster").startswith(f"{url} is healthy")
        # The ids in the list are still valid for changes.
        assert "removed from cluster" in ctl("member", "remove", later.split(",")[0])
        assert len(etcd.ctl("member", "list").stdout.splitlines()) == 1
        ctl("put", "a", "1")
        assert etcd.ctl("get", "--prefix", "", "--keys-only").stdout == "/ns/a\n\n"


def test_unknown_fields_of_members_are_kept() -> None:
    (translation,) = rules(URL).translations.values()
    member = rpc_pb2.Member(ID=1, name="a", clientURLs=["http://1", "http://2"])
    later = rpc_pb2.MemberListResponse(members=[member]).SerializeToString() + b"\xa2\x06\x03new"
    answer = translation.to_client(later)
    member.clientURLs[:] = [URL]
    assert answer == rpc_pb2.MemberListResponse(members=[member]).SerializeToString() + b"\xa2\x06\x03new"
    assert translation.to_etcd(b"anything") == b"anything"


@pytest.mark.parametrize(("secure", "url"), [(False, "http://proxy:1"), (True, "https://proxy:1")])
def test_url_without_scheme_gets_the_listeners_scheme(tmp_path: Path, secure: bool, url: str) -> None:
    files = make_certificates(tmp_path)
    certificate, key = (files.server_cert, files.server_key) if secure else ("", "")
    settings = Settings(listener=ListenerTable(advertise_client_url="proxy:1", cert_file=certificate, key_file=key))
    assert proxy_of(settings, ["127.0.0.1:2379"])._settings.advertised == url
