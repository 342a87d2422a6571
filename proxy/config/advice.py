"""Settings that are valid but may surprise: notes for the log at the start and after a reload."""

from __future__ import annotations

import os
from collections.abc import Iterator

from proxy.config.knobs import ListenerTable, Settings
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
    other_version = listener.tls_min_version != ListenerTable().tls_min_version
    for flag, given, without, there in (
        ("--tls-min-version", other_version, "--cert-file", listener.cert_file),
        ("--discovery-srv-name", upstream.discovery_srv_name, "--discovery-srv", upstream.discovery_srv),
        ("--insecure-discovery", upstream.insecure_discovery, "--discovery-srv", upstream.discovery_srv),
    ):
        if given and not there:
            yield f"{flag} has no effect without {without}"
    plain = upstream.endpoints and all(text.lower().startswith("http://") for text in upstream.endpoints)
    for flag, given in (
        ("--cacert", upstream.cacert),
        ("--cert", upstream.cert),
        ("--insecure-skip-tls-verify", upstream.insecure_skip_tls_verify),
    ):
        if given and plain and not upstream.discovery_srv and not upstream.watch_endpoints:
            yield f"{flag} has no effect: each endpoint is http://, which is without TLS"
    cores = len(os.sched_getaffinity(0))
    if listener.workers > max(cores, 2):
        yield f"--workers={listener.workers} costs memory and CPU and serves no more clients: there are {cores} cores"
