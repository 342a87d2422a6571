"""The common name (CN) of a certificate in a file.

The standard library shows the subject of a peer's certificate, but not of one in a file. A certificate is a tree of
values, each preceded by its tag and length (ITU-T X.690); this walks down to the subject and takes the CN (RFC 5280
4.1).
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_PEM: Final = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_COMMON_NAME: Final = b"\x55\x04\x03"
_VERSION_TAG: Final = 0xA0
_UTF16_TAG: Final = 0x1E


def common_name(path: str) -> str:
    """Return the CN of the first certificate in a PEM file; "" if it has none or the file cannot be read."""
    try:
        match = _PEM.search(Path(path).read_text("latin-1"))
        if match is None:
            return ""
        return _subject_name(ssl.PEM_cert_to_DER_cert(match[0]))
    except (OSError, ValueError, IndexError, StopIteration):
        return ""


def _subject_name(certificate: bytes) -> str:
    (_, whole) = next(_values(certificate))
    (_, signed) = next(_values(whole))
    fields = [value for tag, value in _values(signed) if tag != _VERSION_TAG]
    # The fields are serialNumber, signature, issuer, validity, subject.
    name = ""
    for _, attributes in _values(fields[4]):
        for _, attribute in _values(attributes):
            (_, kind), (tag, value) = _values(attribute)
            if kind == _COMMON_NAME:
                # If there are several, Go, and therefore etcd, takes the last one.
                name = value.decode("utf-16-be" if tag == _UTF16_TAG else "utf-8", "replace")
    return name


def _values(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Iterate over the values in `data`: their tags and contents."""
    place = 0
    while place < len(data):
        tag, size = data[place], data[place + 1]
        place += 2
        if size & 0x80:
            end = place + (size & 0x7F)
            size = int.from_bytes(data[place:end], "big")
            place = end
        yield tag, data[place : place + size]
        place += size
