"""`mooring keys`: API keys, made and closed in the server's database.

Not through the server: whoever can write its database already rules it, and the first key has to come from
somewhere. It works while the server runs, which sees the change at its next call.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mooring_server.cli_options import JsonOption, StateDirOption
from mooring_server.cli_output import EXIT_CODE_HELP, err, errors_shown, fail, print_json, table
from mooring_server.cli_server import read_settings, resolve_state_dir
from mooring_server.config import TENANT, Role

if TYPE_CHECKING:
    from pathlib import Path

    from mooring_server.storage.keys import ApiKey
    from mooring_server.storage.store import Store

keys = typer.Typer(help="API keys: create, list, revoke. Needs the server's database.", no_args_is_help=True)

_UNITS = {"m": 60.0, "h": 3600.0, "d": 86_400.0}
_COLUMNS = ("id", "tenant", "role", "label", "created", "expires", "state")


@contextmanager
def _store(state_dir: Path | None) -> Iterator[Store]:
    """The database of the settings."""
    settings = read_settings(state_dir=resolve_state_dir(state_dir))
    from mooring_server.storage.store import Store

    store = Store(settings.storage_url)
    try:
        yield store
    finally:
        store.close()


@keys.command("create", epilog=EXIT_CODE_HELP)
def keys_create(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="Whose work the key is for.")],
    *,
    role: Annotated[Role, typer.Option(help="What it may do; docs/security.md has the table.")] = Role.USER,
    label: Annotated[str, typer.Option(metavar="TEXT", help="What it is for, to be listed.")] = "",
    expires: Annotated[
        str, typer.Option(metavar="TIME", help="When it ends, from now: 90d, 12h, 30m. Default: never.")
    ] = "",
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it, this once: only its hash is kept.

    \b
    mooring keys create acme
    mooring keys create acme --role admin --label "release pipeline" --expires 90d
    export MOORING_API_KEY=$(mooring keys create acme)
    """
    if not TENANT.fullmatch(tenant):
        raise fail(
            f"{tenant!r} is not a tenant's name.",
            "Use 1 to 63 lower-case letters, digits and hyphens, such as acme or acme-2.",
            code=2,
        )
    expire_time = None if not expires else time.time() + _seconds(expires)
    with errors_shown(), _store(state_dir) as store:
        key, secret = store.create_key(tenant, role.value, label=label, expire_time=expire_time)
    if as_json:
        print_json({**_document(key), "key": secret})
        return
    typer.echo(secret)
    err.print(f"key {key.key_id} of {tenant}, {role.value}, expires {_time(expire_time)}; shown this once")


@keys.command("list", epilog=EXIT_CODE_HELP)
def keys_list(
    *,
    tenant: Annotated[str, typer.Option(metavar="TENANT", help="Only this tenant's.")] = "",
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """List keys, newest first, without their secrets."""
    with errors_shown(), _store(state_dir) as store:
        found = store.list_keys(tenant)
    if as_json:
        print_json([_document(key) for key in found])
        return
    rows = [
        (
            key.key_id,
            key.tenant,
            key.role,
            key.label,
            _time(key.create_time),
            _time(key.expire_time),
            _state(key),
        )
        for key in found
    ]
    table(_COLUMNS, rows, empty="No keys. Make one with: mooring keys create TENANT")


@keys.command("revoke", epilog=EXIT_CODE_HELP)
def keys_revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, as listed.")],
    *,
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Close a key: the next call with it is refused; calls that run go on to their end."""
    with errors_shown(), _store(state_dir) as store:
        key = store.revoke_key(key_id)
    if as_json:
        print_json(_document(key))
        return
    err.print(f"key {key.key_id} of {key.tenant} is revoked")


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([1-9][0-9]{0,5})([mhd])", text)
    if match is None:
        raise fail(f"--expires {text!r} is not a length of time.", "Write 90d, 12h or 30m.", code=2)
    return int(match[1]) * _UNITS[match[2]]


def _state(key: ApiKey) -> str:
    if key.revoke_time is not None:
        return "revoked"
    return "expired" if key.expire_time is not None and key.expire_time <= time.time() else "valid"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def _document(key: ApiKey) -> dict[str, Any]:
    times = {
        name: None if value is None else datetime.fromtimestamp(value, UTC).isoformat()
        for name, value in (
            ("create_time", key.create_time),
            ("expire_time", key.expire_time),
            ("revoke_time", key.revoke_time),
        )
    }
    described = {"id": key.key_id, "tenant": key.tenant, "role": key.role, "label": key.label}
    return {**described, "state": _state(key), **times}
