"""SIGHUP: which settings are applied, which need a restart, and that invalid ones change nothing."""

from __future__ import annotations

import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.config.knobs import Settings, knobs, reloaded
from proxy.errors import Failed
from proxy.process.reloading import Reloading, changes, merged
from tests.etcd.server import EtcdServer
from tests.proxy.cli.test_cli_serve import served
from tests.waiting import until, until_async

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


@pytest.mark.parametrize("error", [Failed("no"), OSError(24, "no descriptors"), ImportError("an upgrade")])
def test_invalid_settings_change_nothing(error: Exception) -> None:
    def fails() -> tuple[Settings, list[str]]:
        raise error

    applied: list[Settings] = []
    reloading = Reloading(Settings(), applied.append)
    reloading.reload(fails)
    assert reloading.settings == Settings()
    assert not applied


async def test_the_loop_turns_while_settings_are_read() -> None:
    """Signals that come meanwhile lead to one further read; its settings are the last that are applied."""
    turned, threads = threading.Event(), list[int]()
    wanted = [changed("watch.watches_max", 5), changed("watch.watches_max", 6)]

    def read() -> tuple[Settings, list[str]]:
        threads.append(threading.get_ident())
        assert turned.wait(30)
        return wanted[len(threads) - 1], []

    applied: list[int] = []
    reloading = Reloading(Settings(), lambda settings: applied.append(settings.watch.watches_max))
    reloading.reload_in_thread(read)
    await until_async(lambda: bool(threads), "the read to begin")
    for _ in range(3):
        reloading.reload_in_thread(read)
    assert not applied
    turned.set()
    await until_async(lambda: reloading._reading is None, "the reads to end")
    assert applied == [5, 6]
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("stops", [False, True])
async def test_nothing_is_applied_of_a_read_that_comes_too_late(stops: bool) -> None:
    """It fails, or the proxy stops meanwhile; the next signal leads to a read again."""
    turned = threading.Event()

    def read() -> tuple[Settings, list[str]]:
        assert turned.wait(30)
        if not stops:
            raise Failed("no")
        return changed("watch.watches_max", 5), []

    applied: list[Settings] = []
    reloading = Reloading(Settings(), applied.append)
    reloading.reload_in_thread(read)
    if stops:
        reloading.stop()
    turned.set()
    await until_async(lambda: reloading._reading is None, "the read to end")
    assert not applied
    reloading.reload_in_thread(lambda: (changed("watch.watches_max", 5), []))
    await until_async(lambda: reloading._reading is None, "the next read to end")
    assert len(applied) == (not stops)


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
