"""SIGHUP: which settings are applied, which need a restart, and that invalid ones change nothing."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.config.knobs import Settings, knobs, reloaded
from proxy.errors import Failed
from proxy.process.reloading import Reloading, changes, merged
from tests.etcd.server import EtcdServer
from tests.proxy.cli.test_cli_serve import served
from tests.waiting import until

SECURITY = ("cert", "key", "cacert", "insecure_skip_tls_verify", "addr")


def changed(path: str, value: object) -> Settings:
    """Return the defaults, except for one setting."""
    table, _, key = path.partition(".")
    settings = Settings()
    return replace(settings, **{table: replace(getattr(settings, table), **{key: value})})


def other(path: str) -> object:
    """Return a value other than the default."""
    knob = next(knob for knob in knobs() if knob.path == path)
    if knob.choices:
        return next(choice for choice in knob.choices if choice != knob.default)
    return not knob.default if isinstance(knob.default, bool) else knob.default + knob.default if knob.default else 7


def test_reloaded_settings_exist_and_exclude_tls_and_credentials() -> None:
    paths = {knob.path for knob in knobs()}
    assert paths > reloaded()
    assert not [path for path in reloaded() if path.endswith(SECURITY)]


@pytest.mark.parametrize("path", [knob.path for knob in knobs() if knob.default != []])
def test_each_setting_is_applied_or_needs_a_restart(path: str) -> None:
    new = changed(path, other(path))
    assert changes(Settings(), new) == {path}
    assert changes(Settings(), merged(Settings(), new)) == ({path} & reloaded())


def test_invalid_settings_change_nothing() -> None:
    def fails() -> tuple[Settings, list[str]]:
        raise Failed("no")

    applied: list[Settings] = []
    reloading = Reloading(Settings(), applied.append)
    reloading.reload(fails)
    assert reloading.settings == Settings()
    assert not applied


def test_a_proxy_that_stops_reloads_nothing() -> None:
    applied: list[Settings] = []
    reloading = Reloading(Settings(), applied.append)
    reloading.stop()
    reloading.reload(lambda: (changed("watch.watches_max", 5), []))
    assert not applied


def test_a_running_proxy_applies_limits_and_log_level(tmp_path: Path, etcd: EtcdServer) -> None:
    file = tmp_path / "watchmux.toml"
    text = f'[upstream]\nendpoints = ["{etcd.endpoint}"]\n'
    file.write_text(text)

    def messages(of: object) -> list[object]:
        return [line for line in proxy.lines() if line["msg"] == of]

    with served(tmp_path, f"--config={file}") as proxy:
        assert 'watchmux_limit{limit="watches_max"} 1e+07' in proxy.get("/metrics")[1]
        file.write_text(text + '[watch]\nwatches_max = 5\nbackfills_max = 7\n[log]\nlog_level = "debug"\n')
        proxy.process.send_signal(signal.SIGHUP)
        until(lambda: messages("settings reloaded"), "the settings to be reloaded")
        assert 'watchmux_limit{limit="watches_max"} 5.0' in proxy.get("/metrics")[1]
        (told,) = (line for line in proxy.lines() if line["msg"] == "some changes need a restart")
        assert told["settings"] == ["watch.backfills_max"]
        file.write_text("[watch]\nwatches_max = 0\n")
        proxy.process.send_signal(signal.SIGHUP)
        until(lambda: messages("invalid settings; nothing changed"), "the refusal")
        assert 'watchmux_limit{limit="watches_max"} 5.0' in proxy.get("/metrics")[1]
        assert proxy.end() == 0
