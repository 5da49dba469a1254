"""Imports go one way: rpc → jobs → training → evaluation → engine → mooring_kernels."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVER = ROOT / "service" / "mooring_server"
KERNELS = ROOT / "kernels" / "mooring_kernels"
CLIENT = ROOT / "clients" / "python" / "mooring"

LEAVES = {"errors", "config", "telemetry"}
# part of mooring_server -> the other parts it may import, with everything below written out
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "dinghy": {"errors"},
    "config": {"errors", "dinghy"},
    "telemetry": {"errors", "config"},
    "storage": LEAVES,
    "engine": LEAVES,
    "evaluation": LEAVES | {"engine"},
    "training": LEAVES | {"engine", "evaluation"},
    "safety": LEAVES,
    "provenance": LEAVES,
    "jobs": LEAVES | {"engine", "evaluation", "training", "storage", "dinghy", "safety", "provenance"},
    "rpc": LEAVES | {"engine", "evaluation", "training", "storage", "jobs", "safety", "provenance"},
    "server": LEAVES
    | {"engine", "evaluation", "training", "storage", "jobs", "rpc", "dinghy", "safety", "provenance"},
    # the command line talks to the server through the client, like everybody else; API keys alone it makes in
    # the database, because the first one has to come from somewhere
    "cli": {"errors", "config", "server", "dinghy", "demo", "cli", "storage", "provenance"},
    "demo": {"errors", "config", "dinghy", "cli", "evaluation"},
    "__main__": {"cli"},
}
# third-party and own distributions that a part must stay ignorant of
MUST_NOT_IMPORT: dict[str, set[str]] = {
    "errors": {"torch", "grpc", "sqlalchemy", "mooring"},
    "config": {"torch", "grpc", "sqlalchemy", "mooring"},
    "storage": {"torch", "grpc", "mooring", "diffusers", "transformers"},
    "engine": {"grpc", "sqlalchemy", "mooring", "google"},
    "evaluation": {"grpc", "sqlalchemy", "mooring", "google"},
    "training": {"grpc", "sqlalchemy", "mooring", "google"},
    "safety": {"grpc", "sqlalchemy", "mooring", "google"},
    "provenance": {"torch", "grpc", "sqlalchemy", "mooring", "google"},
    "jobs": {"grpc", "mooring", "google"},
    "dinghy": {"grpc", "sqlalchemy", "mooring"},
}
# spans are made in one place
for _part in set(MAY_IMPORT) - {"telemetry"}:
    MUST_NOT_IMPORT.setdefault(_part, set()).add("opentelemetry")


def imports(path: Path, package: str) -> Iterator[str]:
    """Absolute dotted names that a file imports, at any depth of nesting, annotations-only ones included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                prefix = ".".join([*base, node.module] if node.module else base)
            else:
                prefix = node.module or ""
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def files(root: Path, distribution: str) -> list[tuple[Path, str]]:
    """Python files below root with the dotted package each lies in."""
    return [
        (path, ".".join([distribution, *path.relative_to(root).parts[:-1]]))
        for path in sorted(root.rglob("*.py"))
    ]


def part_of(path: Path) -> str:
    """The part of mooring_server that a file belongs to: its folder, or its module name."""
    top = path.relative_to(SERVER).parts[0].removesuffix(".py")
    return "cli" if top.startswith("cli") else top


def violations_of_part(part: str, names: Iterator[str] | list[str]) -> list[str]:
    """The imports among `names` that `part` may not have."""
    bad = []
    for name in names:
        head, _, rest = name.partition(".")
        if head == "mooring_server":
            target = rest.split(".")[0]
            target = "cli" if target.startswith("cli") else target
            if target != part and (SERVER / target).exists() | (SERVER / f"{target}.py").exists():
                bad += [name] if target not in MAY_IMPORT[part] else []
        elif head in MUST_NOT_IMPORT.get(part, set()):
            bad.append(name)
    return bad


def test_the_check_itself_finds_violations() -> None:
    assert violations_of_part("engine", ["mooring_server.rpc.server", "grpc.aio"]) == [
        "mooring_server.rpc.server",
        "grpc.aio",
    ]
    assert violations_of_part("engine", ["mooring_server.errors.Reason", "torch.nn"]) == []


def test_every_part_has_a_place_in_the_order() -> None:
    parts = {part_of(path) for path in SERVER.rglob("*.py")} - {"__init__"}
    assert parts <= set(MAY_IMPORT), (
        f"give {sorted(parts - set(MAY_IMPORT))} a place in tests/packaging/test_layers.py"
    )


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_parts_import_only_what_lies_below(part: str) -> None:
    found = {
        str(path.relative_to(ROOT)): bad
        for path, package in files(SERVER, "mooring_server")
        if part_of(path) == part and (bad := violations_of_part(part, list(imports(path, package))))
    }
    assert not found


def test_nothing_that_trains_serves_or_judges_imports_the_ruler() -> None:
    found = {
        path.relative_to(SERVER).as_posix()
        for path, package in files(SERVER, "mooring_server")
        if any({"classifier", "ruler_dir"} & set(name.split(".")) for name in imports(path, package))
    }
    assert found == {f"dinghy/{name}.py" for name in ("export", "figures", "recipe")}


def test_kernels_know_only_torch_and_triton() -> None:
    allowed = {"torch", "triton", "numpy", "mooring_kernels"}
    found = {
        str(path.relative_to(ROOT)): bad
        for path, package in files(KERNELS, "mooring_kernels")
        if (bad := [n for n in imports(path, package) if not stdlib(n) and n.split(".")[0] not in allowed])
    }
    assert not found


def test_client_knows_only_the_proto_and_optional_pillow_and_opentelemetry() -> None:
    allowed = {"mooring", "grpc", "google", "grpc_status", "PIL", "opentelemetry"}
    found = {
        str(path.relative_to(ROOT)): bad
        for path, package in files(CLIENT, "mooring")
        if (bad := [n for n in imports(path, package) if not stdlib(n) and n.split(".")[0] not in allowed])
    }
    assert not found


def stdlib(name: str) -> bool:
    """Whether a dotted name belongs to Python itself."""
    return name.split(".", maxsplit=1)[0] in sys.stdlib_module_names | {"__future__"}
