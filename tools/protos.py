"""Everything that is done with the contract: stubs, lint, breaking-change check.

    python -m tools.protos generate    # Python stubs into clients/python/mooring/v1
    python -m tools.protos lint        # buf lint (STANDARD and comments on everything)
    python -m tools.protos breaking    # against proto/baseline.binpb, the last contract that was given out
    python -m tools.protos baseline    # writes that file; done at a release, never to silence `breaking`
    python -m tools.protos format      # buf format, in place

Our files import google/api and google/rpc. They are part of the installed googleapis-common-protos package;
buf finds them in a workspace that is put together in a temporary folder, so nothing is downloaded and nothing
is copied into this repository.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import files
from importlib.resources import files as files_of
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
STUBS = ROOT / "clients" / "python"
BASELINE = PROTO / "baseline.binpb"
PACKAGE_DOC = (
    '"""Generated from proto/mooring/v1 by `python -m tools.protos generate`; not edited by hand."""\n'
)


def third_party() -> Path:
    """The import root of the googleapis files that ship in site-packages.

    Raises:
        RuntimeError: when googleapis-common-protos is not installed with its .proto files.
    """
    for file in files("googleapis-common-protos") or []:
        if str(file).replace(os.sep, "/") == "google/api/field_behavior.proto":
            return Path(str(file.locate())).resolve().parent.parent.parent
    message = "googleapis-common-protos is installed without its .proto files"
    raise RuntimeError(message)


def sources() -> list[str]:
    """Our proto files, relative to the import root, in a fixed order."""
    return sorted(path.relative_to(PROTO).as_posix() for path in PROTO.rglob("*.proto"))


def generate(destination: Path = STUBS) -> None:
    """Writes message, typing and gRPC stubs to `destination`/mooring/v1, replacing what is there.

    Raises:
        RuntimeError: when protoc refuses the files (its output says why).
    """
    package = destination / "mooring" / "v1"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    include = Path(str(files_of("grpc_tools"))) / "_proto"
    everything = sources()
    with_services = [
        name for name in everything if "\nservice " in (PROTO / name).read_text(encoding="utf-8")
    ]
    for outputs, names in (
        (("python_out", "mypy_out"), everything),
        (("grpc_python_out", "mypy_grpc_out"), with_services),
    ):
        command = [
            sys.executable, "-m", "grpc_tools.protoc",
            f"-I{PROTO}", f"-I{third_party()}", f"-I{include}",
            f"--plugin=protoc-gen-mypy={_script('protoc-gen-mypy')}",
            f"--plugin=protoc-gen-mypy_grpc={_script('protoc-gen-mypy_grpc')}",
            f"--{outputs[0]}={destination}", f"--{outputs[1]}=quiet:{destination}",
            *names,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed program
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
    (package / "__init__.py").write_text(PACKAGE_DOC, encoding="utf-8")


def _script(name: str) -> Path:
    return Path(sys.executable).parent / name


@contextmanager
def workspace(proto: Path = PROTO) -> Iterator[Path]:
    """A temporary buf workspace: our buf.yaml and files, and googleapis as a second, unchecked module."""
    with tempfile.TemporaryDirectory(prefix="mooring-buf-") as folder:
        root = Path(folder)
        (root / "proto").symlink_to(proto, target_is_directory=True)
        google = root / "third_party" / "google"
        google.mkdir(parents=True)
        for name in ("api", "rpc"):
            # Only what we import: the installed folders hold more, and not all of what that needs.
            (google / name).mkdir()
        for wanted in ("api/field_behavior", "api/resource", "rpc/status", "rpc/error_details"):
            shutil.copy(third_party() / "google" / f"{wanted}.proto", google / f"{wanted}.proto")
        config = (ROOT / "buf.yaml").read_text(encoding="utf-8")
        marker = "  - path: proto\n"
        unchecked = (
            "  - path: third_party\n    lint:\n      ignore: [third_party]\n"
            "    breaking:\n      ignore: [third_party]\n"
        )
        (root / "buf.yaml").write_text(config.replace(marker, marker + unchecked), encoding="utf-8")
        yield root


def buf(*arguments: str, proto: Path = PROTO) -> subprocess.CompletedProcess[str]:
    """Runs buf in the assembled workspace; the caller looks at `returncode` and `stdout`."""
    with workspace(proto) as root:
        return subprocess.run(  # noqa: S603 - fixed program, own arguments
            [_script("buf"), *arguments], cwd=root, capture_output=True, text=True, check=False
        )


def lint(proto: Path = PROTO) -> subprocess.CompletedProcess[str]:
    """`buf lint` and `buf format --diff` over our files."""
    done = buf("lint", proto=proto)
    return done if done.returncode else buf("format", "proto", "--diff", "--exit-code", proto=proto)


def breaking(proto: Path = PROTO, against: Path = BASELINE) -> subprocess.CompletedProcess[str]:
    """`buf breaking` of our files against an image."""
    return buf("breaking", "proto", "--against", str(against), proto=proto)


def baseline(destination: Path = BASELINE) -> subprocess.CompletedProcess[str]:
    """Writes the present contract, imports included, as the image that `breaking` compares with."""
    return buf("build", "proto", "--exclude-source-info", "-o", str(destination))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.protos", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["generate", "lint", "breaking", "baseline", "format"])
    what = parser.parse_args(arguments).what
    if what == "generate":
        generate()
        return 0
    if what == "format":
        done = buf("format", "proto", "--write")
    else:
        done = {"lint": lint, "breaking": breaking, "baseline": baseline}[what]()
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
