"""All programs."""

from __future__ import annotations

from tests.differential import programs_ids, programs_large, programs_life, programs_progress, programs_revisions
from tests.differential.steps import Program

PROGRAMS: tuple[Program, ...] = (
    *programs_ids.PROGRAMS,
    *programs_revisions.PROGRAMS,
    *programs_progress.PROGRAMS,
    *programs_large.PROGRAMS,
    *programs_life.PROGRAMS,
)
