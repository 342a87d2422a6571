"""Loaded into the proxy of a soak: on SIGUSR2 it writes down exactly what it holds.

Resident memory says little about leaks: allocators keep what they once had, in pieces. What counts is what is in use:
blocks of Python's allocator, bytes of malloc's, objects; and how many objects only a collection has found.
"""

import ctypes
import gc
import json
import os
import signal
import sys
from pathlib import Path


class MallocInfo(ctypes.Structure):
    """What glibc's mallinfo2() returns."""

    _fields_ = (
        ("arena_to_fsmblks", ctypes.c_size_t * 7),
        ("uordblks", ctypes.c_size_t),
        ("fordblks_and_keepcost", ctypes.c_size_t * 2),
    )


def malloc_bytes() -> int:
    """Return the bytes that malloc has given out; Python's arenas and whatever else is mapped are not among them."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return 0
    libc.mallinfo2.restype = MallocInfo
    return int(libc.mallinfo2().uordblks)


def tell(*_signal: object) -> None:
    """Write it down, as JSON, in one step."""
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
