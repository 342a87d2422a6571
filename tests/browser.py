"""A real headless Chromium, driven by the WebDriver protocol, for tests of pages as people see them.

It needs only the standard library: chromedriver takes JSON over HTTP (W3C WebDriver), and passes Chromium's own
DevTools commands on. Where the browser is not installed, it is installed from Debian by apt-get.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

from tests.etcd.server import HOST, free_port
from tests.waiting import until

PACKAGES = ("chromium", "chromium-driver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


def install() -> None:
    """Install Chromium and its driver where they are missing."""
    if shutil.which("chromedriver") and shutil.which("chromium"):
        return
    subprocess.run(["apt-get", "update", "-qq"], check=True, timeout=300)
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
    subprocess.run(
        command,
        check=True,
        timeout=900,
        env={"DEBIAN_FRONTEND": "noninteractive", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )


class Browser:
    """One browser with one page. Use as a context manager."""

    def __init__(self) -> None:
        self._port = free_port()
        self._profile = tempfile.mkdtemp(prefix="watchmux-chromium-")
        self._driver: subprocess.Popen[bytes] | None = None
        self._session = ""

    def __enter__(self) -> Self:
        self._driver = subprocess.Popen(
            ["chromedriver", f"--port={self._port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until(self._ready, "chromedriver to be ready")
        arguments = [*FLAGS, f"--user-data-dir={self._profile}"]
        options = {"args": arguments, "binary": shutil.which("chromium")}
        wanted = {
            "capabilities": {
                "alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}},
            }
        }
        self._session = self._ask("POST", "/session", wanted)["sessionId"]
        return self

    def __exit__(self, *_error: object) -> None:
        assert self._driver is not None
        if self._session:
            self._ask("DELETE", f"/session/{self._session}")
        self._driver.terminate()
        self._driver.wait(10)
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, url: str) -> None:
        """Go to a page."""
        self._of_session("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """Run a function's body in the page and return what it returns."""
        return self._of_session("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        """Return the text of the first element that matches."""
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the page in CSS pixels, and the colour scheme of the reader's system."""
        self._devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._devtools("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path, width: int = 0, height: int = 0) -> None:
        """Save a picture (PNG) of the page's upper left part in CSS pixels; without a size, of the whole page."""
        clip = {"clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}} if width else {}
        answer = self._devtools("Page.captureScreenshot", captureBeyondViewport=True, **clip)
        path.write_bytes(base64.b64decode(answer["data"]))

    def complaints(self) -> list[str]:
        """Return what the browser has logged: script errors, refused or failed loads."""
        return [entry["message"] for entry in self._of_session("POST", "/se/log", {"type": "browser"})]

    def _devtools(self, command: str, **parameters: object) -> Any:
        return self._of_session("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _of_session(self, method: str, path: str, body: object = None) -> Any:
        return self._ask(method, f"/session/{self._session}{path}", body)

    def _ready(self) -> bool:
        try:
            return bool(self._ask("GET", "/status")["ready"])
        except OSError:
            return False

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        request = urllib.request.Request(
            f"http://{HOST}:{self._port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{method} {path}: {error.read().decode()[:500]}") from None
