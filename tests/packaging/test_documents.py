"""What the documents say is there: settings, metrics, make targets, commands, paths."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_configuration_reference_is_what_the_settings_say() -> None:
    from tools import config_reference

    written = config_reference.DOCUMENT.read_text(encoding="utf-8")
    assert written == config_reference.render(), f"stale; run: {config_reference.COMMAND}"


def test_the_configuration_reference_tells_types_ranges_and_defaults() -> None:
    from pydantic import Field, SecretStr, create_model

    from tools.config_reference import default_of, values_of

    def told_default() -> int:
        """As many as there are. More words."""
        return 1

    made = create_model(
        "Made",
        whole=(int, Field(default=3, ge=1, le=10_000)),
        share=(float, Field(default=0.5, gt=0.0, lt=1.0)),
        choice=(Literal["a", "b"], "a"),
        flag=(bool, False),
        secret=(SecretStr, SecretStr("")),
        names=(tuple[str, ...], ()),
        path=(Path | None, None),
        computed=(int, Field(default_factory=told_default)),
    )
    fields = made.model_fields
    assert {name: (values_of(field), default_of(field)) for name, field in fields.items()} == {
        "whole": ("integer ≥ 1, ≤ 10,000", "`3`"),
        "share": ("number > 0, < 1", "`0.5`"),
        "choice": ("`a`, `b`", "`a`"),
        "flag": ("`true`, `false`", "`false`"),
        "secret": ("text, never shown", "(empty)"),
        "names": ("list of text", "none"),
        "path": ("path", "(empty)"),
        "computed": ("integer", "As many as there are. More words"),
    }


def test_every_metric_is_documented() -> None:
    from mooring_server.telemetry.metrics import Metrics

    metrics = Metrics("0").registry._collector_to_names
    ours = [collector for collector in metrics if hasattr(collector, "_name")]  # process_* is the library's
    names = {collector._name + ("_total" if collector._type == "counter" else "") for collector in ours}
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
