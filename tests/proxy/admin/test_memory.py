"""The memory limit that applies to the process: of its cgroup, of those above, or of the machine."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from proxy.admin import memory

MACHINE = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
V1_UNLIMITED = "9223372036854771712\n"


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "5000\n"}, 5000),
        ("0::/a/b\n", {"a/b/memory.max": "4000\n", "a/memory.max": "5000\n"}, 4000),
        ("0::/\n", {"memory.max": "3000\n"}, 3000),
        ("0::/../../other\n", {"memory.max": "3000\n"}, 3000),
        ("2:cpu:/a\n1:memory,hugetlb:/a\n", {"memory/a/memory.limit_in_bytes": "2000\n"}, 2000),
        ("1:memory:/a\n", {"memory/a/memory.limit_in_bytes": V1_UNLIMITED}, MACHINE),
        ("0::/a\n", {}, MACHINE),
    ],
)
def test_the_least_limit_applies(membership: str, files: dict[str, str], limit: int, tmp_path: Path) -> None:
    place = tmp_path / "fs"
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    (tmp_path / "membership").write_text(membership)
    assert memory.limit_bytes(str(place), str(tmp_path / "membership")) == limit


def test_a_system_without_cgroups_has_the_limit_of_the_machine(tmp_path: Path) -> None:
    assert memory.limit_bytes(str(tmp_path), str(tmp_path / "missing")) == MACHINE
    virtual, resident = memory.virtual_and_resident_bytes()
    assert 0 < resident < min(virtual, memory.limit_bytes())
    assert memory.limit_bytes() <= MACHINE
