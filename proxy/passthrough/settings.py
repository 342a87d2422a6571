"""The limits and counters of pass-through. Each limit is documented with its unit and its reason."""

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
    "hops_max",
)
"""Limits at which calls are refused or ended."""

REQUESTS_NOT_KEPT_AT = ("resend_bytes_max", "resend_bytes_total_max")
"""Limits above which a request is not kept for resending."""


@dataclass(slots=True, frozen=True)
class PassthroughSettings:
    """The limits of pass-through, each with its unit and its reason."""

    call_wait_s: float = 5.0
    """Maximum time a call waits while no etcd can be reached; then it ends with UNAVAILABLE. A call waits no longer
    than until its deadline, one of clientv3 for at most a third of that time. Long enough for a restart of etcd, and
    short enough for clients with several proxies to try the next one."""

    waiting_max: int = 10_000
    """Maximum calls that wait for a connection; further ones end with UNAVAILABLE at once."""

    waiting_bytes_max: int = 64 * MIB
    """Maximum bytes of all waiting calls, heads (plus 32 per field) and bodies: bounds memory. A call that exceeds it
    ends with UNAVAILABLE. The body of each is also bounded by its stream's window."""

    resend_bytes_max: int = 64 * 1024
    """Maximum bytes of a request kept until its response begins, so that it can be resent if no server has processed
    it. Larger requests are not resent."""

    resend_bytes_total_max: int = 64 * MIB
    """The same for all calls together; requests that exceed it are not resent."""

    unread_bytes_per_connection_max: int = 128 * MIB
    """Maximum bytes of responses that one client connection may leave unread; a call that exceeds it is reset. Each
    call can leave one window unread (1 MiB), so this is about 120 large responses requested at once and none of them
    read. It also bounds a single response of a translated call, since all of it waits for the client."""

    unread_bytes_max: int = 384 * MIB
    """The same for all clients together. Less than half of the window of one connection to etcd (1 GiB, credited in
    halves): at the bound, the calls of the connection with most unread bytes are reset, instead of all others waiting
    for it."""

    translated_request_bytes_max: int = 2 * MIB
    """Maximum size of a request of a translated call (--namespace), after decompression. A larger one ends with
    RESOURCE_EXHAUSTED, as in etcd, whose own bound is --max-request-bytes (1.5 MiB) + 512 KiB. Set by
    --max-request-bytes."""

    partial_bytes_max: int = 384 * MIB
    """Maximum bytes of unfinished messages of all translated calls (--namespace, --advertise-client-url): bytes
    received, decompressed and already translated (a message's source and result are both kept until it is done, so one
    of 100 MB counts as 200), and request bytes that etcd has not accepted. At the bound, the calls of the connection
    with most unfinished bytes end with RESOURCE_EXHAUSTED. Messages of other calls are not kept."""

    share_reads: bool = True
    """Answer identical Range calls in flight by one call at etcd. Set by --share-reads."""

    shared_reads_bytes_max: int = 256 * MIB
    """Maximum bytes of answers that several Range calls share, kept until the slowest client has read its answer, and
    of the requests that wait to share one. Calls that exceed it are sent alone, as without sharing: their answers wait
    at etcd. Room for several answers of 50 MB."""


@dataclass(slots=True)
class PassthroughStats:
    """Counters since the start, and current sizes."""

    calls: int = 0
    resent: int = 0
    """Times a call was resent because no server had processed it."""

    unavailable: int = 0
    """Calls refused by the proxy because no upstream connection could take them."""

    broken: int = 0
    """Calls whose upstream connection was lost."""

    range_calls: int = 0
    """Range calls of clients, except while sharing is disabled."""

    range_calls_upstream: int = 0
    """Calls at etcd made for them."""

    range_calls_not_shared: int = 0
    """Range calls sent alone because of `shared_reads_bytes_max`."""

    range_bytes_saved: int = 0
    """Bytes of shared answers that etcd did not have to send."""

    shared_reads_bytes: int = 0
    """Current bytes of shared answers, and of requests that wait to share one."""

    waiting_bytes: int = 0
    """Current bytes of the calls that wait for a connection."""

    unread_bytes: int = 0
    """Current bytes that wait for clients to read."""

    resend_bytes: int = 0
    """Current bytes of requests kept for resending."""

    partial_bytes: int = 0
    """Current bytes of unfinished messages of translated calls."""

    refused_at: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CALLS_REFUSED_AT, 0))
    """Calls refused or ended, by the limit reached."""

    not_kept_at: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REQUESTS_NOT_KEPT_AT, 0))
    """Requests not kept for resending, by the limit reached."""

    @property
    def unread(self) -> int:
        """Calls reset because their client left too much unread."""
        return self.refused_at["unread_bytes_per_connection_max"] + self.refused_at["unread_bytes_max"]

    @property
    def partial_refused(self) -> int:
        """Calls ended because too many bytes of unfinished messages were kept."""
        return self.refused_at["partial_bytes_max"]
