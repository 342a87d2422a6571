"""What pass-through allows its clients, and what it counts. Every bound has its unit and its reason here."""

from __future__ import annotations

from dataclasses import dataclass, field

MIB = 1 << 20
CALLS_REFUSED_AT = (
    "waiting_max",
    "waiting_bytes_max",
    "call_wait_s",
    "unread_bytes_per_connection_max",
    "unread_bytes_max",
    "translated_request_bytes_max",
    "partial_bytes_max",
)
"""Limits at which calls are refused or ended."""

REQUESTS_NOT_KEPT_AT = ("resend_bytes_max", "resend_bytes_total_max")
"""Limits from which on a request is not kept to be sent again."""


@dataclass(slots=True, frozen=True)
class PassthroughSettings:
    """What pass-through keeps, each with its unit and its reason."""

    call_wait_s: float = 5.0
    """How long a call waits while no etcd can be reached, unless its deadline comes before, or for one of clientv3 a
    third of the time until then; after it the call ends UNAVAILABLE. Long enough for a restart of etcd, and for clients
    with several proxies not too long before they try the next one."""

    waiting_max: int = 10_000
    """Calls that may wait for a connection to come up; one more ends UNAVAILABLE at once."""

    waiting_bytes_max: int = 64 * MIB
    """Bytes of all calls that wait, heads (with 32 a field) and bodies: memory. The call that brings more ends
    UNAVAILABLE. The body of one is bounded by the window of its stream besides."""

    resend_bytes_max: int = 64 * 1024
    """Bytes of a request that are kept, until its answer begins, so that it can be sent again when no server has looked
    at it. Larger requests are not sent again."""

    resend_bytes_total_max: int = 64 * MIB
    """The same for all calls together; what comes when it is reached is not sent again."""

    unread_bytes_per_connection_max: int = 128 * MIB
    """Bytes of answers that one client's connection may leave unread; the call that brings more is reset. Each call
    can leave one window unread (1 MiB), so this is some 120 large answers asked for at once and none of them read. Of a
    translated call it bounds one answer as well, since the whole of it waits for the client."""

    unread_bytes_max: int = 384 * MIB
    """The same for all clients, below half of the window of one connection to etcd (1 GiB, given back by halves): at
    the bound the connection that leaves most unread loses its calls, instead of all others waiting for it."""

    translated_request_bytes_max: int = 2 * MIB
    """One request of a call that is translated (--namespace), inflated; a larger one ends RESOURCE_EXHAUSTED, as at
    etcd, whose own bound is --max-request-bytes (1.5 MiB) + 512 KiB. Set by --max-request-bytes."""

    partial_bytes_max: int = 384 * MIB
    """Bytes of unfinished messages of all calls that are translated (--namespace, --advertise-client-url): what came of
    them, what they inflated to, what is changed already (both until a message is done, so that one of 100 MB counts for
    200), and what etcd has not taken of requests. At the bound the connection that has most unfinished loses its calls,
    RESOURCE_EXHAUSTED. Of other calls no message is kept here."""


@dataclass(slots=True)
class PassthroughStats:
    """Counts since the start."""

    calls: int = 0
    resent: int = 0
    """Times a call was sent again because no server had looked at it."""

    unavailable: int = 0
    """Calls ended here because no upstream could take them."""

    broken: int = 0
    """Calls whose upstream connection broke under them."""

    waiting_bytes: int = 0
    """Bytes of the calls that wait for a connection now."""

    unread_bytes: int = 0
    """Bytes that wait now for clients to read."""

    resend_bytes: int = 0
    """Bytes of requests kept now to be sent again."""

    partial_bytes: int = 0
    """Bytes of messages that are not whole now, of calls that are translated."""

    refused_at: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CALLS_REFUSED_AT, 0))
    """Calls refused or ended, by the limit that was reached."""

    not_kept_at: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REQUESTS_NOT_KEPT_AT, 0))
    """Requests that are not kept, by the limit that was reached."""

    @property
    def unread(self) -> int:
        """Calls reset because their client left too much unread."""
        return self.refused_at["unread_bytes_per_connection_max"] + self.refused_at["unread_bytes_max"]

    @property
    def partial_refused(self) -> int:
        """Calls ended because too many bytes of messages that are not whole were kept."""
        return self.refused_at["partial_bytes_max"]
