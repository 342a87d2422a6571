"""The end of a call whose deadline is over."""

from __future__ import annotations

from proto.framing import Status
from proxy.listening.calls import DEADLINE_TEXT, CallRefusal


def deadline_exceeded() -> CallRefusal:
    """Return the refusal of a call whose deadline is over."""
    return CallRefusal(200, Status.DEADLINE_EXCEEDED, DEADLINE_TEXT)
