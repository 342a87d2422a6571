"""Certificates for tests: an authority, a server's and a client's, in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificates:
    """Paths of PEM files."""

    ca: str
    server_cert: str
    server_key: str
    client_cert: str
    client_key: str
    # Another authority, which signed none of these certificates.
    other_ca: str


def make_certificates(directory: Path) -> Certificates:
    """Write new certificates for 127.0.0.1 and localhost."""

    def path(name: str) -> str:
        return str(directory / name)

    authority = trustme.CA()
    authority.cert_pem.write_to_path(path("ca.pem"))
    trustme.CA().cert_pem.write_to_path(path("other.pem"))
    server = authority.issue_cert("127.0.0.1", "localhost")
    server.private_key_pem.write_to_path(path("server.key"))
    server.cert_chain_pems[0].write_to_path(path("server.pem"))
    client = authority.issue_cert("client.example")
    client.private_key_pem.write_to_path(path("client.key"))
    client.cert_chain_pems[0].write_to_path(path("client.pem"))
    return Certificates(
        path("ca.pem"),
        path("server.pem"),
        path("server.key"),
        path("client.pem"),
        path("client.key"),
        path("other.pem"),
    )
