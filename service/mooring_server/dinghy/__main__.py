"""``python -m mooring_server.dinghy``: the recipe of the embedded base model, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.callback()
def _main() -> None:
    """Keep the sub-command's name even while there is only one."""


@app.command()
def t2i(
    run: Annotated[str, typer.Option(help="Name of the run: its folder in the cache.")] = "t2i",
    minutes: Annotated[float, typer.Option(help="Stop after this long; 0: go on until stopped.")] = 0.0,
    decay_minutes: Annotated[
        float, typer.Option(help="Decay the rate to 3 % over this long, then stop.")
    ] = 0.0,
    batch: Annotated[int, typer.Option(help="Pictures per step.")] = 48,
    peak: Annotated[float, typer.Option(help="Factor on the rates, to go on from a decayed run.")] = 1.0,
    extra_share: Annotated[float, typer.Option(help="Share of pictures with an unnamed object.")] = 0.25,
    start: Annotated[str, typer.Option(help="Begin with a copy of this run's checkpoint.")] = "",
    threads: Annotated[int, typer.Option(help="Compute threads.")] = 1,
) -> None:
    """Train the UNet and the text encoder; goes on from the checkpoint in the cache."""
    import torch

    from . import base_dir, sources
    from .t2i import Settings, Trainer, branch

    torch.set_num_threads(threads)
    if start and not (sources.cache_dir() / run / "checkpoint.pt").exists():
        branch(start, run)
    settings = Settings(
        minutes=minutes, decay_minutes=decay_minutes, batch=batch, peak=peak, extra_share=extra_share
    )
    trainer = Trainer(sources.cache_dir() / run, settings)
    typer.echo(f"starting from {trainer.resume(base_dir())}")
    trainer.run()


@app.command()
def vae(
    minutes: Annotated[float, typer.Option(help="Planned training time over all calls.")] = 22.0,
    call_minutes: Annotated[float, typer.Option(help="Leave off after this long; 0: never.")] = 0.0,
    threads: Annotated[int, typer.Option(help="Compute threads.")] = 1,
) -> None:
    """Train the codec's decoder; goes on from the checkpoint in the cache."""
    import torch

    from .vae import train_decoder

    torch.set_num_threads(threads)
    train_decoder(minutes, call_minutes or None)


@app.command()
def classifier(
    minutes: Annotated[float, typer.Option(help="Planned training time over all calls.")] = 9.0,
    threads: Annotated[int, typer.Option(help="Compute threads.")] = 1,
) -> None:
    """Train the independent classifier that measures the base, and print its own accuracy."""
    import torch

    from .classifier import own_accuracy, train_classifier

    torch.set_num_threads(threads)
    typer.echo(own_accuracy(train_classifier(minutes)))


@app.command()
def judges(
    clip_minutes: Annotated[float, typer.Option(help="Planned training time of dinghy-clip.")] = 10.0,
    dino_minutes: Annotated[float, typer.Option(help="Planned training time of dinghy-dino.")] = 10.0,
    call_minutes: Annotated[float, typer.Option(help="Leave each off after this long; 0: never.")] = 0.0,
    threads: Annotated[int, typer.Option(help="Compute threads.")] = 1,
) -> None:
    """Train dinghy-clip and dinghy-dino; goes on from their checkpoints."""
    import torch

    from .judges import train_clip, train_dino

    torch.set_num_threads(threads)
    train_clip(clip_minutes, call_minutes or None)
    train_dino(dino_minutes, call_minutes or None)


@app.command()
def photos() -> None:
    """Render the held-out subjects' photos into the package data."""
    from . import subject_dirs
    from .subjects import make_photos

    root = Path(__file__).parent / "subjects"
    typer.echo(f"{make_photos(root)} photos of {len(subject_dirs())} subjects")


@app.command()
def export(
    run: Annotated[str, typer.Option(help="Name of the text-to-image run.")] = "t2i",
    figures_file: Annotated[str, typer.Option(help="Figures to record in the manifest.")] = "figures.json",
) -> None:
    """Write base, judges and manifest into the package data from the cache's checkpoints."""
    import json

    import torch

    from . import base_dir, clip_dir, dino_dir, sources, weights_dir
    from .export import export_base, write_manifest
    from .judges import export_judges

    torch.set_num_threads(1)
    training = {"base": export_base(base_dir(), run)} | export_judges(clip_dir(), dino_dir())
    path = sources.cache_dir() / figures_file
    measured = json.loads(path.read_text()) if path.exists() else {}
    write_manifest(weights_dir(), {"training": training, "measured": measured})
    typer.echo(json.dumps(training))


@app.command()
def figures(
    count: Annotated[int, typer.Option(help="Fresh prompts.")] = 300,
    out: Annotated[str, typer.Option(help="Folder for the sample sheets.")] = "docs/images",
    threads: Annotated[int, typer.Option(help="Compute threads.")] = 1,
) -> None:
    """Measure the exported set: scenes, objects, tints, codec, judges; write the sample sheets."""
    import json

    import torch

    from .figures import all_figures

    torch.set_num_threads(threads)
    typer.echo(json.dumps(all_figures(count, Path(out)), indent=1))


@app.command()
def curves(
    out: Annotated[str, typer.Option(help="Folder for the drawings.")] = "docs/images",
) -> None:
    """Draw the learning curves of every run in the cache."""
    from . import sources
    from .curves import draw, read_log

    cache, folder = sources.cache_dir(), Path(out)
    base = {p.parent.name: read_log(p) for p in sorted(cache.glob("t2i*/log.jsonl"))}
    draw(base, folder / "dinghy-curve-t2i.png", "text-to-image: weighted v loss against samples")
    rest = {n: read_log(cache / n / "log.jsonl") for n in ("vae", "clip", "dino") if (cache / n).exists()}
    draw(rest, folder / "dinghy-curve-others.png", "codec and judges: loss against samples")


@app.command()
def personalise(
    names: Annotated[list[str], typer.Argument(help="Held-out subjects, by name.")],
    steps: Annotated[int, typer.Option(help="Training steps.")] = 400,
    out: Annotated[str, typer.Option(help="The sheet to write.")] = "docs/images/dinghy-personalised.png",
    feed_forward: Annotated[bool, typer.Option(help="Adapt the feed-forward layers as well.")] = True,
    threads: Annotated[int, typer.Option(help="Compute threads.")] = 1,
) -> None:
    """Train a plain LoRA on shipped subjects and draw them in scenes that their photos do not show."""
    import torch

    from .personalise import sheet

    torch.set_num_threads(threads)
    sheet(names, Path(out), steps=steps, feed_forward=feed_forward)


@app.command()
def train(
    minutes: Annotated[float, typer.Option(help="Minutes for the text-to-image model in this call.")] = 60.0,
    decay_minutes: Annotated[float, typer.Option(help="Length of the closing decay.")] = 20.0,
    threads: Annotated[int, typer.Option(help="Compute threads.")] = 1,
) -> None:
    """Everything in order: codec, text-to-image model, judges, classifier, export, figures.

    Goes on from the checkpoints in the cache, or from the committed weights where none is left.
    """
    import torch

    from . import base_dir, sources
    from .t2i import Settings, Trainer, branch

    torch.set_num_threads(threads)
    vae(threads=threads)
    trainer = Trainer(sources.cache_dir() / "t2i", Settings(minutes=minutes))
    typer.echo(f"text-to-image: from {trainer.resume(base_dir())}")
    trainer.run()
    branch("t2i", "t2i-decay")
    trainer = Trainer(sources.cache_dir() / "t2i-decay", Settings(decay_minutes=decay_minutes))
    trainer.resume()
    trainer.run()
    judges(threads=threads)
    classifier(threads=threads)
    export("t2i-decay")
    figures(threads=threads)
    export("t2i-decay")


if __name__ == "__main__":
    app()
