"""What is installed: the wheel, the lock file, the image and the CI workflow."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]


def wheel_in(directory: Path) -> Path:
    """Build the wheel of the checkout, as `make wheel` does."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={directory}", "."]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    (wheel,) = directory.glob(f"watchmux-{VERSION}-*.whl")
    return wheel


HOSTILE = "raise SystemExit('a file of the current directory was imported')\n"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_wheel_works_from_any_directory(tmp_path: Path) -> None:
    """In a new environment, with the locked versions, in a directory with modules of the same names."""
    environment, here = tmp_path / "venv", tmp_path / "here"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True, timeout=120)
    pip: list[str | Path] = [environment / "bin/pip", "install", "--quiet"]
    subprocess.run([*pip, "-r", ROOT / "requirements.lock"], check=True, timeout=600)
    subprocess.run([*pip, "--no-deps", wheel_in(tmp_path / "dist")], check=True, timeout=120)
    (here / "proto").mkdir(parents=True)
    for name in ("click", "msgspec", "proxy", "rich", "uvloop", "proto/__init__"):
        (here / f"{name}.py").write_text(HOSTILE)
    program = environment / "bin/watchmux"
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def shown(*arguments: str) -> str:
        done = subprocess.run(
            [program, *arguments], cwd=here, env=variables, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"watchmux {VERSION} (commit {commit[:12]}" in shown("--version")
    assert "Every one of the 20 histories" in shown(
        "demo", "--watches=20", "--ranges=4", "--streams=4", "--seconds=0.2"
    )
    # proto-plus has the same import name and overwrites files.
    (proto,) = environment.glob("lib/*/site-packages/proto/__init__.py")
    proto.write_text("from .fields import Field\n")
    done = subprocess.run([program, "serve"], cwd=here, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"watchmux: the Python package `proto` ({proto.parent}) is that of another program")


def test_the_lock_file_has_every_dependency() -> None:
    """Refresh it with `make lock`."""
    locked = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            locked[canonicalize_name(name)] = version
    for text in PROJECT["dependencies"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)]), text


def test_the_ci_workflow_runs_the_checks_of_a_change() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_manifests_use_the_tag_of_the_image() -> None:
    for path in sorted((CONFIGS / "kubernetes").glob("*.yaml")):
        images = re.findall(r"image: (watchmux\S*)", path.read_text())
        assert set(images) <= {f"watchmux:{VERSION}"}, path


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_steps_of_the_image_make_a_program_that_serves(tmp_path: Path) -> None:
    """No container is built, but each COPY and RUN of its first stage is executed, in another directory."""
    parser = DockerfileParser(fileobj=io.BytesIO((CONFIGS / "container/Containerfile").read_bytes()))
    source, installed = tmp_path / "src", tmp_path / "watchmux"
    source.mkdir()
    wheel_in(tmp_path / "dist")
    stages = 0
    for step in parser.structure:
        stages += step["instruction"] == "FROM"
        if stages > 1:
            break
        if step["instruction"] == "COPY":
            *names, target = step["value"].split()
            for name in names:
                if name == "dist":
                    shutil.copytree(tmp_path / "dist", source / target)
                else:
                    shutil.copy(ROOT / name, source / target)
        elif step["instruction"] == "RUN":
            command = step["value"].replace("/opt/watchmux", str(installed)).replace("python ", f"{sys.executable} ", 1)
            subprocess.run(command, shell=True, cwd=source, check=True, timeout=600)
    assert "/opt/watchmux/bin:" in dict(parser.envs)["PATH"]
    program = installed / "bin/watchmux"
    # Not from the checkout, whose packages would be found first.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": dict(parser.envs)["PYTHONDONTWRITEBYTECODE"]}
    shown = subprocess.run(
        [program, "config"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert shown.stdout == (CONFIGS / "watchmux.toml").read_text()
    pages = list(installed.rglob("admin/pages/status.html"))
    assert pages, "package data is installed"
    assert not list(installed.rglob("__pycache__"))
