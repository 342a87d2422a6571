"""`make bench`: every case at every target in turn, several rounds, medians, and the ratio to etcd's grpc-proxy."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from tests.bench import report, store
from tests.bench.cases import CASES, DEFAULT_CASES, Case
from tests.bench.measure import Figures, Results, measure
from tests.bench.profiles import DEFAULT, PROFILES
from tests.bench.targets import TARGETS
from tests.clients import golang
from tests.clients.libraries import ClientMissing
from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.server import EtcdServer
from tests.upstream.certificates import Certificates, make_certificates

OUT = Path("build/bench")


def run_case(
    case: Case, targets: tuple[str, ...], rounds: int, binary: EtcdBinary, files: Certificates
) -> tuple[dict[str, list[Figures]], list[str]]:
    """Run a case at its targets in turn, each with a separate etcd; return all figures of all rounds, and failures."""
    found: dict[str, list[Figures]] = {}
    failures = []
    for _ in range(rounds * case.rounds):
        for name in targets or case.targets:
            if name not in (*case.targets, *case.more):
                continue
            try:
                with EtcdServer(binary) as etcd, TARGETS[name](case, etcd, files) as target:
                    figures = measure(case, target, etcd.endpoint, files)
            except (AssertionError, StopIteration, ProcessLookupError) as error:
                # A target's failed round must not discard hours of the others' results; it is missing from the table.
                failures.append(f"{case.name} at {name}: {error}")
                sys.stderr.write(f"FAILED: {failures[-1]}\n")
                continue
            found.setdefault(name, []).append(figures)
            shown = {key: round(value, 3) for key, value in figures.items()}
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {case.name} {name} {json.dumps(shown)}\n")
    return found, failures


def run_store(binary: EtcdBinary, files: Certificates, keys: int) -> store.Results:
    """Run the bundled store, and the etcds it is compared with, once."""
    found: store.Results = {}
    for name in store.KINDS:
        found[name] = store.measure_kind(name, binary, files, keys)
        shown = {key: round(value, 3) for key, value in found[name].items()}
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {store.NAME} {name} {json.dumps(shown)}\n")
    return found


def write_between_marks(page: Path, text: str) -> None:
    """Replace the text between the two marks of a page."""
    head, _, rest = page.read_text().partition("<!-- figures")
    mark, _, rest = rest.partition("-->\n")
    _, end, tail = rest.partition("<!-- end of figures -->")
    page.write_text(f"{head}<!-- figures{mark}-->\n\n{text}\n{end}{tail}")


def write_files(out: Path, results: Results, stores: store.Results, about: dict[str, Any], keys: int) -> None:
    """Write all figures and the tables to a directory; tables that were not measured stay unchanged."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps({**about, "medians": results, "stores": stores}, indent=1) + "\n")
    if results:
        tables = (report.markdown_of(results), report.summary_of(results, about))
        (out / "table.md").write_text("\n".join(tables))
    if stores:
        (out / "store.md").write_text(store.markdown_of(stores, keys))


def write_docs(results: Results, about: dict[str, Any]) -> None:
    """Write the ratios into docs/performance.md, all figures and the pictures into docs/evidence/ and docs/images/."""
    from tests.bench.plots import draw

    write_between_marks(Path("docs/performance.md"), report.summary_of(results, about))
    write_between_marks(Path("docs/evidence/performance.md"), report.details_of(results, about))
    with tempfile.TemporaryDirectory() as directory:
        draw(results, Path(directory))
        for name in report.PICTURES:
            picture = Path(directory, f"{name}.png")
            if picture.exists():
                Path("docs/images", f"bench-{name}.png").write_bytes(picture.read_bytes())


def _real_clients() -> bool:
    """Return whether clientv3 can be built here; it needs Debian's Go."""
    try:
        golang.program()
    except ClientMissing as error:
        sys.stderr.write(f"without clientv3: {error}\n")
        return False
    return True


@click.command()
@click.option("--case", "names", multiple=True, type=click.Choice([*CASES, store.NAME]), help="Only these cases.")
@click.option("--target", "targets", multiple=True, type=click.Choice(list(TARGETS)), help="Only these targets.")
@click.option("--profile", type=click.Choice(list(PROFILES)), help="What the clients send while they receive.")
@click.option("--keys", default=store.KEYS, show_default=True, help="Keys in the bundled store, case store.")
@click.option(
    "--rounds",
    default=3,
    show_default=True,
    help="Rounds (a case has some more in each); the median is shown (case store: one).",
)
@click.option("--etcd", "version", default="", help="An available etcd version, such as 3.4.23 (default: the newest).")
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True, help="Where the files go.")
@click.option("--docs", is_flag=True, help="Write the figures into the pages in docs, and the pictures.")
@click.option("--machine-load", default="nothing else to speak of", help="What else ran on the machine, for the docs.")
@click.option("--plots/--no-plots", default=True, help="Draw the figures as well.")
def main(
    names: tuple[str, ...],
    targets: tuple[str, ...],
    profile: str | None,
    keys: int,
    rounds: int,
    version: str,
    out: Path,
    docs: bool,
    machine_load: str,
    plots: bool,
) -> None:
    """Measure CPU per delivered event, delay and memory, compared with etcd's own grpc-proxy, and the bundled store."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    binary = next(binary for binary in etcds() if binary.name.startswith(version))
    # Compiling takes memory that a process keeps; an installed program is already compiled.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run([sys.executable, "-m", "compileall", "-q", "proto", "coalesce", "upstream", "proxy"], check=True)
    results: Results = {}
    every: dict[str, dict[str, list[Figures]]] = {}
    failures: list[str] = []
    seconds: dict[str, float] = {}
    before = report.machine()
    with tempfile.TemporaryDirectory() as directory:
        files = make_certificates(Path(directory))
        for case in (CASES[name] for name in names or DEFAULT_CASES if name in CASES):
            if case.real and not _real_clients():
                continue
            if profile is not None and case.profile == DEFAULT:
                case = replace(case, profile=profile)
            started = time.monotonic()
            every[case.name], failed = run_case(case, targets, rounds, binary, files)
            failures += failed
            seconds[case.name] = round(time.monotonic() - started, 1)
            results[case.name] = {name: report.median_of(figures) for name, figures in every[case.name].items()}
        started = time.monotonic()
        stores: store.Results = {}
        if store.NAME in names or not (names or targets):
            stores = run_store(binary, files, keys)
            seconds[store.NAME] = round(time.monotonic() - started, 1)
    what = {name: CASES[name].what for name in results}
    about = {
        "profile": profile or DEFAULT,
        "etcd": binary.name,
        "rounds": rounds,
        "machine": before,
        "machine_load": machine_load,
        "cases": what,
        "seconds": seconds,
        "failures": failures,
    }
    console = Console()
    for table in report.tables_of(results):
        console.print(table)
    if stores:
        console.print(store.markdown_of(stores, keys), soft_wrap=True, markup=False)
    write_files(out, results, stores, {**about, "all": every}, keys)
    if docs and results:
        write_docs(results, about)
    if docs and stores:
        write_between_marks(Path("docs/store.md"), store.page_of(stores, about, keys))
    if plots and results:
        from tests.bench.plots import draw

        draw(results, out)
    took = ", ".join(f"{name} {spent:.0f}" for name, spent in sorted(seconds.items(), key=lambda each: -each[1]))
    console.print(f"{sum(seconds.values()):.0f} s in all: {took}")
    console.print(f"written to {out}/: bench.json, the tables{', and the plots' if plots and results else ''}")


if __name__ == "__main__":
    main()
