"""TLS contexts from certificate files, with errors that name the file and the problem.

HTTP/2 over TLS needs ALPN `h2` and TLS 1.2 (RFC 9113 3.2, 9.2); both sides of the proxy use these contexts.
Certificates are renewed every few weeks or hours, so a context keeps the names of its files: `newest` checks each with
a stat, reads them again when they have changed, and keeps the previous context when the new files cannot be used.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from upstream.errors import BadTls

TLS_VERSIONS: Final = {"TLS1.2": ssl.TLSVersion.TLSv1_2, "TLS1.3": ssl.TLSVersion.TLSv1_3}
"""Minimum TLS versions, by etcd's names (--tls-min-version)."""

_HTTP2: Final = ("h2",)
_ANY_HTTP: Final = ("h2", "http/1.1")


class FileContext(ssl.SSLContext):
    """A context that was loaded from files and can be reloaded from them."""

    # Loads the files again, for the given protocols (ALPN). Raises BadTls.
    make: Callable[[Sequence[str]], FileContext]
    protocols: Sequence[str]
    files: tuple[str, ...]
    # The state of the files (mtime, size, inode) at the last check.
    stamps: tuple[object, ...]
    # The context of the renewed files; None if they were never renewed.
    latest: FileContext | None
    # When the certificate expires, in seconds since the epoch; None without a certificate.
    expires_at: float | None

    def newest(self, report: Callable[[BadTls], None] | None = None) -> FileContext:
        """Return the context of the current files; `report` is called once if renewed files cannot be used.

        Without `report` such files are tried again at the next call, so that a later caller can report them.
        """
        stamps = _stamps(self.files)
        if stamps != self.stamps:
            try:
                self.latest = self.make(self.protocols)
            except BadTls as problem:
                if report is None:
                    return self.latest or self
                report(problem)
            self.stamps = stamps
        return self.latest or self

    def speaking(self, protocols: Sequence[str]) -> FileContext:
        """Return a context from the same files for other protocols. Raises BadTls."""
        return self.make(protocols)


def newest(context: ssl.SSLContext, report: Callable[[BadTls], None] | None = None) -> ssl.SSLContext:
    """Return `context`, or a new one if its files were renewed."""
    return context.newest(report) if isinstance(context, FileContext) else context


def client_context(
    cert: str | None = None,
    key: str | None = None,
    cacert: str | None = None,
    insecure_skip_verify: bool = False,
    protocols: Sequence[str] = _HTTP2,
) -> FileContext:
    """Return the context for connections to an etcd; the parameters are named like etcdctl's flags.

    Without `cacert` the system's authorities are trusted. `insecure_skip_verify` accepts any server. `protocols` are
    offered by ALPN. Raises BadTls.
    """
    context = FileContext(ssl.PROTOCOL_TLS_CLIENT)
    make = partial(client_context, cert, key, cacert, insecure_skip_verify)
    _remember(context, (cert, key, cacert), make, protocols)
    if insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif cacert:
        _load_authorities(context, cacert)
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if cert or key:
        _load_pair(context, cert, key)
        context.expires_at = _check_in_use(str(cert), str(key), ssl.PROTOCOL_TLS_CLIENT)
    return context


def server_context(
    cert: str,
    key: str,
    trusted_ca: str | None = None,
    client_cert_auth: bool = False,
    min_version: str = "TLS1.2",
    protocols: Sequence[str] = _ANY_HTTP,
) -> FileContext:
    """Return the context for a listener. With `trusted_ca` or `client_cert_auth` clients must present a certificate.

    `min_version` is one of TLS_VERSIONS. Raises BadTls.
    """
    context = FileContext(ssl.PROTOCOL_TLS_SERVER)
    make = partial(server_context, cert, key, trusted_ca, client_cert_auth, min_version)
    _remember(context, (cert, key, trusted_ca), make, protocols)
    context.minimum_version = TLS_VERSIONS[min_version]
    _load_pair(context, cert, key)
    context.expires_at = _check_in_use(cert, key, ssl.PROTOCOL_TLS_SERVER)
    if trusted_ca:
        _load_authorities(context, trusted_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    elif client_cert_auth:
        context.load_default_certs(ssl.Purpose.CLIENT_AUTH)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _remember(
    context: FileContext,
    files: Sequence[str | None],
    make: Callable[[Sequence[str]], FileContext] | partial[FileContext],
    protocols: Sequence[str],
) -> None:
    """Set up a context: its files, and the options that all contexts share."""
    context.files = tuple(file for file in files if file)
    # Before the files are read: a change during the read is then noticed by the next check.
    context.stamps = _stamps(context.files)
    context.make = lambda protocols: make(protocols=protocols)  # type: ignore[call-arg]  # a partial of one above
    context.protocols = protocols
    context.latest = None
    context.expires_at = None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(list(protocols))
    # Compression is off by default everywhere; RFC 9113 9.2.1 forbids it.
    context.options |= ssl.OP_NO_COMPRESSION
    # A client could request one key exchange after another; HTTP/2 forbids it (RFC 9113 9.2.1).
    context.options |= ssl.OP_NO_RENEGOTIATION


def _stamps(files: Sequence[str]) -> tuple[object, ...]:
    stamps: list[object] = []
    for file in files:
        try:
            found = os.stat(file)
        except OSError as error:
            stamps.append(error.errno)
        else:
            stamps.append((found.st_mtime_ns, found.st_size, found.st_ino))
    return tuple(stamps)


def _check_in_use(cert: str, key: str, protocol: int) -> float:
    """Do a handshake with ourselves, so that an unusable certificate is reported before any connection fails.

    Returns when the certificate expires, in seconds since the epoch.

    Finds certificates that are expired, not yet valid, or for the other role only. It does not check who signed them.
    Raises BadTls.
    """
    ours, theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    verifier = ours if protocol == ssl.PROTOCOL_TLS_SERVER else theirs
    ours.check_hostname = False
    ours.verify_mode = ssl.CERT_NONE
    for context in (ours, theirs):
        context.load_cert_chain(cert, key, password=_no_password)
    verifier.verify_mode = ssl.CERT_REQUIRED
    verifier.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    verifier.load_verify_locations(cafile=cert)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (ours.wrap_bio(back, there), theirs.wrap_bio(there, back, server_side=True))
    for _ in range(3):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLCertVerificationError as error:
                raise BadTls(cert, f"no peer would accept it ({error.verify_message})", "renew it") from None
    found = ends[0 if protocol == ssl.PROTOCOL_TLS_SERVER else 1].getpeercert()
    assert found is not None, "the handshake is over"
    return ssl.cert_time_to_seconds(str(found["notAfter"]))


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
            raise BadTls(key, f"it contains no private key ({reason})", "give the key as a PEM file") from None
        raise BadTls(cert, f"certificate or key cannot be read ({reason})", "give PEM files") from None


class _Encrypted(Exception):
    """The key asks for a passphrase."""


def _no_password() -> str:
    raise _Encrypted


def _check_readable(path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        raise BadTls(path, "there is no such file", "check the path") from None
    except OSError as error:
        raise BadTls(path, f"it cannot be read ({error.strerror})", "check its permissions") from None


def _has(path: str, mark: str) -> bool:
    with open(path, encoding="latin-1") as file:
        return mark in file.read()


def _reason(error: OSError) -> str:
    return (error.reason if isinstance(error, ssl.SSLError) else None) or error.strerror or type(error).__name__
