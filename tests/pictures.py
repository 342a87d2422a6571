"""The pictures of the status page, the report and the terminal in docs/images: `python -m tests.pictures [DIRECTORY]`.

A measurement on a real etcd, through a proxy, is the load that they show. Takes about two minutes; needs Chromium.
pngquant, if it is installed, makes the files small.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console
from rich.terminal_theme import MONOKAI

from proxy.admin.snapshot import Snapshot
from proxy.admin.views import Overview
from proxy.measuring.comparison import show_comparison
from proxy.measuring.measure import Measurement, compare
from proxy.measuring.status import render
from tests import browser
from tests.browser import Browser
from tests.etcd.server import EtcdServer
from tests.proxy_process import ProxyProcess
from tests.waiting import until

ROOT: Final = Path(__file__).parents[1]
LOAD: Final = ("--watches=2000", "--rate=10", "--seconds=45")
STEPS: Final = 3
"""Points of the chart with events, each of 10 s, that the status page shows."""
COLOURS: Final = "64"
WIDE: Final = 1200
PHONE: Final = 390

TERMINAL = (
    "<!doctype html><meta charset=utf-8><style>body {{margin: 0; background: #0c0c0c; color: #d9d9d9}}"
    "pre {{margin: 0; padding: 16px; width: fit-content; font: 15px/1.25 'DejaVu Sans Mono', monospace}}</style>"
    "<pre>$ {command}\n{code}</pre>"
)


def save(chromium: Browser, path: Path, width: int, height_max: int = 10_000, *, dark: bool = False) -> None:
    """Save the page that the browser shows, down to `height_max`."""
    chromium.look(width, 5000, dark=dark)
    assert chromium.run("return document.documentElement.scrollWidth") <= width, f"{path.name} is wider than its page"
    bottom = chromium.run("return Math.ceil(document.body.getBoundingClientRect().bottom)")
    chromium.picture(path, width, min(bottom, height_max))
    if (pngquant := shutil.which("pngquant")) is not None:
        subprocess.run([pngquant, "--force", "--nofs", "--strip", "--output", path, COLOURS, path], check=True)


def save_terminal(chromium: Browser, path: Path, console: Console, command: str) -> None:
    """Save what a recording console has printed after `command`."""
    html = console.export_html(theme=MONOKAI, inline_styles=True, code_format="{code}")
    with tempfile.NamedTemporaryFile("w", suffix=".html") as page:
        page.write(TERMINAL.format(command=command, code=html))
        page.flush()
        chromium.open(f"file://{page.name}")
        chromium.look(1600, 800)
        width = chromium.run("return document.querySelector('pre').offsetWidth")
        save(chromium, path, width)


def recording() -> Console:
    return Console(record=True, width=110, file=io.StringIO(), force_terminal=True)


def save_status(chromium: Browser, proxy: ProxyProcess, directory: Path) -> None:
    """Wait until the proxy is busy; save its page and what `watchmux status` prints."""
    address = f"127.0.0.1:{proxy.metrics_port}"

    def get(path: str) -> bytes:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=30) as answer:
            found: bytes = answer.read()
            return found

    def busy() -> bool:
        points = msgspec.json.decode(get("/v1/overview"), type=Overview).points
        return sum(point.events_out_per_s > 0 for point in points) >= STEPS

    until(busy, "the chart to have events", 300)
    chromium.open(f"http://{address}/")
    until(lambda: chromium.run("return document.body.dataset.ready") == "yes", "the page to have its numbers", 30)
    before = msgspec.json.decode(get("/v1/status"), type=Snapshot)
    until(lambda: chromium.text("#out").endswith("/s"), "rates", 30)
    save(chromium, directory / "status-light.png", WIDE, 1500)
    save(chromium, directory / "status-dark.png", WIDE, 1500, dark=True)
    save(chromium, directory / "status-phone.png", PHONE, 1600)
    console = recording()
    console.print(render(msgspec.json.decode(get("/v1/status"), type=Snapshot), before))
    save_terminal(chromium, directory / "status-terminal.png", console, f"watchmux status {address} --watch")


def main(directory: Path) -> None:
    """Make all pictures."""
    browser.install()
    with Browser() as chromium, EtcdServer() as etcd, ProxyProcess(etcd.endpoint) as proxy:
        report = Path(tempfile.mkdtemp(prefix="watchmux-report-")) / "report.html"
        addresses = [f"--upstream={etcd.endpoint}", f"--proxy={proxy.endpoint}"]
        metrics = f"--proxy-metrics=http://127.0.0.1:{proxy.metrics_port}/metrics"
        arguments = [*addresses, metrics, *LOAD, "--json", f"--report={report}"]
        command = [sys.executable, "-m", "proxy.cli", "measure", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as measuring:
            save_status(chromium, proxy, directory)
            output, _ = measuring.communicate(timeout=300)
        chromium.open(f"file://{report}")
        save(chromium, directory / "report.png", WIDE)
        save(chromium, directory / "report-phone.png", PHONE)
        console = recording()
        show_comparison(compare(msgspec.json.decode(output, type=Measurement)), console)
        shown = " ".join(["watchmux measure", *addresses, *LOAD])
        save_terminal(chromium, directory / "measure-terminal.png", console, shown)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/images")
