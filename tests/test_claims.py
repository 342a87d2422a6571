"""Sentences of the pages for readers that a test can hold: numbers, defaults, names, messages, commands and links.

Other claims are held where their subject is tested: docs/guarantees.md names a test for each, tests/test_pages.py holds
the migration table and the alerts, tests/test_readme.py runs the README, tests/proxy/config the files of configs/.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from coalesce.limits import CoreLimits
from proxy import errors, server
from proxy.admin import monitor, self_probe
from proxy.cli.group import COMMANDS, cli
from proxy.config.describing import ValueSyntax
from proxy.config.file import from_text
from proxy.config.knobs import knobs
from proxy.config.values import show_duration
from proxy.config.variables import problems_of
from proxy.measuring.load import plan, writer
from proxy.passthrough.settings import PassthroughSettings
from proxy.process import descriptors, shares, supervision
from tests.etcd.server import EtcdServer
from tests.proxy.config.test_deployment import exported
from tests.proxy.config.test_packaging import VERSION
from tests.sim import test_simulation
from upstream import heads

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
EVERY = pytest.mark.parametrize("page", PAGES)
MIB = 1 << 20
# Of other programs: etcd, etcdctl, Kubernetes, pip, help2man, the project's own tools.
FOREIGN_FLAGS = re.compile(
    "--(auth-token-ttl|case|client-cert-auth|cluster|docs|etcd-cafile|etcd-servers|etcd-servers-overrides|experimental"
    "|name|no-deps|no-info|only|peer|prefix|providers|target|version-string)"
)


@cache
def text_of(page: str) -> str:
    """Return a page with each run of white space as one space."""
    return " ".join(PAGES[page].read_text().split())


@cache
def sources() -> str:
    """Return the text of the product, with the parts of broken string literals joined."""
    paths = [path for package in ("proxy", "upstream", "coalesce") for path in (ROOT / package).rglob("*")]
    text = "\n".join(path.read_text() for path in paths if path.suffix in (".py", ".js", ".html"))
    return re.sub(r'"\s*\n\s*f?"', "", text)


def flags() -> frozenset[str]:
    """Return the flags of all commands."""
    context = click.Context(cli)
    commands = [cli.get_command(context, name) for name in COMMANDS]
    parameters = [parameter for command in commands if command for parameter in command.params]
    return frozenset(name for parameter in parameters for name in parameter.opts) | {"--help", "--version"}


@EVERY
def test_every_flag_exists(page: str) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text_of(page)))
    assert [flag for flag in named - flags() if not FOREIGN_FLAGS.fullmatch(flag)] == []


@EVERY
def test_every_variable_exists(page: str) -> None:
    named = set(re.findall(r"\bWATCHMUX_[A-Z_]+[A-Z]\b", text_of(page))) - {"WATCHMUX_PORT"}
    assert list(problems_of(dict.fromkeys(named, "x"))) == []


@EVERY
def test_every_metric_is_exported(page: str) -> None:
    """Except those that the migration page names as absent."""
    named = set(re.findall(r"\b(?:watchmux|grpc_server|etcd_grpc_proxy)_[a-z_]+[a-z]\b(?!\*|_)", text_of(page)))
    known = exported() | {name.removesuffix("_count") for name in exported()}
    assert named - known <= {"etcd_grpc_proxy_cache", "grpc_server_msg"}


def test_every_metric_of_etcd_exists(etcd: EtcdServer) -> None:
    import urllib.request

    with urllib.request.urlopen(f"http://{etcd.endpoint}/metrics", timeout=10) as answer:
        shown = answer.read().decode()
    named = {name for page in PAGES for name in re.findall(r"\betcd_(?!grpc_proxy)[a-z_]+_total\b", text_of(page))}
    assert len(named) > 4
    assert {name for name in named if f"\n{name}" not in shown} == set()


def commands() -> Iterator[str]:
    """Yield each command line of watchmux in the code blocks and in the text."""
    for page, path in PAGES.items():
        blocks = re.findall(r"^ {0,3}```\w*\n(.*?)^ {0,3}```|^ {4}(\S.*)$", path.read_text(), re.MULTILINE | re.DOTALL)
        for line in (line for block in blocks for line in "\n".join(block).splitlines()):
            if found := re.match(r"(?:\S*/)?watchmux ((?:" + "|".join(COMMANDS) + r")\b.*?)(?: {2,}.*|\s+#.*)?$", line):
                yield found[1]
        for line in re.findall(r"`watchmux ((?:" + "|".join(COMMANDS) + r")\b[^`]*)`", text_of(page)):
            yield line


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_every_command_line_is_valid(line: str) -> None:
    name, *arguments = shlex.split(line.replace("...", "").replace("[,]", ""))
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    # Files and addresses of the pages do not exist here; the flags and the form of their values are checked. The text
    # may name a flag without its value.
    with contextlib.suppress(click.MissingParameter, click.BadOptionUsage, click.exceptions.Exit):
        command.make_context(name, arguments).close()


@EVERY
def test_every_make_target_exists(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", text_of(page))) <= targets


@EVERY
def test_every_default_is_that_of_the_setting(page: str) -> None:
    """`setting_s` (5 s) and `setting_max` (256 MiB) are written as everywhere."""
    by_key = {knob.key: knob for knob in knobs()}
    for key, shown in re.findall(r"`([a-z_]+)` \(([\d,.]+ ?\w+)\)", text_of(page)):
        if key in by_key and by_key[key].kind in (ValueSyntax.SECONDS, ValueSyntax.BYTES, ValueSyntax.COUNT):
            assert from_text(by_key[key], shown.replace(" ", "").replace(",", "")) == by_key[key].default, key


@EVERY
def test_every_named_file_exists(page: str) -> None:
    for name in set(re.findall(r"`((?:[\w-]+/)+[\w-]+\.(?:py|md|toml|yml|yaml|service))(?:::\w+)?`", text_of(page))):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EVERY
def test_every_anchor_exists(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text_of(page)):
        path = PAGES[page].parent / target if target else PAGES[page]
        assert anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", ["operations.md", "troubleshooting.md", "migration.md", "guarantees.md"])
def test_every_quoted_message_is_in_the_source(page: str) -> None:
    """A message is quoted text of several words without the signs of a command, an expression or another program."""
    others = "watchmux [^:]|python|make |kill|pip|etcd|ulimit|unix|sum|pytest|rpc |mvcc|help2man|docker|cover ="
    for quoted in re.findall(r"`([^`]+)`", text_of(page)):
        if re.fullmatch(r"(watchmux: |[a-z']+ )[\w',:; .-]+", quoted) and not re.match(others, quoted):
            for part in quoted.split("..."):
                assert part.strip(" :") in sources(), quoted


LIMITS, PASSED = CoreLimits(), PassthroughSettings()
DEFAULTS = {knob.flag: knob.default for knob in knobs()}
HALF = {0.5: "half"}
WORD = {3: "three", 8: "eight"}
NUMBERS = {
    "README.md": (
        f"the checkers to {test_simulation.SEEDS:,} seeds of the simulator",
        f"It is young: version {VERSION}, without a record of production use",
    ),
    "operations.md": (
        f"the client connections as JSON, {monitor.CLIENTS_LISTED:,} at most (with `--workers`: "
        f"{monitor.CLIENTS_SHOWN} of each worker",
        f"{WORD[self_probe.HUNG_AFTER].title()} consecutive probes without a response count as a hang",
        f"event loop is blocked for {supervision.SILENT_S:.0f} s, is replaced at once",
        f"restarted with growing delays, up to {supervision.RESTART_S_MAX:.0f} s",
        f"divided by the number of workers, plus {(shares.MARGIN - 1) * 100:.0f} %",
        f"a reserve for the proxy itself: {descriptors.FILES + descriptors.ADMIN}, those open at the start, and "
        f"{descriptors.ETCD_PER_ENDPOINT} per endpoint, at most {HALF[descriptors.RESERVED_SHARE_MAX]}",
        f"writes keys below `{plan.ROOT.decode()}`",
        f"etcd deletes them itself within {'two' if writer.LEASE_TTL_S == 120 else ''} minutes",
        f"spread over {HALF[server.DRAIN_WATCHES_SHARE]} of `drain_s`",
        "exits with code 1 if an event was lost" if errors.FAILURE == 1 else "",
    ),
    "troubleshooting.md": (
        f"Exit code {errors.WRONG_REQUEST}: invalid settings; {errors.FAILURE}: failure at run time",
        f"after they have passed through {WORD[heads.HOPS_MAX]} proxies (`{heads.HOPS.decode()}`)",
    ),
    "migration.md": (
        f"each is held until it is complete ({PASSED.partial_bytes_max // MIB} MiB for all together",
        f"| `--listen-addr` | same | {DEFAULTS['--listen-addr']}, as in",
        f"| `--max-concurrent-streams` | same | default {DEFAULTS['--max-concurrent-streams']:,};",
        f"| `--dial-keepalive-time` | same | default {show_duration(DEFAULTS['--dial-keepalive-time'])},",
        f"| `--dial-keepalive-timeout` | same | default {show_duration(DEFAULTS['--dial-keepalive-timeout'])};",
        f"| `--grpc-keepalive-interval` | same | {show_duration(DEFAULTS['--grpc-keepalive-interval'])}, as in",
        f"| `--grpc-keepalive-timeout` | same | {show_duration(DEFAULTS['--grpc-keepalive-timeout'])}, as in",
    ),
    "clients.md": (f"`progress_interval_s` ({LIMITS.progress_interval_s * 1000:.0f} ms)",),
}


@pytest.mark.parametrize("page", NUMBERS)
def test_numbers_are_those_of_the_code(page: str) -> None:
    for sentence in NUMBERS[page]:
        assert sentence in text_of(page)


# A sentence of the README, and the line of docs/performance.md that it quotes: rounded in the former.
QUOTED = (
    (r"burst to 1,000 streams on 20 connections", r"([\d.]+) of grpc-proxy's for a burst", r"\| burst \| ([\d.]+) of"),
    (r"one connection per client", r"([\d.]+) with one connection per client", r"\| single \| ([\d.]+) of"),
    (r"one watch per range", r"([\d.]+) with one watch per range", r"\| lowfan \| ([\d.]+) of"),
    (r"10,000 idle streams", r"idle streams take (\d+) MiB", r"10,000 idle streams take (\d+) MiB"),
    (r"5,000 watches over 10 ranges", r"used (\S+) times less CPU", r"CPU time, including the writes \|.*?\| (\S+)x"),
    (r"became 10", r"sent (\d+) times fewer bytes", r"\| bytes sent \|[^|]*\|[^|]*\| (\d+)x"),
)


@pytest.mark.parametrize(("about", "quote", "line"), QUOTED)
def test_figures_of_the_readme_are_measured(about: str, quote: str, line: str) -> None:
    readme, figures = text_of("README.md"), text_of("performance.md")
    assert re.search(about, readme)
    said, measured = re.search(quote, readme), re.search(line, figures)
    assert said is not None
    assert measured is not None
    assert float(said[1]) == round(float(measured[1]), len(said[1].partition(".")[2]))
