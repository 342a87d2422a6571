"""The parent accepts connections and passes each to a worker, over a real socket pair."""

from __future__ import annotations

import asyncio
import selectors
import socket
import time
from collections.abc import Iterator
from typing import ClassVar

import pytest

from proxy.listening.fd_passing import ConnectionChannel, ConnectionReceiver
from proxy.listening.sockets import bind
from proxy.process.distributor import AGAIN_S, ConnectionDistributor
from tests.waiting import until, until_async


class Parent:
    """What drives `ConnectionDistributor` in the parent."""

    def __init__(self) -> None:
        self.takers: list[str] = []
        self.selector = selectors.DefaultSelector()
        self.listening = bind("127.0.0.1", 0, "", 16)
        self.passing = ConnectionDistributor(self.listening, self.selector, lambda _now: list(self.takers))
        self.workers: list[ConnectionChannel] = []

    def start(self, name: str) -> ConnectionChannel:
        """Start a worker."""
        self.workers.append(self.passing.started(name))
        self.takers.append(name)
        return self.workers[-1]

    def turn(self, now: float | None = None) -> None:
        """Do what there is to do now."""
        self.passing.arrange(time.monotonic() if now is None else now)
        for key, _ in self.selector.select(0):
            key.data()

    def connect(self) -> socket.socket:
        """Return a new client's socket."""
        return socket.create_connection(("127.0.0.1", self.listening.port))


@pytest.fixture
def parent() -> Iterator[Parent]:
    made = Parent()
    yield made
    made.passing.stop()
    made.passing.forget()
    for worker in made.workers:
        worker.sockets[0].close()
    made.selector.close()


def took(worker: ConnectionChannel) -> list[str]:
    """Return the addresses of the clients whose connections a worker gets next; [] if there is none."""
    try:
        _, descriptors, _, _ = socket.recv_fds(worker.sockets[0], 64, 64)
    except BlockingIOError:
        return []
    found = []
    for descriptor in descriptors:
        with socket.socket(fileno=descriptor) as connection:
            found.append(str(connection.getpeername()))
    return found


def test_connections_wait_while_there_is_no_worker(parent: Parent) -> None:
    with parent.connect() as client:
        parent.turn()
        worker = parent.start("worker-1")
        parent.turn()
        assert took(worker) == [str(client.getsockname())]


def test_a_connection_that_no_worker_takes_is_kept(parent: Parent) -> None:
    parent.start("worker-1").sockets[0].close()
    with parent.connect() as client:
        parent.turn()
        assert parent.passing.again_at is not None
        parent.passing.ended("worker-1")
        parent.takers.clear()
        again = parent.start("worker-1")
        parent.turn(time.monotonic() + AGAIN_S)
        assert took(again) == [str(client.getsockname())]


def test_another_worker_gets_what_the_first_does_not_take(parent: Parent) -> None:
    parent.start("worker-1").sockets[0].close()
    other = parent.start("worker-2")
    clients = [parent.connect() for _ in range(4)]
    got: list[str] = []

    def turned() -> bool:
        parent.turn()
        got.extend(took(other))
        return len(got) == len(clients)

    until(turned, "all connections")
    assert sorted(got) == sorted(str(client.getsockname()) for client in clients)
    for client in clients:
        client.close()


class Opened(asyncio.Protocol):
    """A connection of a worker."""

    all: ClassVar[list[asyncio.BaseTransport]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Record it."""
        self.all.append(transport)


async def test_a_worker_takes_what_it_is_passed(parent: Parent) -> None:
    receiver = ConnectionReceiver(parent.start("worker-1"), Opened, None)

    def turned() -> bool:
        parent.turn()
        return len(Opened.all) == 2

    with parent.connect(), parent.connect():
        await until_async(turned, "both connections")
        assert receiver.taken == 2
        for transport in Opened.all:
            transport.close()
    receiver.close()


def test_after_a_stop_no_connection_is_accepted(parent: Parent) -> None:
    parent.start("worker-1")
    parent.turn()
    port = parent.listening.port
    parent.passing.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
