"""Durations, sizes and addresses: accepted and refused values, and the error texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.config.values import (
    Address,
    BadValue,
    check_readable,
    client_url,
    parse_address,
    parse_duration_s,
    parse_metrics_address,
    parse_size_bytes,
    show_duration,
    show_size,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("0s", 0.0),
        ("500ms", 0.5),
        ("10s", 10.0),
        ("1m30s", 90.0),
        ("2h0m0s", 7200.0),
        ("1.5h", 5400.0),
        ("250us", 0.00025),
        ("100ns", 1e-7),
        ("1d", 86400.0),
        (" 3s ", 3.0),
        (".5s", 0.5),
    ],
)
def test_durations_are_read_as_go_writes_them(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "x", "10 s", "10sec", "-1s", "-1", "1m-30s", "s", "1,5s", "nan", "inf", "1e400"])
def test_bad_durations_are_refused(text: str) -> None:
    with pytest.raises(BadValue, match="is not a duration; write it like 500ms, 10s or 1m30s"):
        parse_duration_s(text)


@pytest.mark.parametrize("text", ["5", "2.5", ".5", "00", "9" * 400])
def test_durations_without_a_unit_are_refused(text: str) -> None:
    """As by the flags of etcd and etcdctl."""
    with pytest.raises(BadValue, match="has no unit; write it like 500ms, 10s or 1m30s"):
        parse_duration_s(text)


@pytest.mark.parametrize("text", ["2562048h", "9223372037s", "9" * 400 + "h"])
def test_durations_that_no_timer_takes_are_refused(text: str) -> None:
    with pytest.raises(BadValue, match=r"is too long; the maximum is 292 years \(9223372036s\)$"):
        parse_duration_s(text)
    assert parse_duration_s("2562047h") == 2562047 * 3600


@pytest.mark.parametrize("text", ["9000000TiB", "9" * 400])
def test_sizes_that_no_machine_has_are_refused(text: str) -> None:
    with pytest.raises(BadValue, match=r"is too large; the maximum is 9223372036854775807 bytes$") as refused:
        parse_size_bytes(text)
    assert len(str(refused.value)) < 150


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1500000", 1_500_000),
        ("64MiB", 64 * 2**20),
        ("64M", 64 * 2**20),
        ("64mb", 64 * 2**20),
        ("1.5KiB", 1536),
        ("2 GiB", 2 * 2**30),
        ("1T", 2**40),
        ("12B", 12),
    ],
)
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    assert parse_size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1PiB", "MiB", "1 2"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(BadValue, match="is not a size"):
        parse_size_bytes(text)


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.5, 1.0, 1.5, 90.0, 60.0, 7200.0, 3600.0])
def test_a_shown_duration_reads_back(seconds: float) -> None:
    assert parse_duration_s(show_duration(seconds)) == seconds


@pytest.mark.parametrize(
    ("size", "text"), [(1048576, "1MiB"), (1536, "1536"), (2**31, "2GiB"), (4096, "4KiB"), (0, "0")]
)
def test_sizes_are_shown_round_where_they_are(size: int, text: str) -> None:
    assert show_size(size) == text
    assert parse_size_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:2379", Address("127.0.0.1", 2379)),
        ("localhost:0", Address("localhost", 0)),
        ("[::1]:2379", Address("::1", 2379)),
        (":23790", Address("0.0.0.0", 23790)),
        ("etcd-0.etcd.svc.cluster.local:2379", Address("etcd-0.etcd.svc.cluster.local", 2379)),
    ],
)
def test_addresses_to_listen_on(text: str, address: Address) -> None:
    assert parse_address(text, listening=True) == address


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("127.0.0.1", "has no port; write HOST:PORT"),
        ("", "has no port"),
        ("[::1]", "'[::1]' has no port"),
        ("127.0.0.1:1,127.0.0.1:2", "is a list; give one address"),
        ("127.0.0.1:", "'' in '127.0.0.1:' is not a port"),
        ("127.0.0.1:x", "'x' in '127.0.0.1:x' is not a port; it is a number from 0 to 65535"),
        ("127.0.0.1:65536", "is not a port"),
        ("127.0.0.1:-1", "is not a port"),
        ("127.0.0.1:²", "is not a port"),
        ("127.0.0.256:1", "'127.0.0.256' in '127.0.0.256:1' is not an IPv4 address"),
        ("[::g]:1", "is not an IPv6 address"),
        ("::1:2379", "write an IPv6 address in brackets"),
        ("a b:1", "'a b' in 'a b:1' is not a host name"),
        ("-x:1", "is not a host name"),
    ],
)
def test_bad_addresses_are_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(BadValue) as error:
        parse_address(text, listening=True)
    assert reason in str(error.value)


@pytest.mark.parametrize("text", [":2379", "127.0.0.1:0"])
def test_listen_only_addresses_cannot_be_connected_to(text: str) -> None:
    with pytest.raises(BadValue):
        parse_address(text)


@pytest.mark.parametrize("text", ["127.0.0.1:9379", "http://127.0.0.1:9379", "http://127.0.0.1:9379/"])
def test_metrics_addresses_are_plain_or_urls(text: str) -> None:
    assert parse_metrics_address(text) == Address("127.0.0.1", 9379)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("https://127.0.0.1:9379", "plain text"),
        ("ftp://127.0.0.1:9379", "unknown scheme 'ftp'"),
        ("http://127.0.0.1:9379/metrics", "remove the path"),
        ("http://127.0.0.1", "has no port"),
        ("9379", "has no port"),
    ],
)
def test_bad_metrics_addresses_are_refused(text: str, reason: str) -> None:
    with pytest.raises(BadValue) as error:
        parse_metrics_address(text)
    assert reason in str(error.value)


def test_addresses_are_written_with_brackets_where_needed() -> None:
    assert str(Address("::1", 1)) == "[::1]:1"
    assert str(Address("a", 1)) == "a:1"


def test_files_must_be_readable(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x")
    check_readable(str(tmp_path / "there"))
    with pytest.raises(BadValue, match="no such file"):
        check_readable(str(tmp_path / "missing"))
    with pytest.raises(BadValue, match="is a directory"):
        check_readable(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("", ""),
        ("127.0.0.1:23790", "http://127.0.0.1:23790"),
        ("http://proxy.example:2379", "http://proxy.example:2379"),
        ("HTTPS://proxy:2379/", "https://proxy:2379"),
        ("[::1]:2379", "http://[::1]:2379"),
        ("https://[fe80::1]:65535", "https://[fe80::1]:65535"),
    ],
)
def test_urls_for_clients_get_scheme_and_port(text: str, url: str) -> None:
    assert client_url(text) == url
    assert client_url(text, secure=True) == (url if "://" in text else url.replace("http:", "https:"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("proxy", "'proxy' has no port; write HOST:PORT, like 127.0.0.1:2379"),
        ("https://proxy", "'proxy' has no port; write HOST:PORT, like 127.0.0.1:2379"),
        ("http://proxy:0", "'proxy:0' has port 0, which cannot be connected to"),
        (":23790", "'' in ':23790' is not a host name"),
        ("::1:2379", "'::1:2379' is ambiguous; write an IPv6 address in brackets, like [::1]:2379"),
        (
            "unix:///run/w.sock",
            "'unix:///run/w.sock': unknown scheme 'unix'; use http://HOST:PORT or https://",
        ),
        (
            "http://proxy:2379/v3",
            "'http://proxy:2379/v3': remove everything after the port; clients accept only HOST:PORT",
        ),
        ("http://a:1,http://b:1", "'http://a:1,http://b:1': remove everything after the port"),
        ("a:1,b:1", "'a:1,b:1' is a list; give one address"),
    ],
)
def test_bad_urls_for_clients_are_refused(text: str, problem: str) -> None:
    with pytest.raises(BadValue) as error:
        client_url(text)
    assert str(error.value).startswith(problem)
