"""`python -m tests.clients.suites FOLDER`: the clients' own test suites, directly at etcd and through the proxy.

FOLDER holds their sources, since no release contains all tests: `node-etcd3` (github.com/microsoft/etcd3, v1.1.2, after
`npm install` and `npx tsc`), `aetcd` (github.com/martyanov/aetcd), `python-etcd3` (the source release 0.12.0),
`etcd3gw` (github.com/openstack/etcd3gw). Each Python suite runs in a separate environment below FOLDER, and each suite
with a new etcd for each route; docs/clients.md lists the resulting numbers.
"""

from __future__ import annotations

import os
import re
import ssl
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from tests.etcd.server import EtcdServer
from tests.proxy_process import ProxyProcess

LIMIT_S = 600
PORT = 2379
"""The port of the tests, which must be free: some of the suites know no other."""


@dataclass(frozen=True)
class Suite:
    """How to run one suite."""

    name: str
    packages: tuple[str, ...]
    """Python packages besides the client itself; none for Node's."""

    command: tuple[str, ...]
    """The command, run in the folder of the sources; `python` is the environment's."""

    address: tuple[tuple[str, str], ...]
    """The variables that hold etcd's address, as templates of {endpoint} (HOST:PORT) and {port}."""

    tls: tuple[str, str] = ("", "")
    """The server certificate and key that it requires, in the sources; plain text without."""


class TlsEtcd(EtcdServer):
    """An etcd with the suite's certificate, which is not verified here."""

    def __init__(self, certificate: Path, key: Path) -> None:
        super().__init__(extra=[f"--cert-file={certificate}", f"--key-file={key}"])
        self.tls = ssl.create_default_context()
        self.tls.check_hostname = False
        self.tls.verify_mode = ssl.CERT_NONE

    @property
    def url(self) -> str:
        """Where clients connect, as a URL."""
        return f"https://{self.endpoint}"


CERTIFICATES = "src/test/certs"
SUITES = (
    Suite(
        "node-etcd3",
        (),
        ("npx", "mocha"),
        (("ETCD_ADDR", "{endpoint}"),),
        (f"{CERTIFICATES}/certs/etcd0.localhost.crt", f"{CERTIFICATES}/private/etcd0.localhost.key"),
    ),
    Suite(
        "aetcd",
        ("pytest==9.0.3", "pytest-asyncio==1.3.0", "pytest-mock==3.15.1", "pytest-cov"),
        ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        (("TEST_ETCD_HTTP_URL", "http://{endpoint}"),),
    ),
    Suite(
        "python-etcd3",
        ("protobuf<4", "pytest", "hypothesis==5.49.0", "tenacity==6.3.1", "mock", "pyyaml", "setuptools<80"),
        ("python", "-m", "pytest", "-q", "tests"),
        (("PYTHON_ETCD_HTTP_URL", "http://{endpoint}"),),
    ),
    Suite(
        "etcd3gw",
        ("pytest", "testtools", "oslotest", "pifpaf"),
        ("python", "-m", "pytest", "-q", "etcd3gw/tests"),
        (("TOOZ_TEST_HTTP_URL", "http://{endpoint}"), ("TOOZ_TEST_ETCD_PORT", "{port}")),
    ),
)


def python_of(suite: Suite, folder: Path) -> Path:
    """Make the environment of a suite, once, and return its folder of programs."""
    home = folder / f"env-{suite.name}"
    if not (home / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        pip = [str(home / "bin/pip"), "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, str(folder / suite.name), *suite.packages], check=True)
        (home / "complete").touch()
    return home / "bin"


def run_suite(suite: Suite, folder: Path, server: EtcdServer, endpoint: str) -> str:
    """Run it against an endpoint; return its output."""
    path = [str(server.binary.etcdctl.parent), os.environ["PATH"]]
    if suite.packages:
        path.insert(0, str(python_of(suite, folder)))
    version = server.binary.name
    environment = {**os.environ, "PATH": os.pathsep.join(path)}
    environment |= {"ETCD_VERSION": version, "TEST_ETCD_VERSION": f"v{version}"}
    environment.pop("PYTHONPATH", None)
    for name, text in suite.address:
        environment[name] = text.format(endpoint=endpoint, port=endpoint.rpartition(":")[2])
    done = subprocess.run(
        suite.command,
        cwd=folder / suite.name,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=LIMIT_S,
        check=False,
    )
    return done.stdout


def counted(output: str) -> str:
    """Return the summary line of pytest or mocha: "90 passed, 1 failed"."""
    words = {"passing": "passed", "failing": "failed", "pending": "skipped"}
    found = re.findall(r"(\d+) (passed|failed|skipped|errors?|passing|failing|pending)\b", output)
    last: dict[str, str] = {words.get(word, word): number for number, word in found}
    return ", ".join(f"{number} {word}" for word, number in last.items()) or "it did not run"


def failures(output: str) -> list[str]:
    """Return the names of the failed tests."""
    # pytest's line, or mocha's numbered lines: the groups and the test.
    found = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.M)
    found += [re.sub(r"\s+", " ", lines) for lines in re.findall(r"^  \d+\) ((?:.+\n)+? .+):$", output, re.M)]
    return sorted(set(found))


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--only", default="", help="The name of one suite.")
def main(folder: Path, only: str) -> None:
    """Run the clients' own suites on both routes and report how many tests passed."""
    for suite in SUITES:
        if only and suite.name != only:
            continue
        for way in ("direct", "watchmux"):
            certificate, key = (folder / suite.name / each for each in suite.tls)
            if way == "direct":
                server = TlsEtcd(certificate, key) if suite.tls[0] else EtcdServer()
                server.client_port = PORT
                with server:
                    output = run_suite(suite, folder, server, server.endpoint)
            else:
                secure = [f"--cert-file={certificate}", f"--key-file={key}"] if suite.tls[0] else []
                with EtcdServer() as server:
                    proxy = ProxyProcess(server.endpoint, secure)
                    proxy.port = PORT
                    with proxy:
                        output = run_suite(suite, folder, server, proxy.endpoint)
            (folder / f"{suite.name}-{way}.log").write_text(output)
            click.echo(f"{suite.name} {way}: {counted(output)}")
            for name in failures(output):
                click.echo(f"    {name}")


if __name__ == "__main__":
    main()
