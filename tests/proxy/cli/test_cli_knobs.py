"""Flags, variables and the file: their precedence, and grpc-proxy's other flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from proxy.cli.knobs import REFUSED, TAKEN, KnobCommand, knob_options, settings_of, unknown_variables
from proxy.config.knobs import Settings, knobs
from proxy.errors import Failed


@click.command(cls=KnobCommand)
@knob_options
@click.pass_context
def command(ctx: click.Context, /, **_given: Any) -> tuple[Settings, list[str]]:
    """Return the settings and notes that `serve` would use."""
    return settings_of(ctx)


def settings(*arguments: str) -> tuple[Settings, list[str]]:
    result: tuple[Settings, list[str]] = command.main(list(arguments), standalone_mode=False)
    return result


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for knob in knobs():
        monkeypatch.delenv(knob.env, raising=False)
    monkeypatch.delenv("WATCHMUX_CONFIG", raising=False)


def test_nothing_given_is_the_default() -> None:
    assert settings() == (Settings(), [])


def test_every_setting_has_a_flag_and_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"duration": "7s", "size": "1KiB", "number": "7", "switch": "true", "text": "x", "comma-separated": "a:1"}
    for knob in knobs():
        text = texts.get(knob.kind.value) or (knob.choices[0] if knob.choices else "127.0.0.1:7")
        if knob.kind.value == "file":
            continue  # these need each other and real certificates: see test_config_file.py
        if knob.path in ("upstream.user", "upstream.password"):
            continue  # these need each other too
        by_flag, _ = settings(f"{knob.flag}={text}")
        monkeypatch.setenv(knob.env, text)
        by_variable, _ = settings()
        monkeypatch.delenv(knob.env)
        assert by_flag == by_variable
        assert getattr(getattr(by_flag, knob.table), knob.key) != knob.default or text in str(knob.default), knob.flag


def test_flags_override_variables_files_and_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.toml"
    path.write_text("[watch]\nlinger_s = 1\nhistory_linger_s = 1\nhistory_age_s = 1\n")
    monkeypatch.setenv("WATCHMUX_LINGER", "2s")
    monkeypatch.setenv("WATCHMUX_HISTORY_LINGER", "2s")
    found, _ = settings(f"--config={path}", "--linger=3s")
    assert found.watch.linger_s == 3.0
    assert found.watch.history_linger_s == 2.0
    assert found.watch.history_age_s == 1.0
    assert found.watch.backfills_max == Settings().watch.backfills_max


def test_the_file_can_be_named_by_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.toml"
    path.write_text("[watch]\nlinger_s = 1\n")
    monkeypatch.setenv("WATCHMUX_CONFIG", str(path))
    assert settings()[0].watch.linger_s == 1.0


def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHMUX_LINGER", "soon")
    with pytest.raises(Failed) as error:
        settings()
    assert str(error.value) == "WATCHMUX_LINGER: 'soon' is not a duration; write it like 500ms, 10s or 1m30s"
    assert error.value.code == 2


def test_a_bad_url_for_clients_is_refused() -> None:
    with pytest.raises(Failed) as error:
        settings("--advertise-client-url=ftp://proxy:1")
    problem = "'ftp://proxy:1': unknown scheme 'ftp'; use http://HOST:PORT or https://HOST:PORT"
    assert str(error.value) == f"--advertise-client-url: {problem}"
    assert error.value.code == 2


def test_switches_take_a_value_or_none() -> None:
    assert settings("--insecure-skip-tls-verify")[0].upstream.insecure_skip_tls_verify
    assert settings("--insecure-skip-tls-verify=true")[0].upstream.insecure_skip_tls_verify
    assert not settings("--insecure-skip-tls-verify=false")[0].upstream.insecure_skip_tls_verify


def test_an_explicit_log_level_overrides_debug() -> None:
    assert settings("--debug")[0].log.log_level == "debug"
    assert settings("--debug", "--log-level=warn")[0].log.log_level == "warn"


@pytest.mark.parametrize("name", list(TAKEN))
def test_flags_without_effect_are_accepted_with_a_note(name: str) -> None:
    found, notes = settings(f"--{name}=1")
    assert found == Settings()
    assert notes == [f"--{name} has no effect: {TAKEN[name]}"]


@pytest.mark.parametrize("name", list(REFUSED))
def test_flags_of_missing_features_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(Failed) as error:
        settings(f"--{name}=1")
    assert str(error.value) == f"--{name}: {REFUSED[name]}"
    assert error.value.code == 2


def test_a_misspelt_variable_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHMUX_LISTEN_ADRR", "a:1")
    assert settings()[1] == ["unknown environment variable WATCHMUX_LISTEN_ADRR; did you mean WATCHMUX_LISTEN_ADDR?"]


def test_variables_set_by_kubernetes_are_ignored() -> None:
    injected = ["WATCHMUX_SERVICE_HOST", "WATCHMUX_SERVICE_PORT", "WATCHMUX_PORT", "WATCHMUX_PORT_23790_TCP_ADDR"]
    assert unknown_variables(dict.fromkeys(injected, "x")) == []
    assert not any(knob.env.startswith(("WATCHMUX_SERVICE_", "WATCHMUX_PORT")) for knob in knobs())


GRPC_PROXY_FLAGS = """
advertise-client-url auto-tls cacert cert cert-file client-crl-file data-dir debug dial-keepalive-time
dial-keepalive-timeout discovery-srv discovery-srv-name enable-pprof endpoints endpoints-auto-sync-interval
experimental-leasing-prefix experimental-serializable-ordering grpc-keepalive-interval grpc-keepalive-min-time
grpc-keepalive-timeout insecure-discovery insecure-skip-tls-verify key key-file listen-addr listen-cipher-suites
max-concurrent-streams max-recv-bytes max-send-bytes metrics-addr namespace permit-without-stream resolver-prefix
resolver-ttl self-signed-cert-validity tls-max-version tls-min-version trusted-ca-file
"""


@pytest.mark.parametrize("name", GRPC_PROXY_FLAGS.split())
def test_every_flag_of_etcds_grpc_proxy_is_known(name: str) -> None:
    """The flags of `etcd grpc-proxy start --help`, etcd 3.5.30."""
    known = {option for parameter in command.params for option in parameter.opts}
    assert f"--{name}" in known
