"""What the documents say is there: settings, metrics, make targets, commands, paths."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_setting_is_documented_with_its_description() -> None:
    from mooring_server.config import Settings

    rows = dict(re.findall(r"^\| `(MOORING_\w+)` \| .*? \| (.*) \|$", OPERATIONS, re.MULTILINE))
    assert rows == {f"MOORING_{n.upper()}": f.description for n, f in Settings.model_fields.items()}


def test_every_metric_is_documented() -> None:
    from mooring_server.telemetry.metrics import Metrics

    metrics = Metrics("0").registry._collector_to_names
    names = {collector._name + ("_total" if collector._type == "counter" else "") for collector in metrics}
    assert names
    assert not {name for name in names if f"`{name}`" not in OPERATIONS}


def test_make_targets_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", README + OPERATIONS, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("document", [README, OPERATIONS])
def test_commands_in_the_documents_exist(document: str) -> None:
    from mooring_server.cli import app
    from typer.main import get_command

    root = get_command(app)
    for words in re.findall(r"^\s*(?:\$ )?mooring ([a-z]+(?: [a-z]+)?)", document, re.MULTILINE):
        first, _, second = words.partition(" ")
        command = root.commands.get(first)  # type: ignore[attr-defined]
        assert command is not None, f"mooring {words}"
        if hasattr(command, "commands"):
            assert second in command.commands, f"mooring {words}"


def test_options_in_the_documents_exist() -> None:
    from mooring_server.cli import app
    from typer.main import get_command

    def options(command: object) -> set[str]:
        own = {name for p in command.params for name in [*p.opts, *p.secondary_opts]}  # type: ignore[attr-defined]
        return own.union(*(options(c) for c in getattr(command, "commands", {}).values()))

    known = options(get_command(app)) | {"--help"}
    lines = re.findall(r"^\s*(?:\$ )?mooring .*$", README + OPERATIONS, re.MULTILINE)
    used = {option for line in lines for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", line)}
    assert used <= known


def test_paths_in_the_tree_of_the_readme_exist() -> None:
    tree = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert tree is not None
    folders: list[str] = []
    for line in tree[1].splitlines():
        match = re.match(r"( *)(\S+)", line)
        if not match:
            continue
        depth, name = len(match[1]) // 2, match[2]
        folders = [*folders[:depth], name.rstrip("/")]
        assert (ROOT / "/".join(folders)).exists(), "/".join(folders)


def test_images_of_the_readme_exist() -> None:
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_links_of_the_readme_lead_somewhere() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
