"""A real etcd with TLS towards its clients."""

from __future__ import annotations

import ssl
from collections.abc import Sequence

from tests.etcd.binaries import EtcdBinary
from tests.etcd.server import EtcdServer
from tests.upstream.certificates import Certificates


class SecureEtcdServer(EtcdServer):
    """An etcd with a certificate; with `mutual` its clients must present one too."""

    def __init__(
        self, files: Certificates, binary: EtcdBinary | None = None, extra: Sequence[str] = (), mutual: bool = True
    ) -> None:
        ours = [f"--cert-file={files.server_cert}", f"--key-file={files.server_key}"]
        if mutual:
            ours += [f"--trusted-ca-file={files.ca}", "--client-cert-auth"]
        super().__init__(binary, [*ours, *extra])
        self.tls = ssl.create_default_context(cafile=files.ca)
        self.tls.load_cert_chain(files.client_cert, files.client_key)
        self.ctl_options = secure_options(files)

    @property
    def url(self) -> str:
        """Where clients connect, as a URL."""
        return f"https://{self.endpoint}"


def secure_options(files: Certificates) -> list[str]:
    """Return etcdctl's options for a server that requires certificates; the proxy's options for etcd are the same."""
    return [f"--cacert={files.ca}", f"--cert={files.client_cert}", f"--key={files.client_key}"]
