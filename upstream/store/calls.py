"""The gRPC plumbing that all services share, from a call to a method of the store and back.

Messages are passed as bytes, because their sizes are needed: for the byte counters, and because etcd refuses large
requests with its own texts. A service is a table of methods; a StoreError that a method raises becomes the status of
the call.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeAlias, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message

from proto.framing import Status
from upstream.store import errors
from upstream.store.auth import Auth
from upstream.store.errors import StoreError, StoreRefusal

REQUEST_BYTES_MAX = 1536 * 1024
"""The largest write: etcd's --max-request-bytes default."""

MESSAGE_BYTES_MAX = REQUEST_BYTES_MAX + 512 * 1024
"""The largest message accepted at all: the largest write plus the overhead that etcd's gRPC server allows."""

Request = TypeVar("Request", bound=Message)
# In quotes because only the stubs make these classes generic.
Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
Handler: TypeAlias = "grpc.RpcMethodHandler[bytes, bytes]"

_CODES = {Status(code.value[0]): code for code in grpc.StatusCode}

# etcd's maintenance calls return auth's own errors, without mapping them to errors of the API (v3rpc/maintenance.go,
# authMaintenanceServer).
_BARE_REFUSALS = {
    errors.USER_EMPTY: StoreRefusal(Status.UNKNOWN, "auth: user name is empty"),
    errors.INVALID_AUTH_TOKEN: StoreRefusal(Status.UNKNOWN, "auth: invalid auth token"),
    errors.USER_NOT_FOUND: StoreRefusal(Status.UNKNOWN, "auth: user not found"),
    errors.PERMISSION_DENIED: StoreRefusal(Status.UNKNOWN, "auth: permission denied"),
}


@dataclass(slots=True)
class Traffic:
    """Message bytes, without framing, as etcd counts them (etcd_network_client_grpc_*_bytes_total)."""

    received: int = 0
    sent: int = 0


def _without_code(refusal: StoreRefusal) -> StoreRefusal:
    """Remove the code from a refusal of Lock or Election.

    In etcd these two services are clients of the others (v3client), and errors lose their code on the way, except
    gRPC's own errors.
    """
    if refusal.code in (Status.UNAVAILABLE, Status.INTERNAL, Status.RESOURCE_EXHAUSTED):
        return refusal
    return StoreRefusal(Status.UNKNOWN, refusal.text)


async def end(context: Context, refusal: StoreRefusal) -> None:
    """End a call with a refusal; never returns."""
    await context.abort(_CODES[refusal.code], refusal.text)


def parse(kind: type[Request], data: bytes) -> Request:
    """Parse a request. Raises StoreError when it is too large or malformed."""
    if len(data) > MESSAGE_BYTES_MAX:
        text = f"grpc: received message larger than max ({len(data)} vs. {MESSAGE_BYTES_MAX})"
        raise StoreError(StoreRefusal(Status.RESOURCE_EXHAUSTED, text))
    try:
        return kind.FromString(data)
    except DecodeError:
        raise StoreError(
            StoreRefusal(Status.INTERNAL, f"grpc: error unmarshalling request: not a {kind.DESCRIPTOR.full_name}")
        ) from None


def check_write_size(data: bytes) -> None:
    """Refuse a write larger than etcd would write to its log. Raises StoreError."""
    if len(data) > REQUEST_BYTES_MAX:
        raise StoreError(errors.REQUEST_TOO_LARGE)


class Calls:
    """What the handlers of all services share: the byte counters, and the lookup of a call's user."""

    def __init__(self, auth: Auth) -> None:
        self._auth = auth
        self.traffic = Traffic()

    def user(self, context: Context) -> str | None:
        """Return the user of the call's token, None without a token. Raises StoreError for an invalid token."""
        if not self._auth.enabled:
            return None
        metadata = dict(context.invocation_metadata() or ())
        token = metadata.get("token") or metadata.get("authorization")
        return self._auth.user_of(str(token).removeprefix("Bearer ") if token else None, monotonic())

    def check_maintenance(self, context: Context) -> None:
        """Refuse a maintenance call unless its user is an administrator. Raises StoreError."""
        try:
            self._auth.check_admin(self.user(context))
        except StoreError as error:
            raise StoreError(_BARE_REFUSALS.get(error.refusal, error.refusal)) from None

    async def read(self, context: Context) -> bytes | None:
        """Read the next message of a stream; None when the client has closed its side."""
        # At the end gRPC returns the value EOF, which is missing from the stubs.
        data = cast(object, await context.read())
        if not isinstance(data, bytes):
            return None
        self.traffic.received += len(data)
        return data

    async def write(self, context: Context, message: bytes) -> None:
        """Write the next message of a stream."""
        self.traffic.sent += len(message)
        await context.write(message)

    def unary(
        self,
        kind: type[Request],
        answer: Callable[[Request, str | None], Awaitable[Message]],
        *,
        write: bool = False,
        maintenance: bool = False,
        codeless: bool = False,
        check: Callable[[Request], None] | None = None,
    ) -> Handler:
        """Make the handler of a unary method.

        `write`: the size limit of writes applies. `maintenance`: only administrators may call it. `codeless`: refusals
        lose their code. `check` raises for requests that are malformed for any user; it decides the error when the
        token is invalid too. `answer` gets the request and the call's user (None without a token).
        """

        async def call(data: bytes, context: Context) -> bytes:
            self.traffic.received += len(data)
            try:
                request = parse(kind, data)
                if write:
                    check_write_size(data)
                if maintenance:
                    self.check_maintenance(context)
                try:
                    user = self.user(context)
                except StoreError:
                    if check is not None:
                        check(request)
                    raise
                response = (await answer(request, user)).SerializeToString()
            except StoreError as error:
                await end(context, _without_code(error.refusal) if codeless else error.refusal)
                raise
            self.traffic.sent += len(response)
            return response

        return grpc.unary_unary_rpc_method_handler(call)


def stream(call: Callable[[Context], Coroutine[Any, Any, None]]) -> Handler:
    """Make the handler of a bidirectional method that reads and writes on the context."""

    async def run(_requests: AsyncIterator[bytes], context: Context) -> None:
        try:
            await call(context)
        except StoreError as error:
            await end(context, error.refusal)

    return grpc.stream_stream_rpc_method_handler(run)


def answers_stream(call: Callable[[bytes, Context], Coroutine[Any, Any, None]]) -> Handler:
    """Make the handler of a method with one request and a stream of answers, written on the context."""

    async def run(data: bytes, context: Context) -> None:
        try:
            await call(data, context)
        except StoreError as error:
            await end(context, error.refusal)

    return grpc.unary_stream_rpc_method_handler(run)


def unimplemented(reason: str, *, streams_answers: bool = False) -> Handler:
    """Make the handler of a method that the store does not implement; the status carries the reason."""

    async def call(_data: bytes, context: Context) -> bytes:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, reason)
        raise AssertionError("abort returned")

    async def call_stream(_data: bytes, context: Context) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, reason)

    if streams_answers:
        return grpc.unary_stream_rpc_method_handler(call_stream)
    return grpc.unary_unary_rpc_method_handler(call)


def service(name: str, methods: Mapping[str, Handler]) -> grpc.GenericRpcHandler:
    """Make a service from its methods' handlers; `name` is the full name, such as etcdserverpb.KV."""
    return grpc.method_handlers_generic_handler(name, dict(methods))
