"""Base classes of the services that read and write the store, and of Lock and Election."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from google.protobuf.message import Message

from upstream.store.calls import Calls, Handler, Request
from upstream.store.queueing import LockQueue
from upstream.store.state import StoreState
from upstream.store.writer import StoreWriter


class StoreService:
    """A service that reads from the state, writes through the writer, and answers through the calls."""

    def __init__(self, state: StoreState, writer: StoreWriter, calls: Calls) -> None:
        self._state = state
        self._writer = writer
        self._calls = calls

    def _read(
        self,
        kind: type[Request],
        read: Callable[[Request, str | None], Message],
        *,
        check: Callable[[Request], None] | None = None,
    ) -> Handler:
        """Make the handler of a unary method whose answer `read` returns at once; `check` as in `Calls.unary`."""

        async def answer(request: Request, user: str | None) -> Message:
            return read(request, user)

        return self._calls.unary(kind, answer, check=check)

    def _write(
        self,
        kind: type[Request],
        apply: Callable[[Request, str | None], Message],
        *,
        limited: bool = False,
        check: Callable[[Request], None] | None = None,
    ) -> Handler:
        """Make the handler of a unary method that `apply` executes; `limited`: the size limit of writes applies."""

        async def answer(request: Request, user: str | None) -> Message:
            return await self._writer.write(lambda: apply(request, user))

        return self._calls.unary(kind, answer, write=limited, check=check)


class LineService(StoreService):
    """Base class of Lock and Election."""

    def _line(self, name: bytes, user: str | None) -> LockQueue:
        return LockQueue(self._state, self._writer, name, user)

    def _unary(self, kind: type[Request], answer: Callable[[Request, str | None], Awaitable[Message]]) -> Handler:
        """Make the handler of a unary method; refusals of these two services have no code."""
        return self._calls.unary(kind, answer, codeless=True)
