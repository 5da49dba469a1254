"""Options that several commands share, spelled once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from mooring_server.cli_output import fail

ServerOption = Annotated[
    str,
    typer.Option(
        "--server",
        envvar="MOORING_SERVER",
        metavar="HOST:PORT",
        help="Server to talk to, with the credential of MOORING_API_KEY or MOORING_TOKEN_FILE. "
        "Default: the one that runs on the state directory, or one of its own.",
        rich_help_panel="Server",
    ),
]
StateDirOption = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        envvar="MOORING_STATE_DIR",
        metavar="DIR",
        help="Where an embedded server keeps everything. Default: ~/.local/state/mooring.",
        rich_help_panel="Server",
        file_okay=False,
    ),
]
BaseOption = Annotated[
    str,
    typer.Option(
        "--base",
        envvar="MOORING_BASE",
        metavar="DIR",
        help="Base model of an embedded server: an SD1.x, 2.x or SDXL directory. Default: dinghy.",
        rich_help_panel="Server",
    ),
]
AdapterArgument = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help='Adapter id, with a version ("rex@2"), an alias ("rex@live") or without (the newest version).',
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text.")]

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def photo_files(paths: Iterable[Path]) -> list[Path]:
    """The photos that paths name; of a folder its JPEG, PNG and WebP files in order of their names.

    Raises:
        typer.Exit: a path does not exist, or a folder has no photos.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PHOTO_SUFFIXES)
            if not inside:
                raise fail(f"{path} holds no JPEG, PNG or WebP files.", code=2)
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise fail(f"{path} does not exist.", "Name photos, or a folder of photos.", code=2)
    return found


def prompt_lines(path: Path | None) -> list[str] | None:
    """Prompts of a text file, one a line; blank lines and lines that start with # are left out."""
    if path is None:
        return None
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise fail(f"{path} holds no prompts.", "Write one prompt a line.", code=2)
    return prompts
