"""
Whether a server owes an answer: it may hang, and calls had better go to another one.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Final

ANSWER_DUE_S: Final = 0.1
"""An etcd that lives says something within this time after a call was sent: grpc-go answers the first DATA after a
silence by a PING of its own (internal/transport/bdp_estimator.go), whatever the call waits for."""

TRY_AGAIN_S: Final = 1.0
"""After this a server that hung is tried again by one call."""


class Owing:
    """What one connection has to know for that."""

    __slots__ = ("_streams", "since")

    def __init__(self, streams: Sized) -> None:
        """`streams`: those that are open on the connection, now."""
        self._streams = streams
        # When the first call was sent since the server was last heard of; None: none was. To be reset when it is heard.
        self.since: float | None = None

    def asked(self, now: float) -> None:
        """A call was sent, whose stream is open."""
        if self.since is None or (len(self._streams) == 1 and now - self.since >= TRY_AGAIN_S):
            self.since = now

    def owes(self, now: float) -> bool:
        """
        Tell whether the server has said nothing for ANSWER_DUE_S since a call was sent.

        That holds as long as calls are open, or else for TRY_AGAIN_S: then one call finds out.
        """
        if self.since is None or now - self.since < ANSWER_DUE_S:
            return False
        return bool(self._streams) or now - self.since < TRY_AGAIN_S
