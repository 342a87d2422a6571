"""`watchmux serve` as a process: it starts without etcd, logs its address, drains, and fails with one line."""

from __future__ import annotations

import json
import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from proto.pb import rpc_pb2, rpc_pb2_grpc, v3lock_pb2, v3lock_pb2_grpc
from proxy.cli import apart
from proxy.cli.group import run
from proxy.config.values import parse_address
from proxy.version import program_version
from tests.etcd.binaries import EtcdBinary
from tests.etcd.server import HOST, EtcdServer, free_port
from tests.waiting import until


class Served:
    """A `watchmux serve` on free ports, its log as JSON lines in a file."""

    def __init__(self, log: Path, *arguments: str, metrics: bool = True) -> None:
        self._log = log
        command = [
            sys.executable,
            "-m",
            "proxy.cli",
            "serve",
            "--listen-addr=127.0.0.1:0",
            *(["--metrics-addr=127.0.0.1:0"] if metrics else []),
        ]
        with log.open("wb") as output:
            self.process = subprocess.Popen([*command, "--drain=1s", *arguments], stdout=output, stderr=output)

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def serving(self) -> dict[str, object]:
        """Wait for the log line with its address."""

        def said() -> dict[str, object] | None:
            assert self.process.poll() is None, self._log.read_text()
            text = self._log.read_text()
            return next((line for line in self.lines() if line["msg"] == "serving"), None) if text else None

        line = until(said, "the proxy to log its address", 60)
        assert line is not None
        return line

    def get(self, path: str) -> tuple[int, str]:
        url = str(self.serving()["metrics"]).removesuffix("/metrics") + path
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(15)


@contextmanager
def served(tmp_path: Path, *arguments: str, metrics: bool = True) -> Iterator[Served]:
    proxy = Served(tmp_path / "serve.log", *arguments, metrics=metrics)
    try:
        yield proxy
    finally:
        if proxy.process.poll() is None:
            proxy.process.kill()
            proxy.process.wait(10)


def watch_request(**fields: object) -> rpc_pb2.WatchRequest:
    create = rpc_pb2.WatchCreateRequest(**fields)  # type: ignore[arg-type]  # of one call
    return rpc_pb2.WatchRequest(create_request=create)


def put_and_get(etcd: EtcdBinary, endpoint: str, *extra: str) -> str:
    for arguments in (["put", "greeting", "hello"], ["get", "greeting", "--print-value-only"]):
        shown = subprocess.run(
            [etcd.etcdctl, f"--endpoints={endpoint}", *extra, *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            env={"ETCDCTL_API": "3"},
            check=True,
        )
    return shown.stdout.strip()


def test_it_logs_its_address_and_drains_on_sigterm(tmp_path: Path, etcd: EtcdServer) -> None:
    with served(tmp_path, f"--endpoints={etcd.endpoint}") as proxy:
        line = proxy.serving()
        assert line["endpoints"] == [etcd.endpoint]
        assert (line["version"], line["host"]) == (program_version(), socket.gethostname())
        assert put_and_get(etcd.binary, str(line["address"])) == "hello"
        assert proxy.end() == 0
        assert [line["msg"] for line in proxy.lines()][-1] == "stopped"


def test_metrics_and_health_have_their_own_port(
    tmp_path: Path, etcd: EtcdServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(tmp_path, f"--endpoints={etcd.endpoint}") as proxy:
        until(lambda: proxy.get("/health")[0] == 200, "the proxy to find etcd")
        assert json.loads(proxy.get("/health")[1]) == {"health": "true", "reason": ""}
        status, text = proxy.get("/metrics")
        assert status == 200
        assert re.search(r"^watchmux_watches 0\.0$", text, re.MULTILINE)
        assert "process_resident_memory_bytes" in text
        snapshot = json.loads(proxy.get("/v1/status")[1])
        assert snapshot["serving"] is True
        assert snapshot["endpoints"] == [etcd.endpoint]
        address = str(proxy.serving()["metrics"]).removeprefix("http://").removesuffix("/metrics")
        assert run(["status", address]) == 0
        shown = capsys.readouterr().out
        assert "serving" in shown
        assert "client watches" in shown
        assert run(["status", address, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["pid"] == proxy.process.pid
        with socket.create_connection(parse_address(str(proxy.serving()["address"]))[:2]):
            until(lambda: json.loads(proxy.get("/v1/clients")[1])["connections"] == 1, "the client")
            assert run(["status", address, "--clients"]) == 0
            assert "1 of 1 client connection " in capsys.readouterr().out
            assert run(["status", address, "--clients", "--json"]) == 0
            assert len(json.loads(capsys.readouterr().out)["clients"]) == 1
        proxy.end()


def test_it_starts_without_etcd_and_serves_once_etcd_is_up(tmp_path: Path, etcd_binary: EtcdBinary) -> None:
    etcd = EtcdServer(etcd_binary)
    with served(tmp_path, f"--endpoints={etcd.endpoint}") as proxy:
        address = str(proxy.serving()["address"])
        status, text = proxy.get("/health")
        assert status == 503
        assert json.loads(text) == {"health": "false", "reason": "etcd is not reachable"}
        until(lambda: any(line["level"] == "warning" for line in proxy.lines()), "a warning in the log")
        with etcd:
            until(lambda: proxy.get("/health")[0] == 200, "the proxy to find etcd")
            assert put_and_get(etcd_binary, address) == "hello"
            assert proxy.end(signal.SIGINT) == 0


def test_without_endpoints_it_starts_the_bundled_store(
    tmp_path: Path, etcd_binary: EtcdBinary, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    with served(tmp_path) as proxy:
        line = proxy.serving()
        assert put_and_get(etcd_binary, str(line["address"])) == "hello"
        # It says so in the log, in the readiness, in the status and by a metric.
        (warning,) = (
            line for line in proxy.lines() if line["msg"] == "no etcd is configured: serving the bundled store"
        )
        assert warning["level"] == "warning"
        assert warning["data"] == "in memory only, lost when this process stops"
        until(lambda: proxy.get("/readyz")[0] == 200, "the proxy to find its store")
        assert json.loads(proxy.get("/readyz")[1])["reason"] == warning["msg"]
        assert json.loads(proxy.get("/v1/status")[1])["bundled_store"] is True
        assert "\nwatchmux_bundled_store 1.0\n" in proxy.get("/metrics")[1]
        assert run(["status", str(line["metrics"]).removesuffix("/metrics")]) == 0
        assert "no etcd is configured; all data is lost when the proxy stops" in capsys.readouterr().out
        assert proxy.end() == 0


def test_the_proxy_ends_when_its_bundled_store_dies(tmp_path: Path) -> None:
    with served(tmp_path) as proxy:
        proxy.serving()
        pid = proxy.process.pid
        (store,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(store), signal.SIGKILL)
        assert proxy.process.wait(15) == 1
        assert "the bundled store ended" in [line["msg"] for line in proxy.lines()]


def test_a_second_signal_does_not_wait_for_open_calls(tmp_path: Path, etcd: EtcdServer) -> None:
    with served(tmp_path, f"--endpoints={etcd.endpoint}", "--drain=60s") as proxy:
        with grpc.insecure_channel(str(proxy.serving()["address"])) as channel:
            lock = v3lock_pb2_grpc.LockStub(channel).Lock
            lock(v3lock_pb2.LockRequest(name=b"held"), wait_for_ready=True, timeout=30)
            waiting = lock.future(v3lock_pb2.LockRequest(name=b"held"), timeout=30)
            keys = ("get", "--prefix", "--keys-only", "held/")
            until(lambda: len(etcd.ctl(*keys).stdout.split()) == 2, "the second call to wait for the first")
            proxy.process.send_signal(signal.SIGTERM)
            until(lambda: "draining" in [line["msg"] for line in proxy.lines()], "the proxy to drain")
            assert proxy.process.poll() is None
            assert proxy.end() == 0
            with pytest.raises(grpc.RpcError):
                waiting.result()
        assert any("second signal" in str(line["msg"]) for line in proxy.lines())


def test_it_serves_tls_with_the_given_certificate(tmp_path: Path, etcd: EtcdServer) -> None:
    cert, key = tmp_path / "server.pem", tmp_path / "server.key"
    line = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /O=test"
    line += f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}"
    subprocess.run(shlex.split(line), check=True, capture_output=True, timeout=30)
    with served(tmp_path, f"--endpoints={etcd.endpoint}", f"--cert-file={cert}", f"--key-file={key}") as proxy:
        address = str(proxy.serving()["address"])
        assert put_and_get(etcd.binary, f"https://{address}", f"--cacert={cert}") == "hello"


LARGE = {
    *("aiohttp", "click", "decimal", "email", "glob", "google", "grpc", "grpc_health", "h2", "hashlib", "html", "http"),
    *("importlib.metadata", "importlib.resources", "ipaddress", "msgspec", "multiprocessing", "pathlib"),
    *(
        "prometheus_client",
        "proto.pb",
        "random",
        "rich",
        "secrets",
        "shutil",
        "tempfile",
        "typing_extensions",
        "urllib.parse",
    ),
    *(
        "xml",
        "coalesce.invariants",
        "proxy.admin.aggregate",
        "proxy.auth.cn_guard",
        "proxy.passthrough.translating",
        "upstream.tls",
    ),
}
"""Modules that a proxy of one process, without certificates, does not need: each would add 0.1 to 20 MiB to it."""

ANONYMOUS_KIB_MAX = 20.25 * 1024
"""Anonymous memory of a serving process with metrics before the first client: 19.2 MiB (of 30.7 that are resident; the
rest are mapped files, of which each kernel maps more or less)."""

LOADED = """
import asyncio, os, sys
from proxy.admin import port
from proxy.admin.port import PAGES, Admin
from proxy.config.values import Address
from proxy.process import running
from proxy.server import Proxy, ProxySettings

async def serve():
    proxy = Proxy(ProxySettings(endpoints="127.0.0.1:1"))
    await proxy.start()
    admin = Admin(proxy, Address("127.0.0.1", 0), "")
    await admin.start()

    async def get(path):
        reader, writer = await asyncio.open_connection("127.0.0.1", admin.address.port)
        writer.write(f"GET {path} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n".encode())
        assert (await reader.read()).startswith(b"HTTP/1.1 ")

    for path in ("/health", "/livez", "/v1/status", "/v1/clients", "/v1/overview", *PAGES):
        await get(path)
    print("loaded: ", *sys.modules)
    port._load_metrics(os.getpid())
    before = {*sys.modules}
    await get("/metrics")
    print("by a scrape on the loop: ", *{*sys.modules} - before)
    await admin.stop()
    await proxy.stop()

asyncio.run(serve())
"""


def test_a_serving_process_loads_no_large_module() -> None:
    """Not for its pages either, except for the client library of Prometheus at the first scrape, in another thread."""
    # Without `site`, which loads modules of its own where the program is installed in development.
    command, paths = [sys.executable, "-S", "-c", LOADED], {"PYTHONPATH": os.pathsep.join(sys.path)}
    shown = subprocess.run(command, env=paths, capture_output=True, text=True, check=True, timeout=30)
    lines = dict(line.partition(": ")[::2] for line in shown.stdout.splitlines())
    loaded = set(lines["loaded"].split())
    assert "proxy.admin.port" in loaded
    assert loaded & LARGE == set()
    assert not lines["by a scrape on the loop"].strip()


def test_a_serving_proxy_does_not_keep_the_settings_modules(tmp_path: Path) -> None:
    """Neither the child nor the modules that it loaded remain."""
    with served(tmp_path, "--endpoints=127.0.0.1:1") as proxy:
        proxy.serving()
        assert proxy.get("/metrics")[0] == 200
        process = Path(f"/proc/{proxy.process.pid}")
        assert (process / f"task/{proxy.process.pid}/children").read_text() == ""
        files = (process / "maps").read_text()
        assert "/uvloop/" in files
        assert "/msgspec/" not in files
        assert proxy.end() == 0


def test_calls_and_watches_load_no_protobuf(tmp_path: Path, etcd: EtcdServer) -> None:
    """Not for etcd's status, permissions, health, and watches with all options."""
    with served(tmp_path, f"--endpoints={etcd.endpoint}") as proxy:
        address = str(proxy.serving()["address"])
        until(lambda: proxy.get("/health")[0] == 200, "the proxy to find etcd")
        process = Path(f"/proc/{proxy.process.pid}")
        anonymous = re.search(r"RssAnon:\s+(\d+) kB", (process / "status").read_text())
        assert anonymous is not None
        assert int(anonymous[1]) < ANONYMOUS_KIB_MAX
        assert put_and_get(etcd.binary, address) == "hello"
        with grpc.insecure_channel(address) as channel:
            stream = rpc_pb2_grpc.WatchStub(channel).Watch
            requests = queue.SimpleQueue[rpc_pb2.WatchRequest]()
            answers = stream(iter(requests.get, None), timeout=30)
            requests.put(watch_request(key=b"a", range_end=b"z", prev_kv=True, fragment=True, filters=[1]))
            requests.put(watch_request(key=b"a", range_end=b"z", start_revision=1, progress_notify=True, watch_id=300))
            created = [next(answers), next(answers)]
            assert [answer.created for answer in created] == [True, True]
            requests.put(rpc_pb2.WatchRequest(cancel_request=rpc_pb2.WatchCancelRequest(watch_id=created[0].watch_id)))
            assert any(answer.canceled for answer in answers)
            assert "/google/" not in (process / "maps").read_text()
            # What the proxy does not know is left to protobuf.
            requests.put(rpc_pb2.WatchRequest.FromString(b"\x0a\x05\x0a\x01b\x50\x01"))
            assert any(answer.created for answer in answers)
        assert "/google/" in (process / "maps").read_text()
        assert proxy.end() == 0


def test_a_fork_that_is_killed_ends_the_command() -> None:
    code = (
        "import os, signal, sys; from proxy.cli import apart\n"
        "apart._hand_over = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.exit(apart.serve(['serve']))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 128 + signal.SIGKILL


def test_settings_for_a_process_that_was_ended_are_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    assert apart._hand_over(["serve", "--endpoints=127.0.0.1:2379"], writing) == 0
    assert capfd.readouterr().err == ""


def test_it_serves_where_no_log_can_be_written(tmp_path: Path, etcd: EtcdServer) -> None:
    command = [sys.executable, "-m", "proxy.cli", "serve", f"--endpoints={etcd.endpoint}", "--drain=1s"]
    for name, redirection in (("full", "> /dev/full 2>&1"), ("closed", "<&- >&- 2>&-")):
        listen = f"--listen-addr=unix://{tmp_path}/{name}"
        process = subprocess.Popen(["sh", "-c", f"exec {shlex.join(command)} {listen} {redirection}"])
        with grpc.insecure_channel(f"unix://{tmp_path}/{name}") as channel:
            grpc.channel_ready_future(channel).result(60)
        process.terminate()
        assert process.wait(15) == 0


def refusal(*arguments: str) -> tuple[int, str]:
    shown = subprocess.run(
        [sys.executable, "-m", "proxy.cli", *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    lines = [line for line in shown.stderr.splitlines() if line.startswith("watchmux: ")]
    assert len(lines) == 1, shown.stderr
    assert "Traceback" not in shown.stderr
    return shown.returncode, lines[0]


@pytest.mark.parametrize(
    ("flag", "command"),
    [
        ("--listen-addr", "serve --endpoints=127.0.0.1:1 --listen-addr={}"),
        ("--metrics-addr", "serve --endpoints=127.0.0.1:1 --listen-addr=127.0.0.1:0 --metrics-addr={}"),
        ("--listen-addr", "store --listen-addr={}"),
        ("--listen-metrics-urls", "store --listen-addr=127.0.0.1:0 --listen-metrics-urls=http://{}"),
    ],
)
def test_a_port_in_use_is_one_line_and_exit_code_1(flag: str, command: str) -> None:
    with socket.socket() as holder:
        holder.bind((HOST, 0))
        holder.listen()
        address = f"{HOST}:{holder.getsockname()[1]}"
        code, line = refusal(*command.format(address).split())
    assert code == 1
    assert f"cannot listen on {address}: it is in use" in line
    assert flag in line


def test_an_address_of_another_machine_is_one_line() -> None:
    code, line = refusal("serve", "--endpoints=127.0.0.1:1", f"--listen-addr=192.0.2.1:{free_port()}")
    assert code == 1
    assert "this machine has no such address" in line


def test_http1_reaches_the_bundled_stores_own_port(tmp_path: Path) -> None:
    with served(tmp_path) as proxy:
        address = str(proxy.serving()["address"])
        for path, word in (("/version", "etcdserver"), ("/health", "true"), ("/metrics", "etcd_debugging_mvcc")):
            with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
                assert word in answer.read().decode()
