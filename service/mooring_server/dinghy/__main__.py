"""``python -m mooring_server.dinghy``: the recipe of the embedded base model, step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .preset import PRESETS, SHIPPED

if TYPE_CHECKING:
    from .recipe import Recipe

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Version = Annotated[str, typer.Option("--preset", help="dinghy-4 (128 px) or dinghy-1 (64 px).")]
Device = Annotated[str, typer.Option(help="cpu or cuda; by default a GPU where there is one.")]
Scale = Annotated[float, typer.Option(help="Factor on every planned number of steps.")]
BatchSize = Annotated[int, typer.Option(help="Pictures per step; 0: the plan's, which is smaller on a CPU.")]
Sheets = Annotated[Path, typer.Option(help="Folder for the sample sheets.")]
Count = Annotated[int, typer.Option(help="Fresh prompts of one object; 0.4 times as many of two or three.")]
IMAGES = Path("docs/images")
DEFAULT = SHIPPED.version


def _recipe(version: str, device: str, scale: float = 1.0, batch: int = 0) -> Recipe:
    from .recipe import Recipe

    if version not in PRESETS:
        raise typer.BadParameter(f"no preset {version!r}; one of {', '.join(PRESETS)}")
    return Recipe(PRESETS[version], device, scale=scale, batch=batch)


@app.command()
def train(
    preset: Version = DEFAULT,
    device: Device = "",
    scale: Scale = 1.0,
    batch: BatchSize = 0,
    count: Count = 500,
    out: Sheets = IMAGES,
) -> None:
    """Everything in order: photos, ruler, text-to-image model, decoder, judges, figures.

    Each part goes on from its checkpoint in the cache.
    """
    _recipe(preset, device, scale, batch).everything(count, out)


@app.command()
def base(
    preset: Version = DEFAULT,
    device: Device = "",
    scale: Scale = 1.0,
    batch: BatchSize = 0,
    decay: Annotated[float, typer.Option(help="Last share of the steps over which the rate falls.")] = 0.7,
    peak: Annotated[float, typer.Option(help="Factor on the rates, to go on from trained weights.")] = 1.0,
) -> None:
    """Train the text-to-image model and export it into the package data; `decoder` comes after it."""
    from .t2i import PLAN

    rates = {"muon_lr": peak * PLAN.muon_lr, "adam_lr": peak * PLAN.adam_lr}
    _recipe(preset, device, scale, batch).base(decay=decay, **rates)


@app.command()
def decoder(preset: Version = DEFAULT, device: Device = "", scale: Scale = 1.0, batch: BatchSize = 0) -> None:
    """Train the codec's decoder on what the base draws; its latents and the UNet stay as they are."""
    _recipe(preset, device, scale, batch).decoder()


@app.command()
def clip(device: Device = "", scale: Scale = 1.0, batch: BatchSize = 0) -> None:
    """Train dinghy-clip, from the committed weights if there are any, and export it into the package data."""
    _recipe(DEFAULT, device, scale, batch).clip()


@app.command()
def dino(device: Device = "", scale: Scale = 1.0, batch: BatchSize = 0) -> None:
    """Train dinghy-dino, from the committed weights if there are any, and export it into the package data."""
    _recipe(DEFAULT, device, scale, batch).dino()


@app.command()
def ruler(preset: Version = DEFAULT, device: Device = "", scale: Scale = 1.0, batch: BatchSize = 0) -> None:
    """Train the independent classifier that measures the base."""
    _recipe(preset, device, scale, batch).ruler()


@app.command()
def photos(preset: Version = DEFAULT, device: Device = "") -> None:
    """Render the held-out subjects' photos into the package data."""
    typer.echo(f"{_recipe(preset, device).photos()} photos")


@app.command()
def figures(preset: Version = DEFAULT, device: Device = "", count: Count = 500, out: Sheets = IMAGES) -> None:
    """Measure the exported set (objects, relations, scenes, tints, codec, judges) and write sample sheets."""
    typer.echo(json.dumps(_recipe(preset, device).figures(count, out), indent=1))


@app.command()
def personalise(
    names: Annotated[list[str] | None, typer.Argument(help="Held-out subjects; by default eight.")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Moments to look at; repeatable.")] = None,
    style: Annotated[
        Literal["3d", "flat", "noto"],
        typer.Option(help="Of the drawings; in noto, no model has seen a named object."),
    ] = "3d",
    preset: Version = DEFAULT,
    device: Device = "",
    out: Annotated[
        Path | None, typer.Option(help="The sheet to write; by default in docs/images, named by the preset.")
    ] = None,
) -> None:
    """Train plain LoRAs of held-out subjects; is each recognised among twenty look-alikes in new scenes?"""
    from . import personalise as check
    from .figures import sheet_name

    recipe = _recipe(preset, device)
    what = "personalised" if style == "3d" else f"personalised-{style}"
    sheet = out or IMAGES / f"{sheet_name(recipe.preset)}-{what}.png"
    moments = steps or (200, 400, 800)
    table = check.measure(recipe.bench(), names or list(check.EIGHT), sheet, moments=moments, style=style)
    recipe.record(what.replace("-", "_"), **table)
    typer.echo(json.dumps(table, indent=1))


@app.command()
def curves(preset: Version = DEFAULT, out: Sheets = IMAGES) -> None:
    """Draw the learning curves of every run in the cache."""
    from . import sources
    from .curves import draw, read_log
    from .figures import sheet_name

    runs = sources.cache_dir() / preset
    logs = {p.parent.name: read_log(p) for p in sorted(runs.glob("*/log.jsonl"))}
    name = sheet_name(PRESETS[preset])
    base = {run: logs.pop(run) for run in list(logs) if run.startswith("t2i")}
    draw(base, out / f"{name}-curve-t2i.png", "text-to-image: weighted v loss")
    draw(logs, out / f"{name}-curve-others.png", "codec, judges and ruler: loss against samples")


if __name__ == "__main__":
    app()
