"""The memory of this process, and the limit that applies to it."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Final

CGROUPS: Final = Path("/sys/fs/cgroup")
MEMBERSHIP: Final = Path("/proc/self/cgroup")


def virtual_and_resident_bytes() -> tuple[int, int]:
    """Return the address space and the resident memory of this process, shared pages included; 0 if unknown."""
    try:
        with open("/proc/self/statm") as file:
            virtual, resident = file.read().split()[:2]
    except OSError:
        return 0, 0
    return int(virtual) * resource.getpagesize(), int(resident) * resource.getpagesize()


def limit_bytes(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Return the memory that the process may use: the least limit of its cgroup and those above, or the machine's.

    Reads version 2 (memory.max) and version 1 (memory.limit_in_bytes), see cgroups(7). In a container the mounted root
    is usually the container's own group.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()]
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for place in (group, *group.parents):
            if place.is_relative_to(root):
                limits += _limit_in(place / name)
    return min(limits)


def _limit_in(file: Path) -> list[int]:
    try:
        return [int(file.read_text())]
    except (OSError, ValueError):  # no such group or limit; "max"
        return []
