"""The time limits of one client's connection: which of them has been reached, and when to ping. Without I/O."""

from __future__ import annotations

from typing import Final

from proto.http2 import Connection
from proxy.listening.settings import ListenerSettings

PING: Final = "ping"
"""No limit has been reached, but the client has sent nothing for `keepalive_interval_s`."""


class ConnectionTimes:
    """When the connection was opened, when it became idle, and when its client was pinged; in seconds."""

    __slots__ = ("idle_since", "opened_at", "pinged_at")

    def __init__(self) -> None:
        self.opened_at = self.idle_since = 0.0
        # Until the client answers; None from then on.
        self.pinged_at: float | None = None

    def start(self, now: float) -> None:
        """Record that the connection is open."""
        self.opened_at = self.idle_since = now

    def due(self, settings: ListenerSettings, h2: Connection, now: float, *, recognised: bool) -> str | None:
        """Return the name of the limit that has been reached, PING when one is due, else None.

        `recognised`: it is known which protocol the client speaks.
        """
        open_s = now - self.opened_at
        if not recognised:
            return "first_bytes_timeout_s" if open_s > settings.first_bytes_timeout_s else None
        if h2.settings_pending and open_s > settings.settings_timeout_s:
            return "settings_timeout_s"
        if h2.streams:
            self.idle_since = now
        elif settings.idle_timeout_s is not None and now - self.idle_since > settings.idle_timeout_s:
            self.idle_since = now
            return "idle_timeout_s"
        if self.pinged_at is not None:
            if h2.now > self.pinged_at:
                self.pinged_at = None
            elif now - self.pinged_at > settings.keepalive_timeout_s:
                return "keepalive_timeout_s"
        elif settings.keepalive_interval_s is not None and now - h2.now >= settings.keepalive_interval_s:
            self.pinged_at = now
            return PING
        return None
