"""HTTP/2 and HTTP/1 from third-party tools, plain and over TLS, through the proxy to a real etcd."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from proto.framing import frame
from proto.pb import rpc_pb2
from tests.clients.tools import use
from tests.etcd.server import EtcdServer
from tests.proxy_process import ProxyProcess
from tests.upstream.certificates import Certificates, make_certificates

RANGE = "/etcdserverpb.KV/Range"
HEADERS = ("content-type: application/grpc", "te: trailers")


@dataclass(frozen=True)
class Stage:
    """A proxy in front of an etcd, and a request to send."""

    plain: str
    secure: str
    files: Certificates
    request: Path


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    directory = tmp_path_factory.mktemp("tools")
    files = make_certificates(directory)
    request = directory / "request"
    request.write_bytes(frame(rpc_pb2.RangeRequest(key=b"k").SerializeToString()))
    secured = [f"--cert-file={files.server_cert}", f"--key-file={files.server_key}"]
    with (
        EtcdServer() as etcd,
        ProxyProcess(etcd.endpoint) as plain,
        ProxyProcess(etcd.endpoint, secured) as secure,
    ):
        etcd.ctl("put", "k", "v")
        yield Stage(f"http://{plain.endpoint}", f"https://{secure.endpoint}", files, request)


def options(flag: str) -> list[str]:
    """Return the headers of a gRPC call, each after `flag`."""
    return [part for header in HEADERS for part in (flag, header)]


@pytest.mark.parametrize("secure", [False, True])
def test_curl_makes_a_grpc_call(stage: Stage, secure: bool) -> None:
    version = ["--http2", f"--cacert={stage.files.ca}"] if secure else ["--http2-prior-knowledge"]
    version = [part for option in version for part in option.split("=")]
    url = (stage.secure if secure else stage.plain) + RANGE
    said = use("curl", "-s", "-S", "-v", *version, *options("-H"), "--data-binary", f"@{stage.request}", url, "-o", "-")
    assert "HTTP/2 200" in said
    assert "grpc-status: 0" in said
    assert "\x0a\x01k" in said


@pytest.mark.parametrize("secure", [False, True])
def test_curl_reads_pages_over_http1(stage: Stage, secure: bool) -> None:
    url = (stage.secure if secure else stage.plain) + "/version"
    said = use("curl", "-s", "-S", "-v", "--http1.1", "--cacert", stage.files.ca, url)
    assert "HTTP/1.1 200" in said
    assert '"etcdserver"' in said
    assert not secure or "server accepted http/1.1" in said


def test_curl_upgrades_over_tls_by_itself(stage: Stage) -> None:
    """Without a version option curl offers both and gets HTTP/2, on which no page is served."""
    said = use("curl", "-s", "-S", "-v", "--cacert", stage.files.ca, f"{stage.secure}/version")
    assert "server accepted h2" in said


@pytest.mark.long
@pytest.mark.parametrize("secure", [False, True])
def test_nghttp_finds_no_protocol_error(stage: Stage, secure: bool) -> None:
    url = (stage.secure if secure else stage.plain) + RANGE
    said = use("nghttp", "-v", "--no-verify-peer", "-H", ":method: POST", *options("-H"), "-d", stage.request, url)
    assert "grpc-status: 0" in said
    assert "RST_STREAM" not in said
    assert "protocol error" not in said.lower()


@pytest.mark.long
@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize(("clients", "streams", "calls"), [(10, 100, 20_000), (1, 10_000, 20_000), (200, 1, 4_000)])
def test_all_calls_of_h2load_succeed(stage: Stage, secure: bool, clients: int, streams: int, calls: int) -> None:
    """Every call succeeds: many connections, many streams, both."""
    url = (stage.secure if secure else stage.plain) + RANGE
    shape = [f"-n{calls}", f"-c{clients}", f"-m{streams}"]
    said = use("h2load", *shape, *options("-H"), "-d", stage.request, url)
    found = re.search(r"requests: (\d+) total, .* (\d+) succeeded, (\d+) failed, (\d+) errored", said)
    assert found is not None, said
    assert found.groups() == (str(calls), str(calls), "0", "0"), said
