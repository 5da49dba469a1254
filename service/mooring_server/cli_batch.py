"""`mooring batch`: a file of rows in, a folder of images and a manifest out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mooring_server.cli_options import BaseOption, JsonOption, ServerOption, StateDirOption
from mooring_server.cli_output import err, errors_shown, message_dict, out, print_json, short
from mooring_server.cli_server import connect


def batch(
    rows: Annotated[
        Path | None,
        typer.Argument(metavar="FILE.jsonl", help="One JSON object a line; left out with --resume."),
    ] = None,
    *,
    directory: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for images and manifest.jsonl.")
    ] = Path("batch"),
    detach: Annotated[
        bool, typer.Option("--detach", help="Queue the job, print its name and do not wait for it.")
    ] = False,
    resume: Annotated[
        str, typer.Option(metavar="JOB", help="Go on downloading an earlier job into the folder.")
    ] = "",
    server: ServerOption = "",
    state_dir: StateDirOption = None,
    base: BaseOption = "",
    as_json: JsonOption = False,
) -> None:
    """Draw every row of a file, at low priority, as one job.

    A row has "prompt" and, as wanted, "id", "negative_prompt", "adapter" ("rex",
    "rex@2", "rex@live"), "adapter_scale", "more_adapters", "steps",
    "guidance_scale", "width", "height", "seed" and "sampler". Every line is
    checked before anything is queued. Ctrl-C leaves the job to the server.

    \b
    mooring batch catalogue.jsonl --out pictures
    mooring batch catalogue.jsonl --detach
    mooring batch --resume 1f3a9c --out pictures
    """
    if (rows is None) == (not resume):
        raise typer.BadParameter("Name a file, or an earlier job by --resume.")
    with errors_shown(), connect(server, state_dir, base=base) as client:
        job = client.get_job(resume) if rows is None else client.run_batch(rows)
        if detach:
            if as_json:
                print_json(message_dict(job))
            else:
                out.print(
                    f"batch [bold]{short(job.name)}[/]: {job.batch.row_count} rows; fetch it with: "
                    f"mooring batch --resume {short(job.name)} --out {directory}",
                    soft_wrap=True,
                )
            return
        try:
            _fetch(client, job, directory)
        except KeyboardInterrupt:
            err.print(
                f"the job goes on while its server runs; fetch the rest with: "
                f"mooring batch --resume {short(job.name)} --out {directory}"
            )
            raise
        ended = client.wait(job)
    if as_json:
        print_json(message_dict(ended))
        return
    result = ended.batch_result
    out.print(f"{result.image_count} images, {result.failed_count} rows with an error, in {directory}/")
    out.print(f"manifest {result.manifest_digest}", style="dim", soft_wrap=True)


def _fetch(client: object, job: object, directory: Path) -> None:
    """Save rows as they come, under a progress bar."""
    from mooring import Client
    from mooring.v1 import job_pb2
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    assert isinstance(client, Client)
    assert isinstance(job, job_pb2.Job)
    columns = (
        TextColumn("drawing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", style="red"),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        bar = progress.add_task("", total=job.batch.row_count)
        failed = 0
        for row in client.save_batch(job, directory):
            if "error" in row.manifest:
                failed += 1
                fault = row.manifest["error"]
                progress.console.print(f"row {row.row}: {fault['reason']}: {fault['message']}", markup=False)
            progress.update(
                bar, completed=row.position, description=f"{failed} with an error" if failed else ""
            )
