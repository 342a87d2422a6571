"""File descriptors: reserve those that the proxy itself needs, so that clients cannot use them up.

Each client connection needs one descriptor, and so does each connection to etcd, each scrape of the metrics, and each
open file. If clients used all of them, a broken connection to etcd could not be replaced, and no health probe answered.
So the proxy raises the soft limit (RLIMIT_NOFILE) to the hard one at start, reserves a part for itself, and lowers
`connections_max` to the rest if that is less.
"""

from __future__ import annotations

import os
import resource
from typing import Final, NamedTuple

FILES: Final = 32
"""Reserved for files: certificates and keys that are reloaded, the log, the event loop's own, a pipe to a child."""

ADMIN: Final = 32
"""Reserved for connections to the metrics address: scrapes, probes, the status page."""

ETCD_PER_ENDPOINT: Final = 16
"""Reserved for each endpoint: connections of the pool and the watch client, and their replacements."""

RESERVED_SHARE_MAX: Final = 0.5
"""Maximum share that is reserved if the limit is small: a proxy without clients is useless."""


class DescriptorShare(NamedTuple):
    """The division of the process's descriptors."""

    limit: int
    """All descriptors of the process."""

    reserved: int
    """Descriptors reserved for the proxy itself, including those already open."""

    connections_max: int
    """Descriptors for client connections."""


def raise_limit() -> int:
    """Raise the soft limit of this process to its hard one, if the system permits; return the resulting soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    except (OSError, ValueError):
        # Some systems (macOS) enforce a limit below the hard one; the soft limit stays as it was.
        pass
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


def limit() -> int:
    """Return the soft limit of this process."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def in_use() -> int:
    """Return the number of open descriptors, or an estimate where the system has no /proc."""
    try:
        # The size of the directory is their number (Linux 6.2): to list 10,000 would take 5 ms. Before it is 0.
        return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
    except OSError:
        return FILES


def share(limit: int, connections_max: int, endpoints: int, opened: int) -> DescriptorShare:
    """Divide `limit` descriptors, `opened` of which are in use; clients get at most `connections_max`."""
    reserved = opened + FILES + ADMIN + ETCD_PER_ENDPOINT * max(1, endpoints)
    reserved = min(reserved, int(limit * RESERVED_SHARE_MAX))
    return DescriptorShare(limit, reserved, max(1, min(connections_max, limit - reserved)))
