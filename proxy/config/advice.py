"""Settings that are valid but may surprise: notes for the log at the start and after a reload."""

from __future__ import annotations

from collections.abc import Iterator

from proxy.config.knobs import Settings
from proxy.config.values import parse_listen_address


def advice(settings: Settings) -> Iterator[str]:
    """Yield one line for each surprise."""
    upstream, listener = settings.upstream, settings.listener
    address = parse_listen_address(listener.listen_addr)
    if upstream.cert and not listener.trusted_ca_file and not address.path:
        yield (
            f"--cert is presented to etcd, but clients of {address} need no certificate: each of them uses "
            "etcd with the proxy's certificate, unless etcd's auth is on; set --trusted-ca-file to require one"
        )
