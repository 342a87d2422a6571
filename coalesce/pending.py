"""Queued requests that need nothing from etcd; a create is in `model`, since it refers to its session and trunk."""

from __future__ import annotations

REQUEST_BYTES = 512
"""Memory of a queued request in addition to its keys: objects, and list entries."""


class PendingCancel:
    """A queued cancel."""

    __slots__ = ("watch_id",)

    bytes = REQUEST_BYTES

    def __init__(self, watch_id: int) -> None:
        self.watch_id = watch_id


class PendingProgress:
    """A queued progress request."""

    __slots__ = ()

    bytes = REQUEST_BYTES
