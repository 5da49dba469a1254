"""The container file: linted, pinned, unprivileged, and complete: what it copies and installs is there."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from manifests import ROOT

FILE = ROOT / "deploy" / "container" / "Containerfile"
HADOLINT = Path(sys.executable).parent / "hadolint"
DISTRIBUTIONS = {"mooring": "clients/python", "mooring_kernels": "kernels", "mooring_server": "."}


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, rest) of every line, continued lines joined, comments dropped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(words[0], words[1]) for line in joined.splitlines() if (words := line.split(None, 1))]


TEXT = FILE.read_text(encoding="utf-8")
ALL = instructions(TEXT)
FINAL = ALL[max(index for index, (word, _) in enumerate(ALL) if word == "FROM") :]


def only(word: str, among: list[tuple[str, str]] = FINAL) -> str:
    (found,) = [rest for each, rest in among if each == word]
    return found


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    command = [HADOLINT, "--config", FILE.parent / "hadolint.yaml", path]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_linter_finds_nothing():
    done = lint(FILE)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("right", "wrong", "rule"),
    [
        ("--no-install-recommends ", "", "DL3015"),
        ('CMD ["serve"]', "CMD serve", "DL3025"),
        ("WORKDIR /var/lib/mooring", "WORKDIR var", "DL3000"),
    ],
)
def test_the_linter_finds_what_is_wrong(tmp_path, right, wrong, rule):
    assert right in TEXT
    broken = tmp_path / "Containerfile"
    broken.write_text(TEXT.replace(right, wrong))
    done = lint(broken)
    assert done.returncode != 0
    assert rule in done.stdout


def test_the_base_image_is_an_argument_and_both_stages_use_it():
    assert ALL[0] == ("ARG", "PYTHON_IMAGE=python:3.12-slim-bookworm")
    assert [rest for word, rest in ALL if word == "FROM"] == ["${PYTHON_IMAGE} AS build", "${PYTHON_IMAGE}"]
    document = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    assert "PYTHON_IMAGE=python:3.12-slim-bookworm@sha256:" in document, "how to pin it"


def test_every_package_is_pinned_and_hashed():
    installs = re.findall(r"(?:pip|uv) (?:pip )?install .*?(?= && |$)", " && ".join(rest for _, rest in ALL))
    assert len(installs) == 3
    for command in installs:
        hashed = re.search(r"--require-hashes -r requirements/(\w+)\.txt", command)
        assert hashed or "--no-deps --no-index /wheels/" in command, command
        if hashed:
            assert "--hash=sha256:" in (ROOT / "requirements" / f"{hashed[1]}.txt").read_text()


def test_the_server_runs_as_nobody_special_with_its_state_in_volumes():
    assert only("USER") == "10001:10001"
    volumes = set(re.findall(r'"([^"]+)"', only("VOLUME")))
    assert volumes == {"/var/lib/mooring", "/var/cache/mooring"}
    environment = dict(re.findall(r"(\w+)=(\S+)", only("ENV")))
    for name in (
        "HOME",
        "XDG_CACHE_HOME",
        "TRITON_CACHE_DIR",
        "TORCHINDUCTOR_CACHE_DIR",
        "MOORING_STATE_DIR",
    ):
        assert any(environment[name].startswith(volume) for volume in volumes), "the root is read-only"
    assert environment["HF_HUB_OFFLINE"] == "1"
    order = [word for word, _ in FINAL]
    assert order.index("USER") < order.index("ENTRYPOINT"), "nothing is written as root after it"
    assert only("STOPSIGNAL") == "SIGTERM"
    assert only("ENTRYPOINT") == '["mooring"]', "the server is process 1, so that it gets the signal"


def test_the_health_check_is_a_command_that_exists():
    from mooring_server.cli import app
    from typer.main import get_command

    words = re.search(r'CMD \["mooring", "(\w+)"\]', only("HEALTHCHECK"))
    assert words
    assert words[1] in get_command(app).commands


def test_what_is_copied_is_there_and_not_ignored():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for word, rest in ALL:
        if word == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(source == each or source.startswith(each + "/") for each in allowed), source


def test_every_pinned_version_is_the_one_that_is_tested():
    def pins(name: str) -> set[str]:
        text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
        return set(re.findall(r"^([a-z0-9._-]+==[^ ]+)", text, re.MULTILINE))

    assert len(pins("runtime")) > 40
    assert pins("runtime") <= pins("dev")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, set[str]]:
    """The files of the wheels that the container installs, built as it builds them."""
    folder = tmp_path_factory.mktemp("wheels")
    for project in DISTRIBUTIONS.values():
        command = [Path(sys.executable).parent / "uv", "build", "--quiet", "--offline", "--wheel"]
        command += ["--no-build-isolation", "--python", sys.executable, "--out-dir", folder, project]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return {path.name.split("-")[0]: set(zipfile.ZipFile(path).namelist()) for path in folder.glob("*.whl")}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_wheel_carries_every_file_of_its_package(wheels, distribution):
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    prefix = {"mooring": "clients/python/", "mooring_kernels": "kernels/", "mooring_server": "service/"}
    start = prefix[distribution]
    wanted = {
        name.removeprefix(start) for name in listing.split("\0") if name.startswith(f"{start}{distribution}/")
    }
    assert len(wanted) > 5
    assert not wanted - wheels[distribution]
