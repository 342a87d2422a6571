"""Regenerates the code in proto/pb from its .proto files: `python -m proto.generate`, or `make proto`.

The generated code is committed, so that an installation needs no compiler. protoc's own plugins generate the code, and
mypy-protobuf's generate the type stubs: they support enums and oneofs and cover the gRPC stubs too. The versions of
both tools affect the output and are bounded in pyproject.toml, as are the versions of protobuf and grpcio it needs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
"""Where protoc runs: the generated modules import each other by their paths from here, as `proto.pb.kv_pb2`."""

FOLDER: Final = "proto/pb"

# Concrete, as the generated servicers are: a method that is not overridden returns UNIMPLEMENTED.
_STUBS: Final = "quiet,generate_concrete_servicer_stubs"


class GenerateError(Exception):
    """protoc or one of its plugins is missing or rejected a file."""


def generate(into: Path) -> list[Path]:
    """Write the generated code below the folder `into`, as proto/pb/*, and return its paths, sorted.

    gRPC modules are generated only for files that declare a service. Raises GenerateError.
    """
    sources = sorted((ROOT / FOLDER).glob("*.proto"))
    _protoc(sources, f"--python_out={into}", f"--mypy_out=quiet:{into}")
    services = [path for path in sources if "\nservice " in path.read_text(encoding="utf-8")]
    _protoc(services, f"--grpc_python_out={into}", f"--mypy_grpc_out={_STUBS}:{into}")
    return sorted((into / FOLDER).glob("*_pb2*.py*"))


def _protoc(sources: list[Path], *outputs: str) -> None:
    plugins = [f"--plugin={name}={_plugin(name)}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    names = [str(path.relative_to(ROOT)) for path in sources]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *plugins, *outputs, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GenerateError(f"protoc failed (are the packages of the extra `test` installed?):\n{done.stderr}")


def _plugin(name: str) -> str:
    """Return the path of a protoc plugin; the folder of this Python is searched first, then PATH."""
    places = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    path = shutil.which(name, path=places)
    if path is None:
        raise GenerateError(f"{name} is missing: install the packages of the extra `test`")
    return path


if __name__ == "__main__":
    try:
        generate(ROOT)
    except GenerateError as error:
        sys.exit(f"error: {error}")
