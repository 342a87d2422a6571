"""docs/evidence/http2-cases.md, made from the table of `cases.py`; `python -m tests.http2.cases_page` writes it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.http2 import cases, cases_headers
from tests.http2.cases import Case

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evidence" / "http2-cases.md"
INTRODUCTION = """# HTTP/2, error by error

What the listener answers a client, and the connection to etcd a server, that breaks RFC 9113 (sections without more) or
another RFC (its number first); and what comes close and is no error. Each row is sent as raw bytes over a socket, to
both where it applies, by `tests/http2/test_conformance.py`; this page is made from its table
(`python -m tests.http2.cases_page`), and a test holds it there.

- **connection X**: GOAWAY with X, nothing more is heard, the connection is closed.
- **stream X**: RST_STREAM with X. This and what follows here leaves other streams alone: one is used to its end.
- **after END_STREAM**: the listener's client has ended its side of a call that goes on. The connection to etcd resets a
  stream that its server has ended, and hears nothing of it any more.
- **no error**: nothing is said. **answered**: by a response, or an acknowledgement.
- **closed without a word**: what does not begin with HTTP/2's preface goes to the HTTP/1 side, which this listener
  lacks; and who answers us with something else than HTTP/2 gets no GOAWAY (3.4).
"""


def page(rows: Iterable[Case]) -> str:
    """The page as it has to be."""
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
