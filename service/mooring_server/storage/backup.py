"""A copy of a SQLite database and its objects, taken while the server runs, and the way back.

Rows and objects change while they are copied, so the order matters. Objects are copied, then the database is
(SQLite's own online backup: one snapshot), then the objects that are new since. What a row of the snapshot
names existed at that moment; only what was written after the first pass and deleted before the second can be
missing, and then snapshot and second pass are made again. A backup's folder has its name only when it is
complete and verified.

Left out: PostgreSQL, whose own tools do it better (docs/operations.md); increments: a file system or a tool
such as restic finds unchanged files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import make_url

from mooring_server.errors import MooringError, Reason
from mooring_server.storage.objects import LocalObjects, ObjectStore, intact

_FORMAT = 1
_MANIFEST, _DATABASE, _OBJECTS = "manifest.json", "mooring.db", "objects"
_ROUNDS = 5
_NEEDED = "SELECT object_key FROM photos UNION SELECT object_key FROM adapters WHERE delete_time IS NULL"


@dataclass(frozen=True)
class Backup:
    """What a backup holds.

    Attributes:
        objects: how many.
        size: their bytes and the database's.
    """

    objects: int
    size: int


def backup(url: str, objects: ObjectStore, target: Path) -> Backup:
    """Copy everything into a new folder.

    Args:
        url: of the SQLite database; its server may run.
        objects: what belongs to it.
        target: the folder to make.

    Raises:
        MooringError: INVALID_FIELD for another database or a folder that exists; OBJECT_DAMAGED;
            STORAGE_UNAVAILABLE.
    """
    source = _database_file(url)
    if target.exists():
        raise _invalid(f"{target} exists.", "Name a new folder: a backup never replaces another one.")
    if not source.is_file():
        raise _invalid(f"There is no database {source}.", "Name the state directory of a server.")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy = LocalObjects(partial / _OBJECTS)
    digests: dict[str, str] = {}
    _copy_new(objects, copy, digests)
    for _ in range(_ROUNDS):
        _snapshot(source, partial / _DATABASE)
        _copy_new(objects, copy, digests)
        missing = _needed(partial / _DATABASE) - digests.keys()
        if not missing:
            break
    else:
        raise MooringError(
            Reason.OBJECT_DAMAGED,
            f"{len(missing)} objects that rows name are missing, for example {min(missing)}.",
            remedy="Restore them, or delete what they belong to; then make the backup again.",
        )
    database = (partial / _DATABASE).read_bytes()
    manifest = {"format": _FORMAT, "database": _sha256(database), "objects": digests}
    _write(partial / _MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
    partial.rename(target)
    _sync(target.parent)
    size = sum(entry.size for entry in LocalObjects(target / _OBJECTS).entries())
    return Backup(len(digests), size + len(database))


def restore(source: Path, url: str, objects: ObjectStore) -> Backup:
    """Put a backup in the place of nothing: neither the database nor any object may exist.

    The database comes last, so that a restore that was cut off leaves none and can be repeated.

    Raises:
        MooringError: INVALID_FIELD when there is no backup or something is there; OBJECT_DAMAGED.
    """
    target = _database_file(url)
    try:
        manifest = json.loads((source / _MANIFEST).read_bytes())
    except (OSError, ValueError):
        raise _invalid(f"{source} is no complete backup.", "Name what `mooring backup` made.") from None
    if manifest["format"] != _FORMAT:
        raise _invalid(f"{source} has format {manifest['format']}.", "Use the version that made it.")
    if target.exists():
        raise _invalid(f"{target} exists.", "Restore into an empty state directory.")
    held, size = LocalObjects(source / _OBJECTS), 0
    for key, digest in manifest["objects"].items():
        try:
            data = held.get(key)
        except KeyError:
            data = b""
        if _sha256(data) != digest:
            raise _damaged(source / _OBJECTS / key)
        objects.put(key, data)
        size += len(data)
    database = (source / _DATABASE).read_bytes()
    if _sha256(database) != manifest["database"]:
        raise _damaged(source / _DATABASE)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.restoring")
    _write(temporary, database)
    temporary.rename(target)
    _sync(target.parent)
    return Backup(len(manifest["objects"]), size + len(database))


def _copy_new(objects: ObjectStore, copy: LocalObjects, digests: dict[str, str]) -> None:
    for key in objects.list():
        if key in digests and not _may_change(key):
            continue
        with contextlib.suppress(KeyError):  # deleted since it was listed
            data = objects.get(key)
            copy.put(key, data)
            digests[key] = _sha256(data)


def _may_change(key: str) -> bool:
    """Whether a key names no content: its bytes may be others by now."""
    return intact(key, b"")


def _needed(database: Path) -> set[str]:
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return {key for (key,) in connection.execute(_NEEDED)}


def _snapshot(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    with (
        contextlib.closing(sqlite3.connect(source)) as live,
        contextlib.closing(sqlite3.connect(target)) as copy,
    ):
        live.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a journal beside it
        if copy.execute("PRAGMA integrity_check").fetchone() != ("ok",):
            raise MooringError(
                Reason.OBJECT_DAMAGED,
                f"The database {source} is damaged.",
                remedy="Restore the newest backup that is whole.",
            )


def _database_file(url: str) -> Path:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        raise _invalid(
            "Only a SQLite database is copied by this command.",
            "For PostgreSQL use pg_dump and a copy of the bucket, as docs/operations.md says.",
        )
    return Path(parsed.database)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _invalid(message: str, remedy: str) -> MooringError:
    return MooringError(Reason.INVALID_FIELD, message, remedy=remedy)


def _damaged(path: Path) -> MooringError:
    return MooringError(
        Reason.OBJECT_DAMAGED,
        f"{path} is not what was backed up.",
        remedy="Restore another backup; nothing refers to what was restored so far.",
    )
