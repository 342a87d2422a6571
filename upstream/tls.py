"""
TLS contexts from certificate files, with errors that name the file and what is wrong with it.

HTTP/2 over TLS needs ALPN `h2` and TLS 1.2 (RFC 9113 3.2, 9.2); both ends of the proxy get their contexts here.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from upstream.errors import BadTls


def client_context(
    cert: str | None = None, key: str | None = None, cacert: str | None = None, insecure_skip_verify: bool = False
) -> ssl.SSLContext:
    """
    Return the context for connections to an etcd; the names are those of etcdctl's flags.

    Without `cacert` the system's authorities are trusted. `insecure_skip_verify` trusts whoever answers. Raises
    BadTls.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _harden(context)
    if insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif cacert:
        _load_authorities(context, cacert)
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if cert or key:
        _load_pair(context, cert, key)
    return context


def server_context(
    cert: str, key: str, trusted_ca: str | None = None, client_cert_auth: bool = False
) -> ssl.SSLContext:
    """
    Return the context for a listener. With `trusted_ca` or `client_cert_auth` clients have to show a certificate.

    Raises BadTls.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context)
    _load_pair(context, cert, key)
    if trusted_ca:
        _load_authorities(context, trusted_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    elif client_cert_auth:
        context.load_default_certs(ssl.Purpose.CLIENT_AUTH)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    # Compression is off by default everywhere; RFC 9113 9.2.1 forbids it.
    context.options |= ssl.OP_NO_COMPRESSION


def _load_authorities(context: ssl.SSLContext, path: str) -> None:
    _check_readable(path)
    try:
        context.load_verify_locations(cafile=path)
    except (ssl.SSLError, OSError) as error:
        raise BadTls(path, f"it holds no certificate of an authority ({_reason(error)})", "give a PEM file") from None


def _load_pair(context: ssl.SSLContext, cert: str | None, key: str | None) -> None:
    if not cert:
        raise BadTls(str(key), "a key is given without its certificate", "give the certificate too (--cert)")
    if not key:
        raise BadTls(cert, "a certificate is given without its key", "give the key too (--key)")
    _check_readable(cert)
    _check_readable(key)
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except _Encrypted:
        raise BadTls(key, "the key is encrypted", "give a key without a passphrase") from None
    except (ssl.SSLError, OSError) as error:
        reason = _reason(error)
        if "KEY_VALUES_MISMATCH" in reason or "KEY_TYPE_MISMATCH" in reason:
            raise BadTls(key, f"the key does not belong to the certificate {cert}", "give a pair") from None
        if _has(cert, "-----BEGIN CERTIFICATE-----") and not _has(key, "PRIVATE KEY-----"):
            raise BadTls(key, f"it holds no private key ({reason})", "give the key as a PEM file") from None
        raise BadTls(cert, f"certificate or key cannot be read ({reason})", "give PEM files") from None


class _Encrypted(Exception):
    """The key asks for a passphrase."""


def _no_password() -> str:
    raise _Encrypted


def _check_readable(path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except FileNotFoundError:
        raise BadTls(path, "there is no such file", "check the path") from None
    except OSError as error:
        raise BadTls(path, f"it cannot be read ({error.strerror})", "check its permissions") from None


def _has(path: str, mark: str) -> bool:
    return mark in Path(path).read_text("latin-1")


def _reason(error: OSError) -> str:
    return (error.reason if isinstance(error, ssl.SSLError) else None) or error.strerror or type(error).__name__
