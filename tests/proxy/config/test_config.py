"""The settings: complete, consistent, and with the same defaults as the code that they configure."""

from __future__ import annotations

import subprocess
import sys

import pytest

from coalesce import CoreLimits
from proxy.config.applied import (
    REQUEST_OVERHEAD_BYTES,
    core_limits,
    listener_settings,
    passthrough_settings,
    upstream_settings,
    watch_settings,
)
from proxy.config.describing import ValueSyntax
from proxy.config.knobs import Settings, UpstreamTable, knobs, tables
from proxy.listening.settings import ListenerSettings
from proxy.logs import LEVELS, STYLES
from proxy.passthrough.settings import PassthroughSettings
from proxy.watch.settings import WatchSettings
from upstream.settings import UpstreamSettings


def test_every_setting_has_a_text_a_flag_and_a_variable() -> None:
    for knob in knobs():
        assert knob.about.text.endswith("."), knob.path
        assert knob.flag.startswith("--")
        assert knob.env == "WATCHMUX_" + knob.flag[2:].replace("-", "_").upper()


def test_names_are_unique() -> None:
    for names in ([knob.flag for knob in knobs()], [knob.env for knob in knobs()], [knob.key for knob in knobs()]):
        assert len(set(names)) == len(names)


def test_names_contain_their_units() -> None:
    for knob in knobs():
        parts = knob.key.split("_")
        assert ("s" in parts) == (knob.kind is ValueSyntax.SECONDS), knob.path
        assert ("bytes" in parts) == (knob.kind is ValueSyntax.BYTES), knob.path


def test_every_table_has_a_text_and_settings() -> None:
    for name, struct in tables().items():
        assert struct.__doc__
        assert any(knob.table == name for knob in knobs())


@pytest.mark.parametrize(
    "flag",
    [
        "--endpoints",
        "--listen-addr",
        "--metrics-addr",
        "--cacert",
        "--cert",
        "--key",
        "--insecure-skip-tls-verify",
        "--cert-file",
        "--key-file",
        "--trusted-ca-file",
        "--advertise-client-url",
        "--max-concurrent-streams",
        "--grpc-keepalive-interval",
        "--grpc-keepalive-timeout",
        "--dial-keepalive-time",
        "--dial-keepalive-timeout",
        "--watch-progress-notify-interval",
    ],
)
def test_flags_that_etcd_has_too_are_marked(flag: str) -> None:
    assert next(knob for knob in knobs() if knob.flag == flag).about.from_etcd


def test_log_choices_are_what_logging_takes() -> None:
    choices = {knob.key: knob.choices for knob in knobs() if knob.choices}
    assert choices["log_level"] == LEVELS
    assert choices["log_format"] == STYLES


def test_the_defaults_are_those_of_the_parts() -> None:
    """Fails for a setting that a part does not get, or gets with another default."""
    assert core_limits(Settings()) == CoreLimits()
    assert listener_settings(Settings()) == ListenerSettings()
    assert upstream_settings(Settings()) == UpstreamSettings()
    assert watch_settings(Settings()) == WatchSettings()
    assert passthrough_settings(Settings()) == PassthroughSettings()


def test_fragments_follow_the_size_that_etcd_accepts() -> None:
    settings = Settings(upstream=UpstreamTable(max_request_bytes=1000))
    assert core_limits(settings).fragment_bytes == 1000 + REQUEST_OVERHEAD_BYTES


def test_the_settings_load_nothing_heavy() -> None:
    """`watchmux --help` loads the settings and must be fast."""
    code = (
        "import sys, proxy.cli, proxy.cli.serve, proxy.cli.demo, proxy.cli.measure, proxy.cli.store, proxy.cli.status\n"
        "print([name for name in ('grpc', 'aiohttp', 'rich', 'prometheus_client', 'google.protobuf', 'uvloop', 'ssl',"
        " 'asyncio', 'structlog') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert shown.stdout.strip() == "[]"
