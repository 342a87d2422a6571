"""Nonsense sent to every method of the store is refused with etcd's errors, and the store continues to serve."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from proto.pb import rpc_pb2, v3election_pb2, v3lock_pb2
from tests.store.both import Client, refused
from tests.store.running import RunningStore

TRIES = 8
CALL_TIMEOUT_S = 0.4
"""Some calls wait for their turn, or without end: watches, locks, elections."""

METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for file in (rpc_pb2.DESCRIPTOR, v3lock_pb2.DESCRIPTOR, v3election_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
}
# Auth stays off, otherwise every other call is refused for lack of a token.
METHODS.pop("/etcdserverpb.Auth/AuthEnable")
CODES = {code.value[0]: code for code in grpc.StatusCode}
UNKNOWN_TEXTS = ("auth:", "election:", "mutex:", "etcdserver:", "bcrypt:", '"leader"')
"""The first words of errors that etcd returns without a code."""

NUMBERS = (0, 1, -1, 2, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 2**64 - 1, 2**32)
PIECES = (b"", b"\x00", b"a", b"\xff", b"a/b", b"\xff" * 40, bytes(2000))


def fill(rng: Random, message: Message, depth: int = 0) -> None:
    """Set some fields of a message to odd values."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.4:
            continue
        name = field.name
        if field.message_type is not None:
            if depth < 3:
                target = getattr(message, name)
                fill(rng, target.add() if field.is_repeated else target, depth + 1)
        else:
            value = odd_value(rng, field.type)
            try:
                if field.is_repeated:
                    getattr(message, name).append(value)
                else:
                    setattr(message, name, value)
            except (ValueError, TypeError):
                # Out of the field's range.
                continue


def odd_value(rng: Random, kind: int) -> object:
    """Pick a value for a field of the given type."""
    if kind == FieldDescriptor.TYPE_BYTES:
        return rng.choice(PIECES)
    if kind == FieldDescriptor.TYPE_STRING:
        return rng.choice(("", "root", "a", "\x00", "\u2603" * 50))
    if kind == FieldDescriptor.TYPE_BOOL:
        return rng.random() < 0.5
    return rng.choice(NUMBERS)


def request(rng: Random, kind: Descriptor) -> bytes:
    """Make a request: a message with odd fields, also truncated or changed, or random bytes."""
    choice = rng.random()
    if choice < 0.2:
        return rng.randbytes(rng.randrange(60))
    message = GetMessageClass(kind)()
    fill(rng, message)
    data = bytearray(message.SerializeToString())
    if choice < 0.5 and data:
        if rng.random() < 0.5:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


@pytest.fixture(scope="module")
def running() -> Iterator[RunningStore]:
    with RunningStore() as store:
        yield store


def codes(channel: grpc.Channel, path: str, data: bytes) -> grpc.StatusCode:
    """Make a call with these bytes; return its status code."""
    method = METHODS[path]
    try:
        if method.client_streaming:
            stream: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path)
            list(stream(iter((data, data)), timeout=CALL_TIMEOUT_S))
        elif method.server_streaming:
            answers: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(path)
            list(answers(data, timeout=CALL_TIMEOUT_S))
        else:
            unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
            unary(data, timeout=CALL_TIMEOUT_S)
    except grpc.RpcError as error:
        refusal = refused(error)
        code = CODES[refusal.code]
        # grpc.aio's answer when a handler raises anything else than a refusal.
        assert "Unexpected <class" not in refusal.text, f"{path} {data!r}: {refusal.text}"
        assert code is not grpc.StatusCode.UNKNOWN or refusal.text.startswith(
            ("auth:", "election:", "mutex:", "etcdserver:", "bcrypt:", '"leader"')
        )
        return code
    return grpc.StatusCode.OK


def check(path: str, running: RunningStore, seed: int) -> None:
    """Send nonsense to a method, and check that the store still serves."""
    rng = Random(f"{path} {seed}")
    requests = [request(rng, METHODS[path].input_type) for _ in range(TRIES)]
    client = Client(running.endpoint)
    with ThreadPoolExecutor(TRIES) as pool:
        assert len(list(pool.map(lambda data: codes(client.channel, path, data), requests))) == TRIES
    assert isinstance(client.ask(rpc_pb2.PutRequest(key=b"alive")), rpc_pb2.PutResponse)
    client.close()


@pytest.mark.parametrize("path", METHODS)
def test_nonsense_is_refused_without_harm(path: str, running: RunningStore) -> None:
    check(path, running, 0)


@pytest.mark.long
@pytest.mark.parametrize("path", METHODS)
def test_much_nonsense_is_refused_without_harm(path: str, running: RunningStore) -> None:
    for seed in range(1, 40):
        check(path, running, seed)
