"""How endpoints are written, and how often one is retried."""

from __future__ import annotations

import pytest

from upstream.endpoints import Backoff, Endpoint, parse_endpoint, parse_endpoints
from upstream.errors import BadEndpoint


@pytest.mark.parametrize(
    ("text", "expected", "authority"),
    [
        ("127.0.0.1:2379", ("127.0.0.1", 2379, "", None), b"127.0.0.1:2379"),
        ("etcd-0.etcd.svc.cluster.local:2379", ("etcd-0.etcd.svc.cluster.local", 2379, "", None), None),
        ("http://etcd:23790", ("etcd", 23790, "", False), b"etcd:23790"),
        ("HTTPS://etcd:2379", ("etcd", 2379, "", True), b"etcd:2379"),
        ("https://etcd:1/", ("etcd", 1, "", True), b"etcd:1"),
        ("[::1]:2379", ("::1", 2379, "", None), b"[::1]:2379"),
        ("http://[fe80::1%eth0]:2379", ("fe80::1%eth0", 2379, "", False), None),
        ("my_host:99", ("my_host", 99, "", None), None),
        ("unix:///run/etcd.sock", ("localhost", 0, "/run/etcd.sock", None), b"localhost"),
        ("unixs:///run/etcd.sock", ("localhost", 0, "/run/etcd.sock", True), b"localhost"),
        ("unix:etcd.sock", ("localhost", 0, "etcd.sock", None), b"localhost"),
        ("unix://localhost:m0", ("localhost", 0, "localhost:m0", None), b"localhost"),
    ],
)
def test_each_form_of_an_endpoint_is_read(
    text: str, expected: tuple[str, int, str, bool | None], authority: bytes | None
) -> None:
    endpoint = parse_endpoint(text)
    assert (endpoint.host, endpoint.port, endpoint.path, endpoint.secure) == expected
    assert endpoint.text == text
    if authority is not None:
        assert endpoint.authority == authority


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("ftp://etcd:2379", "the scheme 'ftp' is unknown"),
        ("http://", "the host is missing"),
        (":2379", "the host is missing"),
        ("etcd", "the port is missing; write etcd:2379, or the port"),
        ("https://etcd", "the port is missing; write https://etcd:2379, "),
        ("http://[::1]/", r"the port is missing; write http://\[::1\]:2379, "),
        ("etcd:", "'' is not a port"),
        ("etcd:http", "'http' is not a port"),
        ("etcd:0", "'0' is not a port"),
        ("etcd:65536", "'65536' is not a port"),
        ("etcd:²", "is not a port"),
        ("::1", "needs brackets"),
        ("[::1", "is not a host name"),
        ("[::1]2379", "is not a host name"),
        ("[nonsense]:1", "is not a host name"),
        ("a b:2379", "separate endpoints by commas"),
        ("a:2379 b:2379", "separate endpoints by commas"),
        ("a:2379;b:2379", "separate endpoints by commas"),
        ("etcd..example:2379", "is not a host name"),
        ("http:etcd:2379", "'://' is missing; write http://etcd:2379"),
        ("http:/etcd:2379", "'://' is missing; write http://etcd:2379"),
        ("https//etcd:2379", "'://' is missing; write https://etcd:2379"),
        ("-etcd:2379", "is not a host name"),
        ("http://etcd:2379/v3", "a path after the port"),
        ("etcd:2379?x", "a path after the port"),
        ("http://root:pw@etcd:2379", "contains a user name"),
        ("root:pw@etcd:2379", "contains a user name"),
        ("unix://", "path of the socket is missing"),
    ],
)
def test_bad_endpoints_are_refused_with_an_explanation(text: str, complaint: str) -> None:
    with pytest.raises(BadEndpoint, match=complaint) as refusal:
        parse_endpoint(text)
    assert repr(text.replace("root:pw", "***")) in str(refusal.value)
    assert refusal.value.to_do


def test_lists_of_endpoints_keep_their_order_without_repeats() -> None:
    assert [endpoint.text for endpoint in parse_endpoints(" a:1, http://b:2,a:1 ")] == ["a:1", "http://b:2"]
    assert [endpoint.port for endpoint in parse_endpoints(["a:2", "b:1"])] == [2, 1]
    nothings: list[str | list[str]] = ["", " , ", []]
    for nothing in nothings:
        with pytest.raises(BadEndpoint, match="the list is empty"):
            parse_endpoints(nothing)
    gaps: list[str | list[str]] = ["a:1,", ",a:1", "a:1,,b:2", ["a:1", " "]]
    for gap in gaps:
        with pytest.raises(BadEndpoint, match="one of them is empty; give it, or remove its comma"):
            parse_endpoints(gap)
    assert parse_endpoints("unix:///run/my etcd;1.sock")[0].path == "/run/my etcd;1.sock"


@pytest.mark.parametrize(
    ("secure", "configured", "used"), [(None, True, True), (None, False, False), (True, False, True)]
)
def test_tls_follows_the_scheme(secure: bool | None, configured: bool, used: bool) -> None:
    assert Endpoint("x", "x", 1, "", secure).uses_tls(configured) is used
    assert Endpoint("x", "x", 1, "", False).uses_tls(True) is False


def test_backoff_is_at_once_and_then_doubles_to_a_bound() -> None:
    backoff = Backoff(0.02, 2.0, jitter=lambda: 1.0)
    assert [round(backoff.failed(0), 3) for _ in range(10)] == [0, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.0, 2.0]


def test_backoff_starts_over_only_after_a_success_that_held() -> None:
    backoff = Backoff(0.02, 2.0, jitter=lambda: 1.0)
    for _ in range(4):
        backoff.failed(10)
    backoff.succeeded(10)
    backoff.succeeded(11)
    assert backoff.failed(11.9) == pytest.approx(0.16)
    backoff.succeeded(20)
    assert backoff.failed(22) == 0


def test_backoff_has_jitter_down_to_half() -> None:
    delays = []
    for jitter in (0.0, 0.5):
        backoff = Backoff(0.02, 2.0, jitter=lambda jitter=jitter: jitter)  # type: ignore[misc] # bound at once
        backoff.failed(0)
        delays.append(backoff.failed(0))
    assert delays == [0.01, 0.015]
