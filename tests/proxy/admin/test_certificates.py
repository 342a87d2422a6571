"""The metric of the certificates in use: when each of them expires, also after it was renewed."""

from __future__ import annotations

import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

from proxy.admin.aggregate import merged
from proxy.admin.snapshot import Snapshot
from tests.etcd.secure import SecureEtcdServer, secure_options
from tests.proxy_process import ProxyProcess
from tests.upstream.certificates import make_certificates
from tests.waiting import until

METRIC = 'watchmux_certificate_expiry_timestamp_seconds{use="%s"}'
NOW = datetime.now(UTC).replace(microsecond=0)


def issue(authority: trustme.CA, cert: str, key: str, life: timedelta) -> float:
    """Write a new pair over these files; return when it expires, in seconds since the epoch."""
    expires = NOW + life
    pair = authority.issue_cert("127.0.0.1", not_after=expires)
    pair.private_key_pem.write_to_path(key)
    pair.cert_chain_pems[0].write_to_path(cert)
    return expires.timestamp()


def test_the_expiry_of_each_certificate_is_a_metric(tmp_path: Path) -> None:
    """Of the listener and of the client certificate for etcd; renewed files count at once and after SIGHUP."""
    files = make_certificates(tmp_path)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(files.other_ca)
    cert, key = str(tmp_path / "listener.pem"), str(tmp_path / "listener.key")
    ours = [f"--cert-file={cert}", f"--key-file={key}", f"--trusted-ca-file={files.other_ca}", *secure_options(files)]
    listener = issue(authority, cert, key, timedelta(hours=3))
    with SecureEtcdServer(files) as etcd, ProxyProcess(etcd.url, ours) as proxy:
        assert proxy.metric(METRIC % "listener") == listener
        assert proxy.metric(METRIC % "upstream") > listener
        # Half of a renewal: the key does not belong to the certificate. The old pair stays in use.
        Path(key).write_bytes(Path(files.client_key).read_bytes())
        assert proxy.metric(METRIC % "listener") == listener
        until(lambda: "cannot load the renewed certificate files" in proxy.log(), "the failed renewal to be logged")
        listener = issue(authority, cert, key, timedelta(hours=5))
        upstream = issue(trustme.CA(), files.client_cert, files.client_key, timedelta(hours=7))
        assert proxy.process is not None
        proxy.process.send_signal(signal.SIGHUP)
        until(lambda: "settings reloaded" in proxy.log(), "the reload")
        assert proxy.metric(METRIC % "listener") == listener
        assert proxy.metric(METRIC % "upstream") == upstream


def test_a_whole_shows_the_certificate_that_expires_first() -> None:
    hub = Snapshot(certificate_expiry_s={"upstream": 7.0})
    workers = [Snapshot(certificate_expiry_s={"listener": at, "upstream": 9.0}) for at in (5.0, 4.0)]
    assert merged(hub, workers).certificate_expiry_s == {"upstream": 7.0, "listener": 4.0}
