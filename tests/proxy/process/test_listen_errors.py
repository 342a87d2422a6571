"""An address that cannot be listened on: the text names the address, the reason and the remedy."""

from __future__ import annotations

import asyncio
import errno
import os
import socket

import pytest

from proxy.config.values import Address, BadValue, parse_listen_address
from proxy.listening.sockets import listen
from proxy.process.addresses import cannot_listen

A = Address("10.0.0.1", 80)


@pytest.mark.parametrize(
    ("address", "number", "text"),
    [
        (A, errno.EADDRINUSE, "10.0.0.1:80: it is in use; stop what uses it or choose another --x (port 0: any)"),
        (A, errno.EADDRNOTAVAIL, "10.0.0.1:80: this machine has no such address; give one of its own, or :80 for all"),
        (A, errno.EACCES, "10.0.0.1:80: port 80 is forbidden; give a port from 1024 on, or CAP_NET_BIND_SERVICE"),
        (Address("", 0, "/a/b"), errno.EACCES, "unix:///a/b: permission denied; check who may write to its directory"),
        (Address("", 0, "/a/b"), errno.ENOENT, "unix:///a/b: its directory does not exist; create it or choose"),
        (A, errno.ENOBUFS, "10.0.0.1:80: no buffer space available; choose another --x"),
    ],
)
def test_each_reason_has_its_remedy(address: Address, number: int, text: str) -> None:
    error = cannot_listen(address, "--x", OSError(number, os.strerror(number)))
    assert str(error).startswith(f"cannot listen on {text}")


def test_a_name_that_cannot_be_resolved() -> None:
    error = cannot_listen(Address("etcd.invalid", 1), "--x", socket.gaierror(-2, "Name or service not known"))
    assert str(error) == (
        "cannot listen on etcd.invalid:1: the name cannot be resolved; check the spelling, or give an IP address in --x"
    )


def test_the_address_in_use_is_named_if_a_name_has_two(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> OSError:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.1", "127.0.0.2")]

        async def resolve(*_: object, **__: object) -> object:
            return found

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
        with pytest.raises(OSError, match="in use") as error:
            await listen("localhost", port, "", 1)
        return error.value

    with socket.create_server(("127.0.0.2", 0)) as holder:
        port = holder.getsockname()[1]
        text = str(cannot_listen(Address("localhost", port), "--listen-addr", asyncio.run(story())))
    assert text.startswith(f"cannot listen on localhost:{port} (127.0.0.2:{port}): it is in use")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http://127.0.0.1:1", "'http://127.0.0.1:1': remove http://; write 127.0.0.1:1, and TLS needs --cert-file"),
        ("https://:1/", "'https://:1/': remove https://; write :1, and set --cert-file and --key-file for TLS"),
    ],
)
def test_a_url_is_not_a_listen_address(text: str, message: str) -> None:
    with pytest.raises(BadValue) as error:
        parse_listen_address(text)
    assert str(error.value) == message
