"""The tables and lists of docs/ are complete: flags of grpc-proxy, settings that are reloaded, paths, alerts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from proxy.cli.knobs import REFUSED, TAKEN
from proxy.config.knobs import knobs, reloaded

ROOT = Path(__file__).parents[1]
ADMIN = (ROOT / "proxy/admin/port.py").read_text()
ETCDS_OWN = {"--debug"}


def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def table_of_flags() -> dict[str, str]:
    """Return the migration page's text on each flag."""
    return dict(re.findall(r"^\| `(--[a-z-]+)` \| ([a-z ]+) \|", text_of("migration.md"), re.MULTILINE))


def test_every_flag_of_grpc_proxy_has_its_row() -> None:
    flags = table_of_flags()
    same = {knob.flag for knob in knobs() if knob.about.from_etcd} - {"--watch-progress-notify-interval"}
    assert {flag for flag, fate in flags.items() if fate == "same"} == same | ETCDS_OWN
    assert {flag for flag, fate in flags.items() if fate == "changes nothing"} == {f"--{flag}" for flag in TAKEN}
    assert {flag for flag, fate in flags.items() if fate == "refused"} == {f"--{flag}" for flag in REFUSED}


@pytest.mark.parametrize("name", ["operations.md", "troubleshooting.md"])
def test_knobs_exist(name: str) -> None:
    keys = {knob.key for knob in knobs()}
    named = set(re.findall(r"`((?!watchmux)[a-z_]+_(?:s|max|bytes)(?:_max)?)`", text_of(name)))
    assert named
    assert named <= keys


def test_settings_documented_as_reloadable_are() -> None:
    text = text_of("operations.md")
    part = text[text.index("`kill -HUP`") : text.index("What else has changed")]
    said = set(re.findall(r"`([a-z_]+\*?)`", part))
    for knob in (path.partition(".")[2] for path in reloaded()):
        starred = any(knob.startswith(name[:-1]) for name in said if name.endswith("*"))
        assert knob in said or starred or knob.startswith(("log_", "grpc_keepalive_")), knob


def test_paths_are_served() -> None:
    for path in set(re.findall(r"`(/[a-z0-9/]+)`", text_of("operations.md"))):
        assert f'"{path}"' in ADMIN, path


def test_every_alert_has_advice() -> None:
    (group,) = yaml.safe_load((ROOT / "configs/prometheus/alerts.yml").read_text())["groups"]
    headings = set(re.findall(r"^### (\w+)$", text_of("troubleshooting.md"), re.MULTILINE))
    assert {rule["alert"] for rule in group["rules"]} == headings
