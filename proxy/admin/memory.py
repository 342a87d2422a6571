"""The memory of this process, and the limit that applies to it."""

from __future__ import annotations

import os
import resource
from typing import Final

CGROUPS: Final = "/sys/fs/cgroup"
MEMBERSHIP: Final = "/proc/self/cgroup"


def virtual_and_resident_bytes() -> tuple[int, int]:
    """Return the address space and the resident memory of this process, shared pages included; 0 if unknown."""
    try:
        with open("/proc/self/statm") as file:
            virtual, resident = file.read().split()[:2]
    except OSError:
        return 0, 0
    return int(virtual) * resource.getpagesize(), int(resident) * resource.getpagesize()


def limit_bytes(cgroups: str = CGROUPS, membership: str = MEMBERSHIP) -> int:
    """Return the memory that the process may use: the least limit of its cgroup and those above, or the machine's.

    Reads version 2 (memory.max) and version 1 (memory.limit_in_bytes), see cgroups(7). In a container the mounted root
    is usually the container's own group.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()]
    try:
        with open(membership) as file:
            lines = file.read().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = f"{cgroups}/memory", "memory.limit_in_bytes"
        else:
            continue
        groups = path.strip("/").split("/")
        for depth in range(len(groups) + 1):
            limits += _limit_in("/".join([root, *groups[:depth], name]))
    return min(limits)


def _limit_in(path: str) -> list[int]:
    try:
        with open(path) as file:
            return [int(file.read())]
    except (OSError, ValueError):  # no such group or limit; "max"
        return []
