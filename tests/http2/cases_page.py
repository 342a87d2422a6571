"""Writes docs/evidence/http2-cases.md from the table of `cases.py`: `python -m tests.http2.cases_page`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.http2 import cases, cases_headers
from tests.http2.cases import Case

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evidence" / "http2-cases.md"
INTRODUCTION = """# HTTP/2, error by error

The answers of the listener (to a client) and of the connection to etcd (to a server) if the peer violates RFC 9113
(plain section numbers) or another RFC (its number first); and to similar input that is not an error.
`tests/http2/test_conformance.py` sends each row as raw bytes over a socket, to both where it applies. This page is
generated from its table (`python -m tests.http2.cases_page`), and a test checks that it is up to date.

- **connection X**: GOAWAY with X; further input is ignored and the connection is closed.
- **stream X**: RST_STREAM with X. With this and the following answers other streams continue: the test uses one of them
  until its end.
- **after END_STREAM**: the listener's client has ended its side of an open call. The connection to etcd resets a stream
  that its server has ended, and ignores later frames for it.
- **no error**: no frame in return. **answered**: a response, or an acknowledgement.
- **closed silently**: the listener passes input without HTTP/2's preface to its HTTP/1 side, which is off in this test;
  the connection to etcd sends no GOAWAY to a server that does not speak HTTP/2 (3.4).
"""


def page(rows: Iterable[Case]) -> str:
    """Return the page's text."""
    head = [INTRODUCTION, "| section | sent | to the listener | to the connection to etcd |", "|---|---|---|---|"]
    lines = [
        f"| {case.section} | {case.what} | {case.server or '-'} | {case.client or '-'} |"
        for case in sorted(rows, key=_place)
    ]
    return "\n".join([*head, *lines]) + "\n"


def _place(case: Case) -> tuple[bool, list[int]]:
    numbers = [int(number) for number in re.findall(r"\d+", case.section)]
    return " " in case.section, numbers


if __name__ == "__main__":
    PAGE.write_text(page((*cases.CASES, *cases_headers.CASES)))
    sys.stdout.write(f"{PAGE.name} written\n")
