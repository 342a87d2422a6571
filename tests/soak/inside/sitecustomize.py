"""Loaded into the proxy of a soak: on SIGUSR2 it records its exact memory use.

Resident memory shows little about leaks, since allocators keep freed memory in fragments. It records memory in use:
blocks of Python's allocator, bytes of malloc's, objects; and the number of objects that only a collection has freed.
To name what has grown it counts the objects by type and by what holds them.
"""

import ctypes
import gc
import json
import os
import signal
import sys
from collections import Counter, deque
from pathlib import Path
from types import ModuleType


class MallocInfo(ctypes.Structure):
    """The result of glibc's mallinfo2()."""

    _fields_ = (
        ("arena_to_fsmblks", ctypes.c_size_t * 7),
        ("uordblks", ctypes.c_size_t),
        ("fordblks_and_keepcost", ctypes.c_size_t * 2),
    )


def malloc_bytes() -> int:
    """Return the bytes allocated by malloc, without Python's arenas and other mapped memory."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return 0
    libc.mallinfo2.restype = MallocInfo
    return int(libc.mallinfo2().uordblks)


CONTAINERS = (dict, list, tuple, set, frozenset, deque)


def census() -> dict[str, int]:
    """Count all objects by type, each under the first holder found that is not a plain container."""
    counts = Counter[str]()
    # Objects that the modules do not lead to are held by a stack or by a C library.
    others = iter(gc.get_objects())
    queue = deque[tuple[object, str]]((module, name) for name, module in sys.modules.items())
    seen = {id(counts), id(queue)}
    seen |= {id(seen), id(sys._getframe())}
    while queue or (other := next(others, None)) is not None:
        found, holder = queue.popleft() if queue else (other, "")
        if id(found) in seen:
            continue
        seen.add(id(found))
        kind = type(found).__qualname__
        counts[f"{holder} > {kind}"] += 1
        if isinstance(found, CONTAINERS):
            holder = f"{holder.partition('[')[0]}[{kind}]"
        elif not isinstance(found, ModuleType):
            holder = getattr(found, "__qualname__", kind)
        queue.extend((held, holder) for held in gc.get_referents(found) if id(held) not in seen)
    return counts


def tell(*_signal: object) -> None:
    """Write the figures as JSON, atomically."""
    found = gc.collect()
    held: dict[str, object] = {
        "garbage": found,
        "objects": len(gc.get_objects()) + gc.get_freeze_count(),
        "blocks": sys.getallocatedblocks(),
        "malloc_bytes": malloc_bytes(),
    }
    held["census"] = census()
    path = Path(f"{os.environ['SOAK_HELD']}.{os.getpid()}")
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(held))
    partial.rename(path)


if "serve" in sys.orig_argv:
    signal.signal(signal.SIGUSR2, tell)
