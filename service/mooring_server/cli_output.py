"""What the command line prints: errors in one line with a remedy, tables, JSON, a job's live progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from mooring_server.errors import Code, StorageUnavailableError
from mooring_server.errors import MooringError as ServerError

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from mooring.types import JobEvent

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

EXIT_CODES = {
    "usage or invalid argument": 2,
    "not found": 3,
    "wrong state (no photos, other base, name taken)": 4,
    "server away, busy or too slow": 5,
    "job failed or cancelled": 6,
    "no valid credential, or not allowed": 7,
    "interrupted": 130,
    "anything else": 1,
}
EXIT_CODE_HELP = (
    "Exit codes: 0 done, " + ", ".join(f"{code} {what}" for what, code in EXIT_CODES.items()) + "."
)

_BY_CLIENT_ERROR = {
    "InvalidArgumentError": 2,
    "OutOfRangeError": 2,
    "NotFoundError": 3,
    "FailedPreconditionError": 4,
    "AlreadyExistsError": 4,
    "UnavailableError": 5,
    "DeadlineExceededError": 5,
    "ResourceExhaustedError": 5,
    "JobFailedError": 6,
    "UnauthenticatedError": 7,
    "PermissionDeniedError": 7,
}
_BY_SERVER_CODE = {
    Code.INVALID_ARGUMENT: 2,
    Code.OUT_OF_RANGE: 2,
    Code.NOT_FOUND: 3,
    Code.FAILED_PRECONDITION: 4,
    Code.ALREADY_EXISTS: 4,
    Code.UNAVAILABLE: 5,
    Code.RESOURCE_EXHAUSTED: 5,
}


def fail(message: str, remedy: str = "", *, code: int = 1) -> typer.Exit:
    """Print an error and return the exit to raise."""
    err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    if remedy:
        err.print(f"  [cyan]→[/] {escape(remedy)}", soft_wrap=True)
    return typer.Exit(code)


@contextmanager
def errors_shown() -> Iterator[None]:
    """Turn typed errors into a line, a remedy and an exit code; a defect still shows its traceback."""
    try:
        yield
    except ServerError as error:
        shown = fail(*_words(error), code=_BY_SERVER_CODE.get(error.code, 1))
        _violations(error.fields)
        raise shown from None
    except KeyboardInterrupt:
        err.print("interrupted")
        raise typer.Exit(130) from None
    except Exception as error:
        # imported here, because gRPC and the stubs take longer than the help text needs
        from mooring.errors import MooringError, UnavailableError

        if not isinstance(error, MooringError):
            raise
        message, remedy = error.message, error.remedy
        if isinstance(error, UnavailableError) and not error.reason:
            # the channel's own words name sockets and file descriptors
            message = "The server cannot be reached."
            remedy = "Start one with `mooring serve`, or leave --server out to have one started."
        shown = fail(message, remedy, code=_BY_CLIENT_ERROR.get(type(error).__name__, 1))
        _violations(error.fields)
        raise shown from None


def _words(error: ServerError) -> tuple[str, str]:
    """Message and remedy; of storage that a command opened itself also what that said, in one line."""
    cause = getattr(error.__cause__, "orig", None)
    if not isinstance(error, StorageUnavailableError) or cause is None:
        return error.message, error.remedy
    said = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    return f"{error.message} {said}", "Check MOORING_DATABASE_URL, and that the database runs."


def _violations(fields: Iterable[Any]) -> None:
    for violation in fields:
        err.print(f"    {escape(violation.field)}: {escape(violation.description)}", soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on standard output, indented for a person when that is a terminal."""
    sys.stdout.write(json.dumps(value, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False) + "\n")


def print_event(event: JobEvent) -> None:
    """One event of a job as a JSON line, without previews."""
    values = {f.name: getattr(event, f.name) for f in fields(event) if f.name not in {"job", "previews"}}
    values = {name: value for name, value in values.items() if value not in {None, ""}}
    if event.job is not None:
        values["job"] = message_dict(event.job)
    sys.stdout.write(json.dumps(values, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def message_dict(message: Message) -> dict[str, Any]:
    """A protobuf message as JSON values under its proto field names."""
    from google.protobuf.json_format import MessageToDict

    values: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return values


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """A plain table, or a line that says why there is none."""
    if not rows:
        out.print(empty, style="dim")
        return
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        grid.add_column(column, overflow="fold" if i else "ellipsis", no_wrap=not i)
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    out.print(grid)


def short(name: str) -> str:
    """The last part of a resource name: what commands take."""
    return name.rsplit("/", 1)[-1]


def local_time(stamp: Any) -> str:
    """A protobuf timestamp in local time, "" when unset."""
    if not stamp.seconds:
        return ""
    return str(stamp.ToDatetime(tzinfo=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S"))


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def figures(event: JobEvent) -> str:
    """Loss, drift against its budget, λ and σ_max of an event, as far as it has them."""
    parts = []
    if event.loss is not None:
        parts.append(f"loss {event.loss:.3f}")
    if event.drift is not None:
        budget = f"/{event.drift_budget:.3f}" if event.drift_budget is not None else ""
        parts.append(f"drift {event.drift:.3f}{budget}")
    if event.strength is not None:
        parts.append(f"λ {event.strength:.1e}")
    if event.sigma_max is not None:
        parts.append(f"σ {event.sigma_max:.2f}")
    return "  ".join(parts)


class _Left(ProgressColumn):
    """The server's own estimate of the time left."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        return Text(f"{duration(left)} left" if left is not None else "", style="cyan")


@contextmanager
def job_progress(label: str, *, quiet: bool = False) -> Iterator[Callable[[JobEvent], None]]:
    """Show a job's events: a bar on a terminal, a line per tenth of a phase elsewhere, nothing when quiet."""
    if quiet:
        yield lambda event: None  # noqa: ARG005
        return
    if not err.is_terminal:
        yield _lines(label)
        return
    bar = Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[figures]}"),
        _Left(),
        console=err,
        transient=False,
    )
    with bar:
        task = bar.add_task(f"{label} waiting", total=1, figures="", left=None)

        def show(event: JobEvent) -> None:
            if event.job is not None:
                return
            bar.update(
                task,
                description=f"{label} {event.phase}",
                total=max(event.steps, 1),
                completed=event.step,
                figures=figures(event),
                left=event.seconds_left,
            )

        yield show


def _lines(label: str) -> Callable[[JobEvent], None]:
    last = ("", -1)

    def show(event: JobEvent) -> None:
        nonlocal last
        if event.job is not None:
            return
        mark = (event.phase, 10 * event.step // max(event.steps, 1))
        if mark != last:
            last = mark
            left = f"  {duration(event.seconds_left)} left" if event.seconds_left is not None else ""
            err.print(
                f"{label} {event.phase} {event.step}/{event.steps}  {figures(event)}{left}", soft_wrap=True
            )

    return show
