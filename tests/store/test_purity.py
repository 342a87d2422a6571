"""The pure parts of the store stay pure: the simulator runs them on a virtual clock, without a network or a disk."""

from __future__ import annotations

import subprocess
import sys

IMPURE = ("grpc", "asyncio", "aiohttp", "sqlite3", "socket", "threading", "random", "time")
PROGRAM = """
import sys
before = set(sys.modules)
import proto.pb.rpc_pb2
allowed = set(sys.modules)
import upstream.store.state, upstream.store.auth_admin
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - allowed}))
"""


def test_the_state_imports_no_impure_module() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "upstream" in loaded
    assert not set(IMPURE) & set(loaded)
