"""Child processes: they report readiness, fail with one line, and do not outlive their parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from proxy.process import child
from proxy.process.child import Child, ChildFailed, python_command
from tests.waiting import until

GOOD = """
import asyncio, sys
from proxy.process.child import ChildReady, Parent, on_signals
async def main():
    leaving = asyncio.Event()
    on_signals(leaving.set)
    fd = int(sys.argv[-1].split("=")[1])
    parent = await Parent.join(fd, lambda line: parent.write_line(line.decode()), leaving.set)
    parent.write_line(ChildReady(address="here:1"))
    print("serving", flush=True)
    await leaving.wait()
    await parent.leave()
asyncio.run(main())
"""
STUBBORN = GOOD.replace("on_signals(leaving.set)", "on_signals(lambda: None)")


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


async def test_a_child_imports_nothing_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("click", "proxy", "msgspec"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the current directory was imported')")
    monkeypatch.chdir(tmp_path)
    store = await Child.start("the store", python_command("proxy.cli", "store", "--listen-addr=127.0.0.1:0"))
    assert store.ready.address
    await store.stop()


async def with_child(text: str) -> Child:
    return await Child.start("the child", script(text))


async def test_a_child_reports_its_address_and_answers() -> None:
    started = await with_child(GOOD)
    assert started.ready.address == "here:1"
    assert started.running()
    started.write_line({"a": 1})
    assert b"a" in await started.read_line()
    assert started.last_words() == "serving"
    assert await started.stop() == 0
    assert not started.running()


def test_variables_of_the_parent_do_not_configure_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHMUX_LISTEN_ADDR", "127.0.0.1:1")
    monkeypatch.setenv("OTHER", "kept")
    text = "import os; print([name for name in os.environ if name in ('WATCHMUX_LISTEN_ADDR', 'OTHER')])"
    with pytest.raises(ChildFailed, match=r"^the child ended: \['OTHER'\]$"):
        asyncio.run(with_child(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import sys; sys.exit('watchmux: the port is in use')", "the child ended: the port is in use"),
        ("import os; os._exit(3)", "the child ended: exit code 3"),
        ("print('a'); print('b'); raise SystemExit(1)", "the child ended: b"),
    ],
)
def test_a_child_that_fails_to_start_is_one_line_with_its_error(text: str, words: str) -> None:
    with pytest.raises(ChildFailed) as error:
        asyncio.run(with_child(text))
    assert str(error.value) == words


def test_a_missing_command_is_one_line() -> None:
    with pytest.raises(ChildFailed, match=r"^cannot start the child: No such file or directory$"):
        asyncio.run(Child.start("the child", ["/nowhere/at/all"]))


def test_a_child_that_never_gets_ready_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "READY_LIMIT_S", 0.5)
    with pytest.raises(ChildFailed, match=r"^the child was not ready after 0\.5 s: hm$"):
        asyncio.run(with_child("print('hm', flush=True)\nimport time\ntime.sleep(60)"))


def test_a_stubborn_child_is_killed() -> None:
    async def run() -> int:
        started = await with_child(STUBBORN)
        return await started.stop(0.2)

    assert asyncio.run(run()) == -signal.SIGKILL


def test_a_child_exits_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys\n"
        "from proxy.process.child import Child\n"
        "async def main():\n"
        f"    child = await Child.start('c', [sys.executable, '-c', {GOOD!r}])\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid) + chr(10))\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        text = until(lambda: _read(tmp_path / "pid"), "the child to be started")
    finally:
        parent.kill()
        parent.wait(10)
    until(lambda: not _alive(int(text)), "the child to exit")


def _read(path: Path) -> str:
    text = path.read_text() if path.exists() else ""
    return text if text.endswith("\n") else ""


def _alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        # An orphaned child may stay a zombie if init does not reap it; it has exited all the same.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
