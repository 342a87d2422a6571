"""The command line: useful help, one line per error, and the right exit code."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from proxy.cli.group import COMMANDS, run
from proxy.config.file import merge_settings


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run a command that must fail; return its exit code and its one line of output."""
    code = run(list(arguments))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("watchmux: ")
    assert shown.err.count("\n") == 1, shown.err
    return code, shown.err.removeprefix("watchmux: ").rstrip("\n")


def help_of(capsys: pytest.CaptureFixture[str], *name: str) -> str:
    """Return the help in a terminal of 80 columns."""
    with pytest.MonkeyPatch.context() as terminal:
        terminal.setenv("COLUMNS", "80")
        assert run([*name, "--help"]) == 0
    text = capsys.readouterr().out
    assert not [line for line in text.splitlines() if len(line) > 80 or line != line.rstrip()]
    return text


def test_help_lists_every_command_and_how_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys)
    for name in COMMANDS:
        assert f"  {name} " in text
    assert "watchmux demo" in text
    assert "watchmux serve --endpoints=127.0.0.1:2379" in text


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, name)
    assert f"    watchmux {name}" in text
    assert "parent-fd" not in text


def test_serve_help_states_the_precedence(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of(capsys, "serve").split())
    assert "Flags override environment variables, which override the configuration file" in text
    assert "WATCHMUX_LISTEN_ADDR" in text


def test_version_shows_the_commit_and_python(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    git = ["git", "-C", str(Path(__file__).parents[3]), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(rf"watchmux \S+ \(commit {commit[:12]}(-dirty)?\), Python .*\n", capsys.readouterr().out)


def test_names_are_completed_in_a_shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_WATCHMUX_COMPLETE", "bash_complete")
    for words, found in (("watchmux se", "plain,serve"), ("watchmux serve --listen", "plain,--listen-addr")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        with pytest.raises(SystemExit):
            run([])
        assert capsys.readouterr().out.strip() == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bogus", "No such command 'bogus'. The commands are serve, store, demo, measure, status, config."),
        ("serv", "No such command 'serv'. Did you mean 'serve'? (see watchmux --help)"),
        ("grpc-proxy start", "No such command 'grpc-proxy'. Did you mean 'serve'?"),
        ("store --data-dir=", "--data-dir: is empty; give it a value or remove it"),
        ("measure --upstream=", "--upstream: is empty; give it a value or remove it"),
        ("demo --endpoints=", "--endpoints: is empty; give it a value or remove it"),
        ("status --user= a:1", "--user: is empty; give it a value or remove it"),
        ("serve --listn-addr=a:1", "No such option '--listn-addr'."),
        ("serve extra", "Got unexpected extra argument (extra) (see watchmux serve --help)"),
        ("serve --linger", "Option '--linger' requires an argument."),
        ("serve --linger=x", "--linger: 'x' is not a duration; write it like 500ms, 10s or 1m30s"),
        ("serve --linger=-1s", "--linger: '-1s' is not a duration; write it like 500ms, 10s or 1m30s"),
        ("serve --linger=5", "--linger: '5' has no unit; write it like 500ms, 10s or 1m30s"),
        ("serve --endpoints=localhost", "--endpoints: endpoint 'localhost': the port is missing; write localhost:2379"),
        ("serve --watch-endpoints=http://hub", "--watch-endpoints: endpoint 'http://hub': the port is missing; write"),
        ("serve --watches-max=many", "--watches-max: expected a whole number >= 1, got 'many'"),
        ("serve --watches-max=0", "--watches-max: expected a whole number >= 1, got 0"),
        ("serve --insecure-skip-tls-verify=perhaps", "--insecure-skip-tls-verify: expected true or false, got"),
        ("serve --log-level=loud", "--log-level: expected one of debug, info, warn, error, fatal, got 'loud'"),
        ("serve --endpoints=a:1,", "--endpoints: endpoints 'a:1,': one of them is empty; give it, or remove its comma"),
        ("serve --watch-progress-notify-interval=0s", "--watch-progress-notify-interval: expected a duration > 0s"),
        ("serve -endpoints=a:1", "No such option '-e'. Write --endpoints. (see watchmux serve --help)"),
        ("serve --listen-addr=23790", "--listen-addr: '23790' has no port; write :23790 or HOST:23790"),
        ("serve --config=/dev/zero", "/dev/zero: longer than 1048576 characters; give a configuration file"),
        ("serve --endpoints=127.0.0.1:x", "--endpoints: endpoint '127.0.0.1:x': 'x' is not a port"),
        ("serve --endpoints=ftp://a:1", "--endpoints: endpoint 'ftp://a:1': the scheme 'ftp' is unknown"),
        ("serve --listen-addr=here", "--listen-addr: 'here' has no port; write HOST:PORT, like 127.0.0.1:2379"),
        ("serve --metrics-addr=https://a:1", "--metrics-addr: 'https://a:1': metrics are served in plain text"),
        ("serve --cert-file=/nowhere", "--cert-file: cannot read '/nowhere': no such file or directory"),
        ("serve --cert=/dev/null", "--cert: requires --key"),
        ("serve --config=/nowhere.toml", "/nowhere.toml: cannot read file: no such file or directory"),
        ("serve --resolver-prefix /x", "--resolver-prefix: registering the proxy in etcd is not supported"),
        ("serve --auto-tls", "--auto-tls: generating certificates is not supported"),
        ("store --listen-addr=here", "--listen-addr: 'here' has no port; write HOST:PORT"),
        ("store --listen-metrics-urls=https://a:1", "--listen-metrics-urls: 'https://a:1': metrics are served in"),
        ("store --watch-progress-notify-interval=5", "--watch-progress-notify-interval: '5' has no unit"),
        ("store --watch-progress-notify-interval=0", "--watch-progress-notify-interval: must be longer than 0s"),
        ("demo --endpoints=here", "--endpoints: endpoint 'here': the port is missing; write here:2379"),
        ("demo --watches=0", "Invalid value for '--watches': 0 is not in the range 1<=x<=100000."),
        ("demo --endpoints=unix:///a", "--endpoints: 'unix:///a': unix sockets are not supported here; give HOST:PORT"),
        ("demo --endpoints=https://a:1 --cert=a.pem", "--cert: requires --key"),
        ("measure --upstream=a:1 --cacert=/nowhere.pem", "/nowhere.pem: there is no such file"),
        ("measure --upstream=a:1,b:1", "--upstream: give one member; only --observe reads all of them"),
        ("measure --proxy=127.0.0.1:1", "--proxy: requires --upstream"),
        ("measure --upstream=127.0.0.1:0", "--upstream: endpoint '127.0.0.1:0': '0' is not a port"),
        ("measure --upstream=etcd", "--upstream: endpoint 'etcd': the port is missing; write etcd:2379"),
        ("measure --upstream=a:1 --upstream-metrics=here", "--upstream-metrics: 'here' has no port; write HOST:PORT"),
        ("measure --upstream=a:1 --upstream-metrics=ftp://x", "--upstream-metrics: 'ftp://x' is not an address"),
        ("status", "Missing argument 'HOST:PORT'. (see watchmux status --help)"),
        ("status ftp://a:1", "'ftp://a:1': unknown scheme 'ftp'; use HOST:PORT, http:// or https://"),
        ("status here", "'here' has no port; write HOST:PORT, like 127.0.0.1:2379"),
        ("status 127.0.0.1:1 --watch --json", "--watch and --json cannot be combined"),
        ("measure --seconds=nan", "--seconds: nan is not a number"),
        ("measure --upstream=a:1 --user=\udcff:x", r"--user: '\udcff:x' is not UTF-8 text"),
        ("serve --cover=\udcff", r"--cover: '\udcff' is not UTF-8 text"),
        ("status \udcff:1", r"HOST:PORT: '\udcff:1' is not UTF-8 text"),
        ("measure --upstream=127.0.0.1:0x1", "--upstream: endpoint '127.0.0.1:0x1': '0x1' is not a port"),
        ("config --check", "Option '--check' requires an argument. (see watchmux config --help)"),
        ("config --check=/nowhere.toml", "/nowhere.toml: cannot read file: no such file or directory"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WATCHMUX_METRICS_ADDR", raising=False)
    code, line = complaint(capsys, *arguments.split())
    assert code == 2
    assert line.startswith(message)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:1/", "http://127.0.0.1:1/metrics"])
def test_status_without_a_proxy_is_one_line_and_exit_code_1(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = complaint(capsys, "status", address)
    assert code == 1
    assert line == (
        "cannot reach http://127.0.0.1:1: connection refused; is it the --metrics-addr of a running watchmux?"
    )


def test_status_of_a_grpc_port_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    server = grpc.server(ThreadPoolExecutor())
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    code, line = complaint(capsys, "status", f"127.0.0.1:{port}")
    server.stop(None).wait()
    assert code == 1
    assert line.startswith(f"cannot reach http://127.0.0.1:{port}: it does not speak HTTP/1; is it the --metrics-addr")


def test_an_unreachable_upstream_cannot_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    code, line = complaint(capsys, "measure", "--upstream=127.0.0.1:1")
    assert code == 1
    assert line.startswith("cannot reach etcd at 127.0.0.1:1: ")


def test_config_prints_the_example_and_checks_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config"]) == 0
    example = capsys.readouterr().out
    path = tmp_path / "w.toml"
    path.write_text(example)
    assert run(["config", "--check", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: valid\n"
    path.write_text(example.replace("\nlinger_s = 0.5", "\nlinger_s = -2"))
    code, line = complaint(capsys, "config", "--check", str(path))
    assert code == 2
    assert "watch.linger_s: expected a number of seconds >= 0, got -2" in line


def test_the_module_is_the_command() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "proxy.cli", "serve", "--linger=x"], capture_output=True, text=True, timeout=30
    )
    assert shown.returncode == 2
    assert shown.stderr.startswith("watchmux: --linger: ")


def test_a_data_directory_that_cannot_be_used_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, line = complaint(capsys, "store", "--listen-addr=127.0.0.1:0", "--data-dir=/proc/store")
    assert code == 1
    assert "/proc/store" in line


@pytest.mark.parametrize("name", ["WATCHMUX_STORE_DATA_DIR", "WATCHMUX_STORE_DATADIR"])
def test_the_store_refuses_an_empty_or_unknown_variable(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "" if name.endswith("_DIR") else "/data")
    code, line = complaint(capsys, "store", "--listen-addr=127.0.0.1:0")
    assert code == 2
    assert line.startswith(f"{name}: ")


def test_the_settings_in_force_have_their_origin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.toml"
    path.write_text("[upstream]\nendpoints = ['a:1']\nuser = 'root'\n\n[watch]\nlinger_s = 2\n")
    monkeypatch.setenv("WATCHMUX_PASSWORD", "secret")
    assert run(["config", "--effective", f"--config={path}", "--listen-addr=:1", "--linger=3s"]) == 0
    text = capsys.readouterr().out
    found = {line.partition(" = ")[0]: line for line in text.splitlines()}
    assert re.fullmatch(rf'endpoints = \["a:1"\] +# {path}:2', found["endpoints"])
    assert re.fullmatch(r'listen_addr = ":1" +# --listen-addr', found["listen_addr"])
    assert re.fullmatch(r'password = "\*\*\*" +# WATCHMUX_PASSWORD', found["password"])
    assert re.fullmatch(r"linger_s = 3 +# --linger", found["linger_s"])
    assert re.fullmatch(r"drain_s = 10 +# default", found["drain_s"])
    assert "# cacert is not set" in text
    assert "secret" not in text
    # It is a configuration file, with the same values.
    path.write_text(text)
    assert merge_settings({}, path, [])[1]["watch.linger_s"].value == 3
    monkeypatch.delenv("WATCHMUX_PASSWORD")
    assert run(["config", "--effective", "--listen-addr=here", "--cert=x"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_foreign_proto_package_is_one_clear_line(tmp_path: Path) -> None:
    """proto-plus has the same import name."""
    (tmp_path / "proto").mkdir()
    (tmp_path / "proto/__init__.py").write_text("from .fields import Field\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[3]}"}
    code = "from proxy.cli import main; main(['serve'])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"watchmux: the Python package `proto` ({tmp_path}/proto) is that of another program")


@pytest.mark.parametrize("arguments", ["--version", "config", "serve --help"])
def test_output_that_cannot_be_written_is_one_line(
    arguments: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        code, line = complaint(capsys, *arguments.split())
        assert code == 1
        assert line == "cannot write the output: no space left on device; write it elsewhere or make room"
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
