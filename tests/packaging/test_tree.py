"""What every committed file keeps to: length, no machine paths, no registry addresses, licences."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 700
DISTRIBUTIONS = ["pyproject.toml", "clients/python/pyproject.toml", "kernels/pyproject.toml"]
MACHINE_PATHS = re.compile(r"(?<![\w./<~-])/(work|root|Users)/|/home/\w|/opt/wheels")
REGISTRIES = re.compile(r"\b(pypi\.org|pythonhosted\.org|npmjs\.(org|com)|artifactory)\b")


def committed() -> list[Path]:
    """Files under version control, or everything outside ignored folders where there is no git."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        ignored = {".venv", ".cache", ".git", "demo", "__pycache__", ".hypothesis"}
        return [p for p in ROOT.rglob("*") if p.is_file() and not ignored & set(p.relative_to(ROOT).parts)]
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def texts() -> list[tuple[Path, str]]:
    """Committed files that are text, with their content."""
    found = []
    for path in committed():
        try:
            found.append((path, path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return found


def generated(path: Path) -> bool:
    """Whether a file is written by a tool."""
    return "mooring/v1" in path.as_posix() and path.suffix in {".py", ".pyi"}


def test_no_source_file_is_longer_than_a_reader_can_hold() -> None:
    too_long = {
        str(path.relative_to(ROOT)): lines
        for path, text in texts()
        if path.suffix in {".py", ".proto", ".sh"} and not generated(path)
        if (lines := text.count("\n")) > LONGEST
    }
    assert not too_long


@pytest.mark.parametrize(
    ("what", "pattern"), [("machine path", MACHINE_PATHS), ("registry address", REGISTRIES)]
)
def test_no_committed_file_names_a_machine_or_a_registry(what: str, pattern: re.Pattern[str]) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path, text in texts()
        if path != Path(__file__)  # it holds the patterns
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"{what} in committed files"


def test_the_patterns_find_what_they_look_for() -> None:
    assert MACHINE_PATHS.search("open('/root/x')")
    assert MACHINE_PATHS.search("cd /work/main")
    assert not MACHINE_PATHS.search("clients/work/x and $HOME/x")
    assert REGISTRIES.search("https://pypi.org/simple")


def test_licence_is_there_and_declared_by_every_distribution() -> None:
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "Version 2.0" in licence
    for name in DISTRIBUTIONS:
        project = tomllib.loads((ROOT / name).read_text(encoding="utf-8"))["project"]
        assert project["license"] == "Apache-2.0", name


def test_versions_of_the_distributions_agree() -> None:
    versions = {
        name: tomllib.loads((ROOT / name).read_text(encoding="utf-8"))["project"]["version"]
        for name in DISTRIBUTIONS
    }
    assert len(set(versions.values())) == 1, versions


def test_no_lock_files_with_download_addresses() -> None:
    forbidden = {"uv.lock", "poetry.lock", "package-lock.json", "yarn.lock", "pnpm-lock.yaml", "Pipfile.lock"}
    assert not [str(path) for path in committed() if path.name in forbidden]


@pytest.mark.parametrize("name", ["bootstrap", "runtime", "dev"])
def test_requirements_are_pinned_and_hashed(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=[A-Za-z0-9])", text)[1:]  # the first piece is the header
    assert entries
    loose = [e.split()[0] for e in entries if not re.match(r"\S+==\S+[^\\]*\\\n +--hash=sha256:\w{64}", e)]
    assert not loose


def _named(lines: list[str]) -> dict[str, str]:
    """Requirements by normalised name: the version they are pinned to, "" where they are not."""
    found = {}
    for line in lines:
        if match := re.match(r"([A-Za-z0-9][A-Za-z0-9_.-]*)(?:\[[^]]*\])?(?:==([^\s;]+))?", line):
            found[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2] or ""
    return found


@pytest.mark.parametrize(
    ("resolved", "asked"), [("dev", ["runtime.in", "dev.in"]), ("runtime", ["runtime.in"])]
)
def test_every_direct_requirement_is_resolved(resolved: str, asked: list[str]) -> None:
    """The image installs runtime.txt alone: what is missing there is missing in production."""
    folder = ROOT / "requirements"
    pinned = _named((folder / f"{resolved}.txt").read_text("utf-8").splitlines())
    wanted = _named([line for name in asked for line in (folder / name).read_text("utf-8").splitlines()])
    assert not {name: version for name, version in wanted.items() if version and pinned.get(name) != version}
    assert wanted.keys() <= pinned.keys()


def test_the_server_asks_for_what_is_resolved() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pinned = _named((ROOT / "requirements/runtime.txt").read_text("utf-8").splitlines())
    assert _named(project["dependencies"]).keys() - pinned.keys() == {"mooring", "mooring-kernels"}


def test_no_two_test_files_share_a_name() -> None:
    """Without packages pytest imports test files by their bare name and refuses the second of a name."""
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}
