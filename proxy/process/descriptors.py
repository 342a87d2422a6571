"""File descriptors: the process has so many, and clients must not get those that the proxy itself needs.

A client's connection is one descriptor, and so is each connection to etcd, each scrape of the metrics, each file that
is read. When clients have taken all, a connection to etcd that breaks cannot be replaced, and no probe is answered. So
the soft limit (RLIMIT_NOFILE) is raised to the hard one at the start, a part is kept for the proxy, and clients get
what is left, if that is less than `connections_max`.
"""

from __future__ import annotations

import os
import resource
from typing import Final, NamedTuple

FILES: Final = 32
"""Kept for files: certificates and keys that are read again, the log, the event loop's own; a pipe to a child."""

ADMIN: Final = 32
"""Kept for the connections of those who scrape, probe and look."""

ETCD_PER_ENDPOINT: Final = 16
"""Kept for each endpoint: connections of the pool, the watch client's, and their successors while both are open."""

RESERVED_SHARE_MAX: Final = 0.5
"""Of a small limit no more than this is kept: a proxy without clients is of no use."""


class Share(NamedTuple):
    """How the descriptors of the process are shared out."""

    limit: int
    """What the process may have."""

    reserved: int
    """What is kept for the proxy itself, with what is open already."""

    connections_max: int
    """What clients may have."""


def raise_limit() -> int:
    """Raise the soft limit of this process to its hard one, as far as the system lets it; return what holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    except (OSError, ValueError):
        # Some systems (macOS) have a lower bound beside the hard limit; what was allowed stays allowed.
        pass
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


def in_use() -> int:
    """Return how many descriptors are open now, or a guess where the system does not say."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return FILES


def share(limit: int, connections_max: int, endpoints: int, opened: int) -> Share:
    """Return how `limit` descriptors are shared out, of which `opened` are in use, if clients want connections_max."""
    reserved = opened + FILES + ADMIN + ETCD_PER_ENDPOINT * max(1, endpoints)
    reserved = min(reserved, int(limit * RESERVED_SHARE_MAX))
    return Share(limit, reserved, max(1, min(connections_max, limit - reserved)))
