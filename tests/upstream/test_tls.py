"""TLS contexts: an error names the file and the problem."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from tests.upstream.certificates import Certificates, make_certificates
from upstream.errors import BadTls
from upstream.tls import client_context, server_context


def test_contexts_verify_and_refuse_old_tls(certificates: Certificates) -> None:
    files = certificates
    client = client_context(files.client_cert, files.client_key, files.ca)
    assert client.verify_mode == ssl.CERT_REQUIRED
    assert client.check_hostname
    assert client.minimum_version == ssl.TLSVersion.TLSv1_2
    assert client_context().verify_mode == ssl.CERT_REQUIRED
    careless = client_context(insecure_skip_verify=True)
    assert careless.verify_mode == ssl.CERT_NONE
    assert server_context(files.server_cert, files.server_key).verify_mode == ssl.CERT_NONE
    assert server_context(files.server_cert, files.server_key, files.ca).verify_mode == ssl.CERT_REQUIRED
    assert server_context(files.server_cert, files.server_key, None, True).verify_mode == ssl.CERT_REQUIRED


def test_bad_files_are_refused(certificates: Certificates, tmp_path: Path) -> None:
    files = certificates
    text = tmp_path / "text.pem"
    text.write_text("nothing of the kind")
    encrypted = tmp_path / "encrypted.key"
    key = serialization.load_pem_private_key(Path(files.client_key).read_bytes(), None)
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    encrypted.write_bytes(key.private_bytes(pem, form, serialization.BestAvailableEncryption(b"x")))
    missing = str(tmp_path / "missing.pem")
    cases = [
        ((files.client_cert, None, None), files.client_cert, "without its key"),
        ((None, files.client_key, None), files.client_key, "without its certificate"),
        ((missing, files.client_key, None), missing, "no such file"),
        ((files.client_cert, missing, None), missing, "no such file"),
        ((None, None, missing), missing, "no such file"),
        ((None, None, str(tmp_path)), str(tmp_path), "cannot be read"),
        ((None, None, str(text)), str(text), "no certificate of an authority"),
        ((files.client_cert, files.server_key, None), files.server_key, "does not belong to the certificate"),
        ((files.client_cert, str(text), None), str(text), "no private key"),
        ((str(text), files.client_key, None), str(text), "cannot be read"),
        ((files.client_cert, str(encrypted), None), str(encrypted), "encrypted"),
    ]
    for arguments, where, complaint in cases:
        with pytest.raises(BadTls, match=complaint) as refusal:
            client_context(*arguments)
        assert refusal.value.where == where
        assert refusal.value.to_do


def test_a_failed_renewal_is_kept_for_a_caller_that_reports(tmp_path: Path) -> None:
    """Connections towards etcd have no reporter: their look at the files does not hide the problem from others."""
    files = make_certificates(tmp_path)
    context = client_context(files.client_cert, files.client_key)
    Path(files.client_key).write_bytes(Path(files.server_key).read_bytes())
    problems: list[BadTls] = []
    assert context.newest() is context
    assert context.newest(problems.append) is context
    assert context.newest(problems.append) is context
    assert len(problems) == 1
