"""`mooring subjects`, `mooring adapters` and `mooring jobs`: what a server holds."""

from __future__ import annotations

import textwrap
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from mooring_server import cli_gate
from mooring_server.cli_options import (
    AdapterArgument,
    BaseOption,
    JsonOption,
    ServerOption,
    StateDirOption,
    photo_files,
)
from mooring_server.cli_output import (
    errors_shown,
    fail,
    figures,
    job_progress,
    local_time,
    message_dict,
    out,
    print_event,
    print_json,
    short,
    table,
)
from mooring_server.cli_server import connect

if TYPE_CHECKING:
    import mooring
    from mooring.v1 import adapter_pb2, job_pb2

subjects = typer.Typer(
    help="The things to learn: a few photos, a class noun, a placeholder.", no_args_is_help=True
)
adapters = typer.Typer(
    help="What training yields: list, show, publish, roll back, export, import, delete.", no_args_is_help=True
)
jobs = typer.Typer(help="Trainings and evaluations: list, show, watch, cancel.", no_args_is_help=True)

SubjectArgument = Annotated[str, typer.Argument(metavar="SUBJECT", help="The subject's id.")]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, or its first digits.")]
PhotosArgument = Annotated[
    list[Path], typer.Argument(metavar="PHOTO", help="JPEG, PNG or WebP files, or folders of them.")
]


class Rights(StrEnum):
    """By what right photos may be used for training."""

    OWNED = "owned"
    LICENSED = "licensed"
    CONSENT = "consent"
    PUBLIC_DOMAIN = "public_domain"


# -- subjects ------------------------------------------------------------------------------------------


@subjects.command("create")
def subjects_create(
    subject: SubjectArgument,
    photos: Annotated[
        list[Path] | None, typer.Argument(metavar="PHOTO", help="Photos, or folders of photos.")
    ] = None,
    *,
    class_noun: Annotated[
        str, typer.Option("--class", metavar="NOUN", help='What it is, in plain words: "dog", "coffee mug".')
    ],
    rights: Annotated[
        Rights,
        typer.Option(
            metavar="BASIS",
            help="By what right the photos may be used: owned, licensed, consent, public_domain.",
        ),
    ],
    statement: Annotated[str, typer.Option(help="Free text for the record, such as a contract number.")] = "",
    placeholder: Annotated[
        str, typer.Option(metavar="WORD", help='Word that stands for it in prompts. Default: "<SUBJECT>".')
    ] = "",
    name: Annotated[str, typer.Option(help="Name to show to people.")] = "",
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """Create a subject, with photos or without.

    \b
    mooring subjects create rex ./rex-photos --class dog --rights owned
    mooring subjects create mug a.jpg b.jpg --class "coffee mug" --rights licensed
    """
    files = photo_files(photos or [])
    with errors_shown(), connect(server, state_dir, base=base) as client:
        made = client.create_subject(
            subject,
            class_noun=class_noun,
            rights=rights.value,
            statement=statement,
            placeholder=placeholder,
            display_name=name,
            photos=files,
        )
        if as_json:
            print_json(message_dict(made))
        else:
            out.print(
                f"subject [bold]{short(made.name)}[/]: {made.photo_count} photos, {escape(made.class_noun)}, "
                f"in prompts [bold]{escape(made.placeholder)}[/]"
            )
            what = (
                f"mooring train {short(made.name)}"
                if made.photo_count
                else (f"mooring subjects upload {short(made.name)} PHOTO...")
            )
            out.print(f"next: {what}", style="dim")


@subjects.command("upload")
def subjects_upload(
    subject: SubjectArgument,
    photos: PhotosArgument,
    *,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """Add photos to a subject; all are stored, or none when one is bad.

    \b
    mooring subjects upload rex more/*.jpg
    """
    files = photo_files(photos)
    with errors_shown(), connect(server, state_dir, base=base) as client:
        answer = client.upload_photos(subject, files)
        if as_json:
            print_json(message_dict(answer))
        else:
            known = len(answer.photos) - answer.added_count
            out.print(
                f"{answer.added_count} photos added"
                + (f", {known} were already there" if known else "")
                + f"; {short(answer.subject.name)} has {answer.subject.photo_count}"
            )


@subjects.command("list")
def subjects_list(
    *,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """List the subjects, newest first."""
    with errors_shown(), connect(server, state_dir, base=base) as client:
        found = list(client.list_subjects())
    if as_json:
        print_json([message_dict(s) for s in found])
        return
    table(
        ["subject", "class", "placeholder", "photos", "created"],
        [
            [short(s.name), s.class_noun, s.placeholder, str(s.photo_count), local_time(s.create_time)]
            for s in found
        ],
        empty="no subjects yet: mooring subjects create --help",
    )


@subjects.command("show")
def subjects_show(
    subject: SubjectArgument,
    *,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show a subject and its photos."""
    from mooring.types import enum_word
    from mooring.v1 import subject_pb2

    with errors_shown(), connect(server, state_dir, base=base) as client:
        found = client.get_subject(subject)
    if as_json:
        print_json(message_dict(found))
        return
    rights = enum_word(subject_pb2.RightsDeclaration.Basis, found.rights.basis)
    out.print(f"[bold]{short(found.name)}[/]  {escape(found.display_name)}")
    out.print(f"class {escape(found.class_noun)}, in prompts [bold]{escape(found.placeholder)}[/]")
    out.print(f"rights {rights} {escape(found.rights.statement)}".rstrip())
    table(
        ["photo", "size", "bytes", "sha256"],
        [[p.filename, f"{p.width}×{p.height}", f"{p.size_bytes:,}", p.sha256[:16]] for p in found.photos],
        empty="no photos",
    )


@subjects.command("delete")
def subjects_delete(
    subject: SubjectArgument,
    *,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
) -> None:
    """Delete a subject and its photos; adapters trained on it stay."""
    with errors_shown(), connect(server, state_dir, base=base) as client:
        client.delete_subject(subject)
    out.print(f"deleted subject {escape(subject)}")


# -- adapters ------------------------------------------------------------------------------------------


@adapters.command("list")
def adapters_list(
    *,
    deleted: Annotated[
        bool, typer.Option("--deleted", help="Those that were deleted too: their tombstones.")
    ] = False,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """List all adapter versions, newest first."""
    with errors_shown(), connect(server, state_dir, base=base) as client:
        found = list(client.list_adapters(show_deleted=deleted))
    if as_json:
        print_json([message_dict(a) for a in found])
        return
    gone = ["deleted"] if deleted else []
    table(
        ["adapter", "alias", "in prompts", "method", "rank", "drift", "budget", "size", "created", *gone],
        [
            [
                short(a.name),
                ", ".join(a.aliases),
                a.placeholder,
                a.method,
                str(a.rank),
                f"{a.drift.value:.3f}" if a.HasField("drift") else "",
                f"{a.drift_budget:.3f}" if a.HasField("drift_budget") else "",
                f"{a.size_bytes / 1024:.0f} KiB",
                local_time(a.create_time),
                *([local_time(a.delete_time)] if deleted else []),
            ]
            for a in found
        ],
        empty="no adapters yet: mooring train --help",
    )


@adapters.command("show")
def adapters_show(
    adapter: AdapterArgument,
    *,
    layers: Annotated[int, typer.Option(min=0, help="Layers of the certificate to show, largest first.")] = 5,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show an adapter version, its certificate and what the gate decided about it.

    \b
    mooring adapters show rex
    mooring adapters show rex@live
    mooring adapters show rex@2 --json
    """
    with errors_shown(), connect(server, state_dir, base=base) as client:
        found = client.get_adapter(adapter)
    if as_json:
        print_json(message_dict(found))
        return
    out.print(f"[bold]{short(found.name)}[/]  {found.method}, rank {found.rank}, {found.size_bytes:,} bytes")
    placeholder = escape(found.placeholder)
    if found.HasField("source"):
        out.print(
            f"from    {_origin(found)}" + (f", in prompts [bold]{placeholder}[/]" if placeholder else "")
        )
    else:
        out.print(
            f"subject {short(found.subject)} ({escape(found.class_noun)}), in prompts [bold]{placeholder}[/]"
        )
    if found.aliases:
        out.print(f"alias   [bold]{escape(', '.join(found.aliases))}[/]")
    out.print(f"digest  {found.digest}")
    out.print(f"base    {found.base_digest}")
    if found.HasField("drift"):
        d = found.drift
        budget = f", budget {found.drift_budget:.3f}" if found.HasField("drift_budget") else ""
        out.print(f"drift   {d.value:.4f} (95 % interval {d.low:.4f} to {d.high:.4f}{budget}), measured")
    elif found.HasField("source"):
        out.print(NOT_MEASURED.format(adapter=short(found.name)))
    certificate = found.certificate
    if certificate.layers:
        out.print(
            f"σ_max   {certificate.sigma_max:.4f}, at most {certificate.relative_max:.4f} of its base layer; "
            f"{len(certificate.layers)} layers, exact"
        )
        largest = sorted(certificate.layers, key=lambda x: -x.relative)[:layers]
        table(
            ["layer", "σ_max", "of base", "Frobenius", "stable rank"],
            [
                [
                    x.layer,
                    f"{x.sigma_max:.4f}",
                    f"{x.relative:.4f}",
                    f"{x.frobenius:.4f}",
                    f"{x.stable_rank:.2f}",
                ]
                for x in largest
            ],
            empty="",
        )
    if found.HasField("gate_decision"):
        out.print()
        cli_gate.print_decision(found.gate_decision)


adapters.command("publish")(cli_gate.publish)
adapters.command("rollback")(cli_gate.rollback)
adapters.command("unpublish")(cli_gate.unpublish)
adapters.command("aliases")(cli_gate.aliases)
adapters.add_typer(cli_gate.gate, name="gate")


class ExportFormat(StrEnum):
    """File formats of an exported adapter."""

    NATIVE = "native"
    DIFFUSERS = "diffusers"


@adapters.command("export")
def adapters_export(
    adapter: AdapterArgument,
    *,
    directory: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write to.")] = Path(),
    file_format: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="diffusers: for load_lora_weights (default); native: Mooring's safetensors.",
        ),
    ] = ExportFormat.DIFFUSERS,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """Write an adapter version as files that other tools load.

    \b
    mooring adapters export rex --out rex-lora
    """
    with errors_shown(), connect(server, state_dir, base=base) as client:
        files = client.export_adapter(adapter, file_format=file_format.value)
    directory.mkdir(parents=True, exist_ok=True)
    for filename, data in files.items():
        (directory / Path(filename).name).write_bytes(data)
    if as_json:
        print_json({name: str(directory / Path(name).name) for name in files})
        return
    for filename, data in files.items():
        out.print(f"{escape(str(directory / Path(filename).name))}  {len(data):,} bytes", soft_wrap=True)


@adapters.command("import")
def adapters_import(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="Safetensors files, or the folder that a tool saved."),
    ],
    *,
    adapter: Annotated[str, typer.Option("--id", metavar="ADAPTER", help="Adapter to publish a version of.")],
    rights: Annotated[
        Rights,
        typer.Option(
            metavar="BASIS",
            help="By what right it may be used: owned, licensed, consent, public_domain.",
        ),
    ],
    statement: Annotated[str, typer.Option(help="Free text for the record, such as where it is from.")] = "",
    class_noun: Annotated[
        str, typer.Option("--class", metavar="NOUN", help="What its subject is, in plain words.")
    ] = "",
    placeholder: Annotated[
        str, typer.Option(metavar="WORD", help="Word of its learned embeddings. Default: the file's.")
    ] = "",
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """Publish an adapter that another tool made: diffusers, PEFT, kohya.

    \b
    mooring adapters import rex.safetensors --id rex --rights owned
    mooring adapters import peft-folder/ --id rex --rights licensed --class dog
    """
    with errors_shown(), connect(server, state_dir, base=base) as client:
        made = client.import_adapter(
            adapter,
            files,
            rights=rights.value,
            statement=statement,
            class_noun=class_noun,
            placeholder=placeholder,
        )
    if as_json:
        print_json(message_dict(made))
        return
    out.print(
        f"adapter [bold]{short(made.name)}[/]: {_origin(made)}, rank {made.rank}, "
        f"{len(made.certificate.layers)} layers, σ_max {made.certificate.sigma_max:.4f}"
        + (f", in prompts [bold]{escape(made.placeholder)}[/]" if made.placeholder else "")
    )
    out.print(NOT_MEASURED.format(adapter=short(made.name)), style="dim")


NOT_MEASURED = "drift   not measured: mooring evaluate {adapter} --subject SUBJECT"
"""Of an adapter that was not trained here."""


def _origin(adapter: adapter_pb2.Adapter) -> str:
    """Where an imported adapter came from, in a phrase."""
    from mooring.types import enum_word
    from mooring.v1 import adapter_pb2 as pb
    from mooring.v1 import subject_pb2

    source = adapter.source
    kind = enum_word(pb.SourceFormat, source.format).replace("_", " ")
    basis = enum_word(subject_pb2.RightsDeclaration.Basis, source.rights.basis).replace("_", " ")
    files = escape(", ".join(source.filenames))
    return f"{kind} file {files} ({basis} {escape(source.rights.statement)}".rstrip() + ")"


@adapters.command("delete")
def adapters_delete(
    adapter: AdapterArgument,
    *,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
) -> None:
    """Delete one version ("rex@2"), or all versions of an adapter ("rex").

    A version that an alias points to is kept: publish another, roll back or
    unpublish first. Numbers of deleted versions are not given again.
    """
    with errors_shown(), connect(server, state_dir, base=base) as client:
        client.delete_adapter(adapter)
    out.print(f"deleted adapter {escape(adapter)}")


# -- jobs ------------------------------------------------------------------------------------------


def job_subject(job: job_pb2.Job) -> str:
    """What a job is about, in one phrase."""
    if job.WhichOneof("spec") == "train":
        from mooring.types import enum_word
        from mooring.v1 import training_pb2

        method = enum_word(training_pb2.TrainingMethod, job.train.config.method)
        return f"{short(job.train.subject)} → {job.train.adapter_id} ({method})"
    return short(job.evaluate.adapter) or f"base on {short(job.evaluate.subject)}"


COLUMNS = ["job", "state", "what", "progress or result", "created"]


def job_row(job: job_pb2.Job) -> list[str]:
    """A job as a table row."""
    from mooring.types import enum_word
    from mooring.v1 import job_pb2 as pb

    state = enum_word(pb.JobState, job.state)
    progress = (
        f"{job.progress.phase} {job.progress.step}/{job.progress.steps}" if job.HasField("progress") else ""
    )
    return [
        short(job.name)[:SHORT_ID],
        state + (" (cancelling)" if job.cancel_requested and state == "running" else ""),
        f"{enum_word(pb.JobKind, job.kind)} {job_subject(job)}",
        progress
        if state == "running"
        else short(job.adapter) or textwrap.shorten(job.error.message, 48, placeholder=" …"),
        local_time(job.create_time),
    ]


SHORT_ID = 8
"""Digits of a job's id that are shown, and enough to name it."""


def full_job(client: mooring.Client, job: str) -> str:
    """The full id of a job that is named by its first digits."""
    if "/" in job or len(job) >= 32:
        return job
    found = [short(j.name) for j in client.list_jobs() if short(j.name).startswith(job)]
    if len(found) > 1:
        raise fail(f"{len(found)} jobs start with {job!r}.", "Give more digits of the id.", code=2)
    return found[0] if found else job


class Kind(StrEnum):
    """Kinds of jobs."""

    TRAIN = "train"
    EVALUATE = "evaluate"


class State(StrEnum):
    """States of jobs."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@jobs.command("list")
def jobs_list(
    *,
    kind: Annotated[Kind | None, typer.Option(help="Only this kind.")] = None,
    state: Annotated[State | None, typer.Option(help="Only this state.")] = None,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """List jobs, newest first.

    \b
    mooring jobs list --state running
    """
    with errors_shown(), connect(server, state_dir, base=base) as client:
        found = list(client.list_jobs(kind=kind or "", state=state or ""))
    if as_json:
        print_json([message_dict(j) for j in found])
        return
    table(
        COLUMNS,
        [job_row(j) for j in found],
        empty="no jobs" if kind or state else "no jobs yet: mooring train --help",
    )


@jobs.command("show")
def jobs_show(
    job: JobArgument,
    *,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show a job: what was asked for, where it stands, what it made."""
    from mooring.types import progress_event

    with errors_shown(), connect(server, state_dir, base=base) as client:
        found = client.get_job(full_job(client, job))
    if as_json:
        print_json(message_dict(found))
        return
    table(COLUMNS, [job_row(found)], empty="")
    if found.HasField("progress"):
        out.print(figures(progress_event(0, found.progress)))
    if found.error.message:
        out.print(f"[red]{escape(found.error.message)}[/]", soft_wrap=True)
    table(
        ["artifact", "type", "bytes"],
        [[a.filename, a.media_type, f"{a.size_bytes:,}"] for a in found.artifacts],
        empty="",
    )


@jobs.command("watch")
def jobs_watch(
    job: JobArgument,
    *,
    after: Annotated[int, typer.Option(metavar="SEQUENCE", help="Go on after this event.")] = 0,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """Follow a job to its end; a lost connection is taken up again.

    \b
    mooring jobs watch 01hx3
    mooring jobs watch 01hx3 --json | jq .drift       # one JSON line per event
    """
    from mooring.client import succeeded

    with errors_shown(), connect(server, state_dir, base=base) as client:
        watched = client.get_job(full_job(client, job))
        with job_progress(job_subject(watched), quiet=as_json) as show:
            for event in client.watch(watched, after_sequence=after):
                show(event)
                if as_json:
                    print_event(event)
        ended = succeeded(client.get_job(watched))
        if not as_json:
            out.print(f"succeeded {short(ended.adapter)}".strip())


@jobs.command("cancel")
def jobs_cancel(
    job: JobArgument,
    *,
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
) -> None:
    """Ask a job to stop; a running one stops at its next step."""
    from mooring.types import enum_word
    from mooring.v1 import job_pb2 as pb

    with errors_shown(), connect(server, state_dir, base=base) as client:
        found = client.cancel_job(full_job(client, job))
    out.print(f"{escape(job)}: {enum_word(pb.JobState, found.state)}, asked to stop")
