"""`mooring train`, `mooring generate` and `mooring evaluate`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from mooring_server.cli_options import BaseOption, JsonOption, ServerOption, StateDirOption, prompt_lines
from mooring_server.cli_output import (
    duration,
    err,
    errors_shown,
    fail,
    job_progress,
    message_dict,
    out,
    print_json,
    short,
    table,
)
from mooring_server.cli_server import connect

if TYPE_CHECKING:
    import mooring
    from mooring.types import Done, Image
    from mooring.v1 import evaluation_pb2, job_pb2


class Method(StrEnum):
    """Training methods."""

    NONE = "none"
    L2 = "l2"
    FACTOR_DECAY = "factor_decay"
    SPECTRAL = "spectral"
    PRIOR_PRESERVATION = "prior_preservation"


class Preset(StrEnum):
    """Named drift budgets."""

    CONSERVATIVE = "conservative"
    BALANCED = "balanced"
    ADAPTIVE = "adaptive"


class Targets(StrEnum):
    """Adapted layers."""

    ATTENTION = "attention"
    ATTENTION_FF = "attention_ff"


class Framing(StrEnum):
    """Ways from a photo to a square."""

    CROP = "crop"
    LETTERBOX = "letterbox"


class SamplerName(StrEnum):
    """Samplers."""

    DDIM = "ddim"
    EULER = "euler"
    EULER_ANCESTRAL = "euler_ancestral"
    DPMPP_2M = "dpmpp_2m"


def train(
    subject: Annotated[str, typer.Argument(metavar="SUBJECT", help="What to learn; see `mooring subjects`.")],
    *,
    adapter: Annotated[
        str, typer.Option(metavar="NAME", help="Adapter to publish a version of. Default: the subject's id.")
    ] = "",
    method: Annotated[
        Method,
        typer.Option(
            metavar="METHOD",
            help="How the base is protected: none, l2, factor_decay, spectral, prior_preservation.",
        ),
    ] = Method.SPECTRAL,
    preset: Annotated[
        Preset | None,
        typer.Option(
            metavar="PRESET",
            help="How far the model may move from the base: conservative, balanced (default), adaptive.",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="RHO", help="The same as a number: share of the base's guidance energy.", min=0.0
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(metavar="LAMBDA", help="A fixed penalty strength instead.", min=0.0)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps. Default: the server's.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the factors. Default: the server's.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--lr", help="Learning rate. Default: the server's.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Photos per step. Default: the server's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same adapter.")] = 0,
    targets: Annotated[
        Targets | None,
        typer.Option(metavar="LAYERS", help="Adapted layers: attention (default), attention_ff."),
    ] = None,
    embedding: Annotated[
        bool | None, typer.Option("--embedding/--no-embedding", help="Learn the placeholder's embedding too.")
    ] = None,
    framing: Annotated[
        Framing | None,
        typer.Option(metavar="HOW", help="How a photo becomes a square: crop (default), letterbox."),
    ] = None,
    views: Annotated[
        int | None, typer.Option(min=1, help="Slightly shifted and zoomed variants per photo.")
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option("--flip/--no-flip", help="Mirror every second view; wrong for whatever carries text."),
    ] = None,
    probe_every: Annotated[
        int | None,
        typer.Option(min=1, help="Steps between two measurements of the drift, which steer λ."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the job and return at once.")] = False,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """Train an adapter on a subject's photos, with live progress.

    The bar shows the loss, the drift against its budget, the penalty
    strength λ that the controller has found, and the largest spectral norm σ.
    Ctrl-C stops the bar, not the job.

    \b
    mooring train rex
    mooring train rex --preset conservative --steps 600
    mooring train rex --adapter rex-free --method none
    mooring train rex --budget 0.03 --detach
    """
    with errors_shown(), connect(server, state_dir, base=base) as client:
        job = client.train(
            subject,
            adapter_id=adapter,
            method=method.value,
            preset=preset or "",
            drift_budget=budget,
            fixed_strength=strength,
            steps=steps,
            rank=rank,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            targets=targets or "",
            learn_embedding=embedding,
            framing=framing or "",
            views=views,
            flip=flip,
            probe_every=probe_every,
        )
        if detach:
            _detached(job, as_json=as_json, embedded=not server)
            return
        done = follow(client, job, f"{short(job.train.subject)} ({method})", quiet=as_json)
        made = client.get_adapter(done.adapter)
        if as_json:
            print_json({"job": message_dict(done), "adapter": message_dict(made)})
            return
        seconds = done.end_time.ToDatetime() - done.start_time.ToDatetime()
        drift = f", drift {made.drift.value:.3f}" if made.HasField("drift") else ""
        limit = f" of {made.drift_budget:.3f}" if made.HasField("drift_budget") else ""
        out.print(f"adapter [bold]{short(made.name)}[/] in {duration(seconds.total_seconds())}{drift}{limit}")
        out.print(
            f'next: mooring generate "a photo of {escape(made.placeholder)} {escape(made.class_noun)} …" '
            f"--adapter {short(made.name)}",
            style="dim",
            soft_wrap=True,
        )


def _detached(job: job_pb2.Job, *, as_json: bool, embedded: bool) -> None:
    if as_json:
        print_json(message_dict(job))
        return
    out.print(f"job [bold]{short(job.name)}[/]")
    out.print(f"follow it: mooring jobs watch {short(job.name)}", style="dim")
    if embedded:
        out.print("it runs while a server runs on the state directory: mooring serve", style="dim")


def follow(client: mooring.Client, job: job_pb2.Job, label: str, *, quiet: bool = False) -> job_pb2.Job:
    """Show a job's progress to its end and return it; Ctrl-C leaves the job alone and says how to go on."""
    try:
        with job_progress(label, quiet=quiet) as show:
            return client.wait(job, on_event=show)
    except KeyboardInterrupt:
        err.print(
            f"the job goes on while its server runs; follow it with: mooring jobs watch {short(job.name)}\n"
            f"or stop it with: mooring jobs cancel {short(job.name)}"
        )
        raise


def _scaled(adapters: Sequence[str], scale: float | None) -> tuple[list[str], list[float | None]]:
    """Names and scales of "NAME[:SCALE]"."""
    names: list[str] = []
    scales: list[float | None] = []
    for text in adapters:
        name, separator, number = text.partition(":")
        try:
            scales.append(float(number) if separator else scale)
        except ValueError:
            raise typer.BadParameter(f"{number!r} is no scale; write NAME or NAME:0.8.") from None
        if name in names:
            raise typer.BadParameter(f"{name} is given twice.")
        names.append(name)
    return names, scales


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")],
    *,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="NAME[:SCALE]",
            help='Adapter, "rex", "rex@2" or "rex:0.8"; up to 4 of them. Default: the base.',
        ),
    ] = None,
    directory: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the PNG files.")
    ] = Path(),
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Images to draw.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the first image; image i uses seed + i.")] = 0,
    scale: Annotated[
        float | None, typer.Option(help="Scale of adapters given without one, 0 (the base) to 2.")
    ] = None,
    negative: Annotated[str | None, typer.Option(metavar="PROMPT", help="What to keep away from.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the server's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance, 1 is off.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. Default: the base's native size.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. Default: the base's native size.")] = None,
    sampler: Annotated[
        SamplerName | None,
        typer.Option(metavar="SAMPLER", help="ddim (default), euler, euler_ancestral, dpmpp_2m."),
    ] = None,
    previews: Annotated[
        int | None, typer.Option(metavar="STEPS", min=0, help="Save how it looks every so many steps, too.")
    ] = None,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """Draw images and save them as PNG files; the same request gives the same images.

    \b
    mooring generate "a photo of a red car in the snow"
    mooring generate "a photo of <rex> dog on the beach" --adapter rex --count 4 --out pictures
    mooring generate "a photo of <rex> dog at night" -a rex@2 --seed 7 --scale 0.8 --previews 5
    mooring generate "<rex> dog beside a <cup> mug" -a rex -a cup:0.7
    """
    import mooring

    names, scales = _scaled(adapter or [], scale)
    more = zip(names[1:], scales[1:], strict=True)

    directory.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"
    files: list[tuple[Image, Path]] = []
    done: Done | None = None
    status = err.status("waiting …")
    with errors_shown(), connect(server, state_dir, base=base) as client, status:
        for event in client.generate(
            prompt,
            adapter=names[0] if names else "",
            adapter_scale=scales[0] if names else scale,
            more_adapters={name: 1.0 if at is None else at for name, at in more},
            negative_prompt=negative,
            steps=steps,
            guidance_scale=guidance,
            width=width,
            height=height,
            seed=seed,
            count=count,
            sampler=sampler or "",
            preview_interval=previews,
        ):
            if isinstance(event, mooring.Queued):
                status.update(f"waiting, {event.position} requests before this one")
            elif isinstance(event, mooring.Progress):
                status.update(f"step {event.step} of {event.steps}")
                for picture in event.previews:
                    picture.save(directory / f"{stem}-{seed + picture.index}-step{event.step:03}.png")
            elif isinstance(event, mooring.Image):
                files.append((event, event.save(directory / f"{stem}-{event.seed}.png")))
            else:
                done = event
    if as_json:
        print_json(
            {
                "images": [
                    {"seed": i.seed, "path": str(p), "width": i.width, "height": i.height} for i, p in files
                ],
                "adapter": done.adapter if done else "",
                "adapter_digest": done.adapter_digest if done else "",
                "more_adapters": dict(done.more_adapters) if done else {},
                "base_digest": done.base_digest if done else "",
                "seconds": done.total_seconds if done else None,
                "unknown_words": list(done.unknown_words) if done else [],
                "withheld": list(done.withheld) if done else [],
            }
        )
        return
    for image, path in files:
        out.print(f"{escape(str(path))}  seed {image.seed}", soft_wrap=True)
    if done:
        by = " and ".join(short(name) for name in (done.adapter, *done.more_adapters)) or "the base"
        out.print(f"{done.images} by {by} in {done.total_seconds:.1f} s", style="dim")
        if done.withheld:
            kinds = ", ".join(sorted({v.category for v in done.safety if not v.allowed}))
            err.print(f"{len(done.withheld)} withheld by the content policy ({kinds})", style="yellow")
        if done.unknown_words:
            words = ", ".join(escape(word) for word in done.unknown_words)
            err.print(f"this base was not trained on: {words}", style="yellow", soft_wrap=True)


def evaluate(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="What to evaluate. Without it: the base alone.")
    ] = "",
    *,
    subject: Annotated[
        str, typer.Option(metavar="SUBJECT", help="Whose photos to compare with. Default: the adapter's own.")
    ] = "",
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts, one a line; {} stands for the subject.",
            dir_okay=False,
            exists=True,
        ),
    ] = None,
    generic_prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts that the adapter should leave as they are.",
            dir_okay=False,
            exists=True,
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=16, help="Seeds 0 to this, exclusive, for every prompt.")
    ] = 1,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the server's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance.")] = None,
    directory: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Download report and pictures to this folder."),
    ] = None,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """Measure an adapter: likeness, prompts followed, drift from the base. Start with the base alone.

    \b
    mooring evaluate --subject rex                  the base alone, to compare with
    mooring evaluate rex
    mooring evaluate rex@2 --seeds 4 --out report
    """
    if not adapter and not subject:
        raise fail(
            "Say what to evaluate.",
            "Name an adapter (mooring evaluate rex), or a subject for the base alone (--subject rex).",
            code=2,
        )
    with errors_shown(), connect(server, state_dir, base=base) as client:
        job = client.evaluate(
            adapter,
            subject=subject,
            prompts=prompt_lines(prompts),
            generic_prompts=prompt_lines(generic_prompts),
            seeds=range(seeds),
            steps=steps,
            guidance_scale=guidance,
        )
        done = follow(client, job, f"evaluating {adapter or 'the base'}", quiet=as_json)
        evaluation = client.get_evaluation(done)
        if directory is not None:
            download(client, done, directory)
    if as_json:
        print_json(message_dict(evaluation))
        return
    show_evaluation(evaluation)
    if directory is not None:
        out.print(f"report and pictures: {escape(str(directory))}", soft_wrap=True)


METRICS = {
    "clip_t": "prompts followed (CLIP-T, up)",
    "clip_i": "likeness (CLIP-I, up)",
    "dino": "likeness (DINO, up)",
    "pres": "class taken over (PRES, down)",
    "div": "variety (DIV, up)",
    "generic_clip_t": "other prompts followed (CLIP-T, up)",
}
"""The figures of an evaluation in the order they are shown, with what they mean."""


def show_evaluation(evaluation: evaluation_pb2.Evaluation) -> None:
    """Print an evaluation's figures beside the base's."""
    found = {metric.name: metric for metric in evaluation.metrics}
    rows = []
    for name, meaning in METRICS.items():
        if name not in found:
            continue
        metric = found[name]
        interval = f"{metric.low:.3f} to {metric.high:.3f}" if metric.HasField("low") else ""
        beside = found.get(f"base_{name}")
        rows.append([meaning, f"{metric.value:.3f}", interval, f"{beside.value:.3f}" if beside else ""])
    if evaluation.HasField("drift"):
        d = evaluation.drift
        rows.append(["drift from the base (down)", f"{d.value:.3f}", f"{d.low:.3f} to {d.high:.3f}", "0"])
    table(["", short(evaluation.adapter) or "base", "95 % interval", "base"], rows, empty="no figures")


def download(client: mooring.Client, job: job_pb2.Job, directory: Path) -> None:
    """Write a job's artifacts below a folder, and its figures as evaluation.json."""
    for artifact in job.artifacts:
        path = directory / artifact.filename
        if directory.resolve() not in path.resolve().parents:  # a server's word is not a path to trust
            raise fail(f"The server named an artifact {artifact.filename!r} outside the folder.", code=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(client.download_artifact(job, artifact.filename))
    directory.mkdir(parents=True, exist_ok=True)
    figures = message_dict(client.get_evaluation(job))
    (directory / "figures.json").write_text(
        json.dumps(figures, indent=2, ensure_ascii=False), encoding="utf-8"
    )
