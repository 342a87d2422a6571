"""Listening sockets: TCP (IPv4 and IPv6) and unix-domain sockets with their files.

They are created here and not by the event loop for two reasons. The event loop replaces an existing socket file even if
another process listens on it, which silently cuts that process off. And for a name with several addresses and port 0,
it would use a different port for each address.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Sequence
from typing import Any

from proxy.config.values import Address

PROBE_S = 1.0
"""Timeout of the connect that probes an existing socket file for a listener; a timeout means there is one."""

_NO_SUCH_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
"""Errors for an IPv6 address on a machine without IPv6."""


class Listening:
    """Listening sockets, and the socket file to remove with them."""

    def __init__(self, sockets: list[socket.socket], path: str = "") -> None:
        self.sockets = sockets
        self._path = path
        # The file's identity: another file under the same name belongs to another process.
        self._file = _file_id(path) if path else None

    @property
    def port(self) -> int:
        """The TCP port; 0 for a unix socket."""
        return 0 if self.is_unix else int(self.sockets[0].getsockname()[1])

    @property
    def is_unix(self) -> bool:
        """Whether it listens on a unix socket."""
        return self.sockets[0].family == socket.AF_UNIX

    def remove_file(self) -> None:
        """Remove the socket's file, unless another one has replaced it."""
        if self._file is not None and _file_id(self._path) == self._file:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        self._file = None


async def listen(host: str, port: int, path: str, backlog: int) -> Listening:
    """Listen on the unix socket `path`, or on each address of `host` ("": all interfaces). Raises OSError, whose
    `filename` is the address that cannot be used.

    A stale socket file is replaced. One with a listener causes EADDRINUSE, and a file that is not a socket EEXIST.
    """
    if path:
        return _listen_unix(path, backlog)
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return _listen_at([(family, address) for family, _, _, _, address in found], host, port, backlog)


def bind(host: str, port: int, path: str, backlog: int) -> Listening:
    """Do the same as `listen`, but without an event loop. Raises OSError."""
    if path:
        return _listen_unix(path, backlog)
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return _listen_at([(family, address) for family, _, _, _, address in found], host, port, backlog)


_Addresses = Sequence[tuple[int, tuple[Any, ...]]]


def _listen_at(addresses: _Addresses, host: str, port: int, backlog: int) -> Listening:
    sockets: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys(addresses):
            if sockets and not port:
                # The same port for all addresses.
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            try:
                sockets.append(_listen_tcp(family, address, backlog))
            except OSError as error:
                if host or error.errno not in _NO_SUCH_FAMILY:
                    # Which address of the name it is: another one may be free.
                    error.filename = str(Address(str(address[0]), int(str(address[1]))))
                    raise
        if not sockets:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    except OSError:
        for made in sockets:
            made.close()
        raise
    return Listening(sockets)


def _listen_tcp(family: int, address: tuple[Any, ...], backlog: int) -> socket.socket:
    # An explicit protocol number: asyncio sets TCP_NODELAY on accepted connections only if it is there.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        listening.listen(backlog)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening


def _listen_unix(path: str, backlog: int) -> Listening:
    _remove_stale_socket(path)
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(path)
        listening.listen(backlog)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return Listening([listening], path)


def _remove_stale_socket(path: str) -> None:
    """Remove a stale socket file. Raises OSError for any other file at `path`."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_S)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:
            return
        except TimeoutError:
            # Backlog full, so a listener exists.
            pass
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _file_id(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def show_address(peername: object) -> str:
    """Format a peer's address as HOST:PORT; "unix" if it is not TCP."""
    if isinstance(peername, tuple) and len(peername) >= 2:
        host, port = peername[0], peername[1]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    return "unix"
