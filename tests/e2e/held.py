"""An etcd that does not answer for a while, though its connections stay open."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tests.etcd.server import EtcdServer


@contextmanager
def held(etcd: EtcdServer) -> Iterator[None]:
    """Stop an etcd by SIGSTOP; continue it at the end."""
    assert etcd.process is not None, "it runs"
    os.kill(etcd.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(etcd.process.pid, signal.SIGCONT)
