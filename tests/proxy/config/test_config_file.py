"""The configuration file: parsing, precedence of sources, and one line per error."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from proxy.config.file import ConfigError, ConfiguredValue, from_text, merge_settings
from proxy.config.knobs import Settings, knobs
from proxy.config.rendering import render_example


def settings_from(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "w.toml"
    path.write_text(text)
    return merge_settings({}, path, [])[0]


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as error:
        settings_from(tmp_path, text)
    message = str(error.value)
    assert "\n" not in message
    return message.replace(str(tmp_path) + "/", "")


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert settings_from(tmp_path, "") == Settings()


def test_a_file_sets_what_it_names(tmp_path: Path) -> None:
    settings = settings_from(
        tmp_path,
        """
        [upstream]
        endpoints = ["127.0.0.1:1", "http://127.0.0.1:2"]
        insecure_skip_tls_verify = true
        [watch]
        linger_s = 3
        history_bytes_max = 1_000
        [log]
        log_level = "debug"
        """,
    )
    assert settings.upstream.endpoints == ["127.0.0.1:1", "http://127.0.0.1:2"]
    assert settings.upstream.insecure_skip_tls_verify
    assert settings.watch.linger_s == 3.0
    assert settings.watch.history_bytes_max == 1000
    assert settings.log.log_level == "debug"
    assert settings.listener == Settings().listener


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[watch]\nlinger = 3", "w.toml:2: unknown key 'linger' in [watch]; did you mean 'linger_s'?"),
        ("[watch]\n\nlingr_s = 3", "w.toml:3: unknown key 'lingr_s' in [watch]; did you mean 'linger_s'?"),
        ("[watch]\nlisten_addr = 3", "w.toml:2: unknown key 'listen_addr' in [watch]; it belongs in [listener]"),
        ("[watch]\nxyzzy = 3", "w.toml:2: unknown key 'xyzzy' in [watch]"),
        ("linger_s = 3", "w.toml:1: unknown key 'linger_s' outside a table; it belongs in [watch]"),
        (
            "[upstreem]\n",
            "w.toml:1: unknown table [upstreem]; did you mean 'upstream'?; "
            "known tables: upstream, listener, watch, log, admin",
        ),
        ("watch = 3", "w.toml:1: watch is a table; write [watch] on its own line"),
        (
            "[watch]\nlinger_s = '3s'",
            "w.toml:2: watch.linger_s: expected a number of seconds >= 0, got '3s'",
        ),
        ("[watch]\nlinger_s = -1", "w.toml:2: watch.linger_s: expected a number of seconds >= 0, got -1"),
        ("[watch]\nlinger_s = nan", "w.toml:2: watch.linger_s: expected a number of seconds >= 0, got nan"),
        ("[watch]\nlinger_s = inf", "w.toml:2: watch.linger_s: expected a number of seconds >= 0, got inf"),
        ("[watch]\nlinger_s = 1e10", "w.toml:2: watch.linger_s: 10000000000.0 is too large; the maximum is 9223372036"),
        (
            f"[watch]\nwatches_max = {'9' * 200}",
            f"w.toml:2: watch.watches_max: {'9' * 80}... is too large; the maximum is 9223372036854775807",
        ),
        (
            f"[watch]\nwatches_max = {'9' * 5000}",
            "w.toml: not TOML: a number has too many digits, or values are nested too deeply",
        ),
        (
            f"[watch]\ncover = {'[' * 5000}",
            "w.toml: not TOML: a number has too many digits, or values are nested too deeply",
        ),
        ("[watch]\nlinger_s = true", "w.toml:2: watch.linger_s: expected a number of seconds >= 0, got true"),
        ("[watch]\nwatches_max = 1.5", "w.toml:2: watch.watches_max: expected a whole number >= 1, got 1.5"),
        (
            "[listener]\nmax_concurrent_streams = 0",
            "w.toml:2: listener.max_concurrent_streams: expected a whole number >= 1 and <= 4294967295, got 0",
        ),
        (
            "[log]\nlog_level = 'loud'",
            "w.toml:2: log.log_level: expected one of debug, info, warn, error, fatal, got 'loud'",
        ),
        (
            "[upstream]\nendpoints = '127.0.0.1:1'",
            "w.toml:2: upstream.endpoints: expected a list of strings like [\"127.0.0.1:2379\"], got '127.0.0.1:1'",
        ),
        (
            "[listener]\nlisten_addr = 'x'",
            "w.toml:2: listener.listen_addr: 'x' has no port; write HOST:PORT, like 127.0.0.1:2379",
        ),
        ("[listener]\nlisten_addr\n[log]", "w.toml:2: not TOML: expected '=' after a key in a key/value pair"),
        (
            "[upstream]\ncacert = '/nowhere/ca.pem'",
            "w.toml:2: upstream.cacert: cannot read '/nowhere/ca.pem': no such file or directory",
        ),
    ],
)
def test_each_error_is_one_line_with_place_and_problem(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text) == message


def test_an_unreadable_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml: cannot read file: no such file or directory"):
        merge_settings({}, tmp_path / "missing.toml", [])
    with pytest.raises(ConfigError, match="cannot read file: is a directory"):
        merge_settings({}, tmp_path, [])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file: byte 0 is not UTF-8"):
        merge_settings({}, tmp_path / "binary", [])


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_text("[watch]\nlinger_s = 3\nhistory_age_s = 4\n")
    settings = merge_settings({"watch.linger_s": ConfiguredValue(5.0, "--linger")}, path, [])[0]
    assert settings.watch.linger_s == 5.0
    assert settings.watch.history_age_s == 4.0
    assert settings.watch.backfills_max == Settings().watch.backfills_max


def test_an_error_names_the_origin_of_the_value(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_text("[watch]\nlinger_s = -3\n")
    # A value that a flag overrides is not used, and so not checked.
    merge_settings({"watch.linger_s": ConfiguredValue(5.0, "--linger")}, path, [])
    with pytest.raises(ConfigError, match=r"^--linger: expected a duration >= 0s, got '-1000ms'$"):
        merge_settings({"watch.linger_s": ConfiguredValue(-1.0, "--linger")}, None, [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"upstream.cert": "c"}, "--cert: requires --key"),
        ({"upstream.key": "c"}, "--key: requires --cert"),
        ({"upstream.user": "c"}, "--user: requires --password"),
        ({"upstream.password": "c"}, "--password: requires --user"),
        ({"listener.cert_file": "c"}, "--cert-file: requires --key-file"),
        ({"listener.trusted_ca_file": "c"}, "--trusted-ca-file: requires --cert-file and --key-file"),
        (
            {"listener.listen_addr": "127.0.0.1:1234", "admin.metrics_addr": "http://127.0.0.1:1234"},
            "--metrics-addr: 127.0.0.1:1234 is --listen-addr; use another port",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(given: dict[str, str], message: str) -> None:
    flags = {knob.path: knob.flag for knob in knobs()}
    above = {path: ConfiguredValue(value, flags[path]) for path, value in given.items()}
    with pytest.raises(ConfigError) as error:
        merge_settings(above, None, [], look_at_files=False)
    assert str(error.value) == message


def test_port_0_twice_is_not_a_conflict() -> None:
    merge_settings(
        {path: ConfiguredValue("127.0.0.1:0", path) for path in ("listener.listen_addr", "admin.metrics_addr")},
        None,
        [],
    )


def make_pair(directory: Path, name: str) -> tuple[str, str]:
    cert, key = str(directory / f"{name}.pem"), str(directory / f"{name}.key")
    line = (
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /O=test -keyout {key} -out {cert}"
    )
    subprocess.run(shlex.split(line), check=True, capture_output=True, timeout=30)
    return cert, key


def test_certificates_are_loaded_before_anything_starts(tmp_path: Path) -> None:
    cert, key = make_pair(tmp_path, "one")
    other_key = make_pair(tmp_path, "two")[1]
    empty = tmp_path / "empty.pem"
    empty.write_text("")

    def check(**values: str) -> None:
        merge_settings(
            {f"listener.{name}": ConfiguredValue(value, f"--{name}") for name, value in values.items()}, None, []
        )

    check(cert_file=cert, key_file=key)
    check(cert_file=cert, key_file=key, trusted_ca_file=cert)
    with pytest.raises(ConfigError, match=r"^--cert_file: .*does not belong to the certificate"):
        check(cert_file=cert, key_file=other_key)
    with pytest.raises(ConfigError, match=r"^--cert_file: .*empty\.pem"):
        check(cert_file=str(empty), key_file=key)
    with pytest.raises(ConfigError, match="holds no certificate of an authority"):
        check(cert_file=cert, key_file=key, trusted_ca_file=str(empty))
    with pytest.raises(ConfigError, match=r"^--cacert: .*holds no certificate of an authority"):
        merge_settings({"upstream.cacert": ConfiguredValue(str(empty), "--cacert")}, None, [])


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("watch.linger_s", "500ms", 0.5),
        ("watch.history_bytes_max", "1MiB", 2**20),
        ("watch.watches_max", "10_000", 10_000),
        ("upstream.endpoints", " a:1, b:2 ", ["a:1", "b:2"]),
        ("upstream.insecure_skip_tls_verify", "True", True),
        ("upstream.insecure_skip_tls_verify", "0", False),
        ("listener.listen_addr", ":1", ":1"),
    ],
)
def test_flags_and_variables_are_converted(path: str, text: str, value: object) -> None:
    assert from_text(next(knob for knob in knobs() if knob.path == path), text) == value


def test_the_example_is_the_default(tmp_path: Path) -> None:
    assert settings_from(tmp_path, render_example()) == Settings()


def test_the_example_has_every_setting_with_flag_and_variable() -> None:
    lines = render_example().splitlines()
    for knob in knobs():
        at = next(number for number, line in enumerate(lines) if line.removeprefix("# ").startswith(f"{knob.key} = "))
        assert lines[at - 1].startswith(f"# {knob.flag}   {knob.env}")
