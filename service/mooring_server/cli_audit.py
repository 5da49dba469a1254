"""`mooring audit …`: read and verify the audit log in the database itself, without a server."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mooring_server.cli_options import JsonOption, StateDirOption
from mooring_server.cli_output import EXIT_CODE_HELP, errors_shown, fail, out, print_json
from mooring_server.cli_server import resolve_state_dir
from mooring_server.cli_storage import DatabaseOption

if TYPE_CHECKING:
    from mooring_server.storage.audit import AuditEntry, Head
    from mooring_server.storage.store import Store

audit = typer.Typer(
    no_args_is_help=True,
    help="Read the audit log, and check that nobody changed it; without a server.",
    epilog=EXIT_CODE_HELP,
)

TenantOption = Annotated[str, typer.Option("--tenant", help="Only this tenant's entries.")]


@audit.command()
def verify(
    *,
    expect: Annotated[
        list[str] | None,
        typer.Option(
            "--expect",
            metavar="NUMBER:HASH",
            help="A head recorded elsewhere (log lines `audit_head`); the log must contain it. Repeatable.",
        ),
    ] = None,
    database_url: DatabaseOption = "",
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every entry's hash, and that none is missing or out of order.

    An entry that was edited, deleted, inserted or moved is found, and a log
    that was cut. Who may write to the database could cut the log and set its
    head back, or compute everything anew: a head that was recorded elsewhere
    (--expect) finds that too.

    \b
    mooring audit verify
    mooring audit verify --expect 1204:sha256:9f86d081884c7d65…
    """
    from mooring_server.storage.audit import Head

    expected = []
    for text in expect or ():
        try:
            expected.append(Head.parse(text))
        except ValueError as error:
            raise fail(str(error), "Copy it from a log line of event audit_head.", code=2) from None
    with _store(database_url, state_dir) as store:
        verdict = store.verify_audit(expected=expected)
    if as_json:
        print_json(
            {"intact": verdict.intact, "head": _head_document(verdict.head), "problem": verdict.problem}
        )
    elif verdict.intact:
        out.print(f"intact: {verdict.head.number} entries; head {verdict.head}", soft_wrap=True)
    if not verdict.intact:
        raise fail(
            f"The audit log was changed: {verdict.problem}.",
            f"It holds up to entry {verdict.head.number}; see docs/runbooks.md, MooringAuditChainBroken.",
            code=1,
        )


@audit.command()
def tail(
    *,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the newest.")] = 20,
    tenant: TenantOption = "",
    database_url: DatabaseOption = "",
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the newest entries, oldest of them first.

    \b
    mooring audit tail
    mooring audit tail -n 100 --tenant acme --json
    """
    with _store(database_url, state_dir) as store:
        entries = list(store.audit_entries(tenant=tenant, last=lines))
    if as_json:
        print_json([dataclasses.asdict(entry) for entry in entries])
        return
    for entry in entries:
        out.print(_line(entry), soft_wrap=True, highlight=False, markup=False)
    if not entries:
        out.print("no entries")


@audit.command()
def export(
    *,
    out_file: Annotated[Path, typer.Option("--out", help="JSON Lines file to write.", dir_okay=False)],
    tenant: TenantOption = "",
    after: Annotated[int, typer.Option("--after", min=0, help="Only entries with a larger number.")] = 0,
    database_url: DatabaseOption = "",
    state_dir: StateDirOption = None,
) -> None:
    """Write entries as JSON Lines, one entry with all its fields per line.

    Without --tenant and --after the file is the whole chain: each line's
    `hash` is sha256 over its other fields as JSON with sorted keys and no
    spaces, and `previous_hash` is the line before.

    \b
    mooring audit export --out audit.jsonl
    mooring audit export --out acme.jsonl --tenant acme
    """
    partial = out_file.with_name(out_file.name + ".partial")
    count = 0
    with _store(database_url, state_dir) as store, partial.open("w", encoding="utf-8") as file:
        for entry in store.audit_entries(tenant=tenant, after=after):
            file.write(json.dumps(dataclasses.asdict(entry), sort_keys=True) + "\n")
            count += 1
    partial.replace(out_file)
    out.print(f"{count} entries in {out_file}", soft_wrap=True)


@contextmanager
def _store(database_url: str, state_dir: Path | None) -> Iterator[Store]:
    from sqlalchemy.exc import ArgumentError

    from mooring_server.storage.store import Store

    folder = resolve_state_dir(state_dir)
    if not database_url and not (folder / "mooring.db").is_file():
        raise fail(f"There is no database in {folder}.", "Give --state-dir or --database-url.", code=3)
    with errors_shown():
        try:
            store = Store(database_url or f"sqlite:///{folder / 'mooring.db'}")
        except (ValueError, ArgumentError) as error:
            raise fail(str(error), "Give postgresql://user@host/name or sqlite:///path.", code=2) from None
        try:
            yield store
        finally:
            store.close()


def _line(entry: AuditEntry) -> str:
    when = datetime.fromtimestamp(entry.time, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    detail = " ".join(text for text in (entry.digests, entry.prompt_hash) if text)
    who = f"{entry.tenant} {entry.subject} ({entry.role})"
    return f"{entry.number} {when} {who} {entry.decision} {entry.method} {entry.resource} {detail}".rstrip()


def _head_document(head: Head) -> dict[str, object]:
    return {"number": head.number, "hash": head.hash}
