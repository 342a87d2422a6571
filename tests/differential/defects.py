"""Known faults of older etcds, and limits of the proxy on them: the only differences allowed there.

A defect names the versions it was seen in, the programs that show it and the lines of the comparison that it excuses.
For a version that is not listed nothing is excused: a new version must be examined. The proxy is right in all of them
unless the text says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.differential.steps import Ask, Create, Login, Open, Program

Version = tuple[int, int, int]
OLD_3_4: Version = (3, 4, 23)
OLD_3_5: Version = (3, 5, 1)


@dataclass(frozen=True)
class Defect:
    """One fault of older etcds."""

    name: str
    what: str
    versions: tuple[Version, ...]
    shows: str
    """A kind of program, see `_KINDS`, or a regular expression on names."""
    excuses: str
    """A regular expression on lines of the comparison."""
    stalls: bool = False
    """Whether a wait of a program may time out, directly or through the proxy."""


UNORDERED = "before 3.4.31 and 3.5.13 a manual progress answer may overtake events"

DEFECTS = (
    Defect(
        "unordered progress",
        f"{UNORDERED}; the proxy does not ask such servers and answers from events and notifies, seldom or never",
        (OLD_3_4, OLD_3_5),
        "asks",
        r"progress:|has an event at|is below what watch|takes progress back",
        stalls=True,
    ),
    Defect(
        "negative starts",
        "before 3.4.38 and 3.5.24 a negative start is taken for now, so ids and refusals after it shift",
        (OLD_3_4, OLD_3_5),
        "negative",
        r": \w+ (controls|watch|progress|end|notified)|of a watch that does not live",
        stalls=True,
    ),
    Defect(
        "refused under an id",
        "a create refused for its permission is answered under the id it asked for, 0 by default, always as "
        "PermissionDenied; a live watch of that id gets no events after it",
        (OLD_3_4, OLD_3_5),
        "auth",
        r": \w+ (controls|watch)|refuses under an id|gives an id twice|of a watch that does not live",
        stalls=True,
    ),
    Defect(
        "notified before its start",
        "a watch of a future revision is sent progress notifies below its start",
        (OLD_3_4, OLD_3_5),
        "notify before a future start",
        r"notified 1:",
    ),
)


def _negative(program: Program) -> bool:
    return any(isinstance(step, Create) and step.raw_start < 0 for step in program.steps)


_KINDS: dict[str, Callable[[Program], bool]] = {
    "asks": lambda program: any(isinstance(step, Ask) for step in program.steps),
    "negative": _negative,
    "auth": lambda program: any(isinstance(step, Login | Open) for step in program.steps) and program.auth,
}


def known(version: Version, program: Program) -> list[Defect]:
    """Return the defects that a program shows on a version."""
    found = []
    for defect in DEFECTS:
        kind = _KINDS.get(defect.shows)
        shows = kind(program) if kind is not None else re.search(defect.shows, program.name) is not None
        if version in defect.versions and shows:
            found.append(defect)
    return found


def excused(line: str, defects: list[Defect]) -> bool:
    """Return whether one of these excuses a line of the comparison."""
    return any(re.search(defect.excuses, line) or (defect.stalls and "waited in vain" in line) for defect in defects)
