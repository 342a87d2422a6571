"""Flags, variables and the file: their precedence, and grpc-proxy's other flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from proxy.cli.knobs import REFUSED, TAKEN, KnobCommand, knob_options, settings_of
from proxy.config.applied import core_limits
from proxy.config.describing import ValueSyntax
from proxy.config.knobs import Settings, knobs
from proxy.config.variables import problems_of
from proxy.errors import Failed
from tests.upstream.certificates import make_certificates


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
        assert (
            getattr(getattr(by_flag, knob.table), knob.key) != knob.default or text.lower() in str(knob.default).lower()
        ), knob.flag


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
    # The forms of Go's strconv.ParseBool.
    for text in ["1", "t", "T", "TRUE", "true", "True"]:
        assert settings(f"--insecure-skip-tls-verify={text}")[0].upstream.insecure_skip_tls_verify
    for text in ["0", "f", "F", "FALSE", "false", "False"]:
        assert not settings(f"--insecure-skip-tls-verify={text}")[0].upstream.insecure_skip_tls_verify
    assert refusal("--insecure-discovery=maybe") == "--insecure-discovery: expected true or false, got 'maybe'"


def test_repeated_endpoints_are_all_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings("--endpoints=a:1,b:2", "--endpoints=c:3")[0].upstream.endpoints == ["a:1", "b:2", "c:3"]
    monkeypatch.setenv("WATCHMUX_ENDPOINTS", "a:1, b:2")
    assert settings()[0].upstream.endpoints == ["a:1", "b:2"]


def test_covers_are_prefixes_as_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert settings("--cover=/a/", "--cover=b,c", "--cover=")[0].watch.cover == ["/a/", "b,c", ""]
    assert core_limits(settings("--cover=/ä/", "--cover=")[0]).covers == ("/ä/".encode(), b"")
    assert refusal("--cover=/a/", "--cover=/a/") == "--cover: '/a/' is given twice; give each prefix once"
    file = tmp_path / "watchmux.toml"
    file.write_text('[watch]\ncover = ["/s/", ""]\n')
    assert settings(f"--config={file}")[0].watch.cover == ["/s/", ""]
    file.write_text('[watch]\ncover = "/s/"\n')
    assert 'expected a list of strings like ["/services/"], got' in refusal(f"--config={file}")
    monkeypatch.setenv("WATCHMUX_COVER", "/a/,/b/")
    assert settings()[0].watch.cover == ["/a/", "/b/"]
    monkeypatch.setenv("WATCHMUX_COVER", "")
    assert "WATCHMUX_COVER: is set but empty" in refusal()


def test_log_levels_in_any_case_and_by_the_names_of_zap() -> None:
    for text, level in {"INFO": "info", "warning": "warn", "Warn": "warn", "dpanic": "fatal"}.items():
        assert settings(f"--log-level={text}")[0].log.log_level == level
    assert settings("--tls-min-version=tls1.3")[0].listener.tls_min_version == "TLS1.3"
    assert refusal("--log-level=loud").startswith("--log-level: expected one of debug, info, warn, error, fatal")


def refusal(*arguments: str) -> str:
    with pytest.raises(Failed) as error:
        settings(*arguments)
    assert error.value.code == 2
    return str(error.value)


@pytest.mark.parametrize("text", ["", " ", ",", " , "])
def test_what_is_given_but_empty_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for knob in knobs():
        # The empty prefix is that of all keys.
        if knob.kind is not ValueSyntax.PREFIXES:
            assert refusal(f"{knob.flag}={text}") == f"{knob.flag}: is empty; give it a value or remove it"
        monkeypatch.setenv(knob.env, text)
        assert f"{knob.env}: is set but empty; give it a value or unset it" in refusal().splitlines()
        monkeypatch.delenv(knob.env)
    path = tmp_path / "w.toml"
    for line in (f'endpoints = "{text}"', f'endpoints = ["{text}"]', "endpoints = []", f'cacert = "{text}"'):
        path.write_text(f"[upstream]\n{line}\n")
        key = line.partition(" ")[0]
        assert refusal(f"--config={path}") == f"{path}:2: upstream.{key}: is empty; give it a value or remove it"
    assert refusal(f"--config={text}") == "--config: is empty; give it a value or remove it"
    monkeypatch.setenv("WATCHMUX_CONFIG", text)
    assert "WATCHMUX_CONFIG: is set but empty" in refusal()


def test_all_errors_are_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.toml"
    path.write_text("[watch]\nlinger_s = -1\nlingr_s = 2\n[upsteam]\n[upstream]\ncert = '/nowhere.pem'\nuser = 'a'\n")
    monkeypatch.setenv("WATCHMUX_LISTEN_ADDRS", "a:1")
    lines = refusal(f"--config={path}", "--auto-tls", "--drain=soon").splitlines()
    # The certificate that cannot be read is one error, not two: its missing key is not reported.
    assert sorted(line.removeprefix(str(path)).split(": ")[0] for line in lines) == [
        *("--auto-tls", "--drain", ":2", ":3", ":4", ":6", ":7", "WATCHMUX_LISTEN_ADDRS")
    ]


def test_without_an_etcd_the_bundled_store_may_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHMUX_BUNDLED_STORE", "false")
    assert refusal() == (
        "no etcd is configured: give --endpoints=HOST:PORT[,...] (WATCHMUX_BUNDLED_STORE forbids the bundled store)"
    )
    assert settings("--endpoints=a:1")[0].upstream.endpoints == ["a:1"]
    assert settings("--discovery-srv=example.com")[0].upstream.discovery_srv


def test_an_explicit_log_level_overrides_debug() -> None:
    assert settings("--debug")[0].log.log_level == "debug"
    assert settings("--debug", "--log-level=warn")[0].log.log_level == "warn"
    assert settings("--debug=true")[0].log.log_level == "debug"
    assert settings("--debug=F")[0].log.log_level == "info"
    assert refusal("--debug=maybe") == "--debug: expected true or false, got 'maybe'"


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


def test_an_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHMUX_ENDPOINT", "a:1")
    message = "WATCHMUX_ENDPOINT: unknown environment variable; did you mean WATCHMUX_ENDPOINTS?"
    assert refusal("--endpoints=b:1") == message
    (problem,) = problems_of({"WATCHMUX_DEBUG": "1"})
    assert problem == "WATCHMUX_DEBUG: unknown environment variable; set WATCHMUX_LOG_LEVEL=debug"
    (problem,) = problems_of({"WATCHMUX_X": "1"})
    assert problem == "WATCHMUX_X: unknown environment variable; `watchmux config` lists those that exist"


KUBERNETES = {
    "WATCHMUX_SERVICE_HOST": "10.0.0.1",
    "WATCHMUX_SERVICE_PORT": "23790",
    "WATCHMUX_SERVICE_PORT_ETCD_CLIENT": "23790",
    "WATCHMUX_PORT": "tcp://10.0.0.1:23790",
    "WATCHMUX_PORT_23790_TCP": "tcp://10.0.0.1:23790",
    "WATCHMUX_PORT_23790_TCP_PROTO": "tcp",
    "WATCHMUX_PORT_23790_TCP_PORT": "23790",
    "WATCHMUX_PORT_23790_TCP_ADDR": "10.0.0.1",
}
"""What the kubelet sets for a Service named watchmux with one port (pkg/kubelet/envvars/envvars.go)."""


def test_variables_of_a_kubernetes_service_are_ignored() -> None:
    assert list(problems_of(KUBERNETES)) == []
    # A Service named watchmux-pods.
    assert (
        list(problems_of({name.replace("WATCHMUX_", "WATCHMUX_PODS_"): KUBERNETES[name] for name in KUBERNETES})) == []
    )
    assert not any(knob.env in KUBERNETES for knob in knobs())
    # A mistake that looks alike has another value.
    assert len(list(problems_of({"WATCHMUX_PORT": "23790", "WATCHMUX_LISTEN_PORT": "1", "WATCHMUX_SERVICE": "x"}))) == 3


def test_a_proxy_that_lends_its_certificate_warns(tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    pair = (f"--cert={files.client_cert}", f"--key={files.client_key}", "--endpoints=https://a:1")
    (note,) = settings(*pair)[1]
    assert note.startswith("--cert is presented to etcd, but clients of 127.0.0.1:23790 need no certificate")
    server = (f"--cert-file={files.server_cert}", f"--key-file={files.server_key}", f"--trusted-ca-file={files.ca}")
    assert settings(*pair, *server)[1] == []
    assert settings(*pair, "--listen-addr=unix:///run/w.sock")[1] == []


def test_what_has_no_effect_is_said(tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    without = "has no effect without"
    assert settings("--endpoints=a:1", "--tls-min-version=TLS1.3")[1] == [f"--tls-min-version {without} --cert-file"]
    assert settings("--endpoints=a:1", "--discovery-srv-name=x", "--insecure-discovery")[1] == [
        f"--discovery-srv-name {without} --discovery-srv",
        f"--insecure-discovery {without} --discovery-srv",
    ]
    (note,) = settings("--endpoints=http://a:1,http://b:1", f"--cacert={files.ca}")[1]
    assert note == "--cacert has no effect: each endpoint is http://, which is without TLS"
    assert settings("--endpoints=http://a:1,b:1", f"--cacert={files.ca}")[1] == []


def test_more_workers_than_cores_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    (note,) = settings("--endpoints=a:1", "--workers=100")[1]
    assert note == "--workers=100 costs memory and CPU and serves no more clients: there are 3 cores"
    assert settings("--endpoints=a:1", "--workers=3")[1] == []


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
