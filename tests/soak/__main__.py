"""Soak the proxy: `python -m tests.soak --minutes 20`. Exits with 1 if anything was lost or leaked."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.e2e.scenario import run
from tests.soak import report
from tests.soak.run import soak

ROOT = Path(__file__).resolve().parents[2]
OUT, DOCS = ROOT / "build/soak", ROOT / "docs"


def main() -> int:
    """Run it and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2)))
    parser.add_argument("--docs", action="store_true", help="write docs/evidence/soak.md and its graph as well")
    parser.add_argument("--out", type=Path, default=OUT, help="where report.md, samples.json and soak.png go")
    parser.add_argument("--only", default="", help="only the faults whose name contains this")
    parser.add_argument("--workers", type=int, default=0, help="--workers of the proxy, whose processes are killed too")
    parser.add_argument("--spared", choices=("hub", "worker"), default="hub", help="not killed after the first wave")
    arguments = parser.parse_args()
    sys.stdout.write(f"seed {arguments.seed}, {arguments.minutes:g} minutes\n")
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="watchmux-soak-") as made:
        course = soak(
            arguments.minutes, arguments.seed, Path(made), arguments.only, arguments.workers, arguments.spared
        )
        outcome = run(course, arguments.minutes * 60 * 2 + 900)
        arguments.out.mkdir(parents=True, exist_ok=True)
        for kept in Path(made).rglob("*.spool"):
            # The records of the clients that saw a violation.
            shutil.copy(kept, arguments.out / f"{kept.parent.name}-{kept.name}")
    sys.stdout.write(report.write(outcome, arguments.out) + "\n")
    if arguments.docs:
        report.write_docs(outcome, DOCS)
    return bool(outcome.violations or outcome.leaks)


if __name__ == "__main__":
    sys.exit(main())
