"""Loaded into the proxy of a soak: on SIGUSR2 it records its exact memory use.

Resident memory shows little about leaks, since allocators keep freed memory in fragments. It records memory in use:
blocks of Python's allocator, bytes of malloc's, objects; and the number of objects that only a collection has freed.
"""

import ctypes
import gc
import json
import os
import signal
import sys
from pathlib import Path


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


def tell(*_signal: object) -> None:
    """Write the figures as JSON, atomically."""
    found = gc.collect()
    held = {
        "garbage": found,
        "objects": len(gc.get_objects()) + gc.get_freeze_count(),
        "blocks": sys.getallocatedblocks(),
        "malloc_bytes": malloc_bytes(),
    }
    path = Path(os.environ["WATCHMUX_SOAK_HELD"])
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(held))
    partial.rename(path)


if "serve" in sys.orig_argv:
    signal.signal(signal.SIGUSR2, tell)
