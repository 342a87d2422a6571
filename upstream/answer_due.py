"""Whether a server owes an answer: it may hang, so calls should go to another one."""

from __future__ import annotations

from collections.abc import Sized
from typing import Final

ANSWER_DUE_S: Final = 0.1
"""A working etcd sends something within this time after a call: grpc-go answers the first DATA after a silence with a
PING of its own (internal/transport/bdp_estimator.go), regardless of when it answers the call. It does not while an
earlier one is not acknowledged: see `ClientConnection.owes_answer`."""

TRY_AGAIN_S: Final = 1.0
"""After this time one call is sent to a server that hung, as a test."""


class AnswerDue:
    """Since when the server of one connection owes an answer."""

    def __init__(self, streams: Sized) -> None:
        """`streams`: the connection's collection of open streams."""
        self._streams = streams
        # When the first call was sent after the last bytes from the server; None: none was. The connection resets it
        # when bytes arrive.
        self.since: float | None = None

    def call_sent(self, now: float) -> None:
        """Record that a call was sent; its stream is open already."""
        if self.since is None or (len(self._streams) == 1 and now - self.since >= TRY_AGAIN_S):
            self.since = now

    def is_overdue(self, now: float) -> bool:
        """Whether the server has sent nothing for ANSWER_DUE_S since a call was sent.

        This stays true while calls are open. Without open calls it ends after TRY_AGAIN_S: one call tests the server.
        """
        if self.since is None or now - self.since < ANSWER_DUE_S:
            return False
        return bool(self._streams) or now - self.since < TRY_AGAIN_S
