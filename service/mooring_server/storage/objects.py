"""Objects: bytes under keys (photos, checkpoints, adapters, evaluation results).

One protocol with two implementations: a local folder (here) and a bucket (`buckets.py`). Keys are made by the
server from its own ids (never from what a user typed) and are still checked here, because this is the last
place before the file system.

What is written once has a key that names its content (`content_key`), and is compared with it at every read:
neither a size nor a time stamp nor an ETag is believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mooring_server.errors import MooringError, Reason, StorageUnavailableError

log = logging.getLogger(__name__)

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_CONTENT = re.compile(r"\.(?P<sha256>[0-9a-f]{64})\.[a-z0-9]+")
_TEMPORARY = ".tmp-"  # no key segment can begin with a dot


@dataclass(frozen=True)
class ObjectEntry:
    """One object as a listing shows it.

    Attributes:
        key: its key.
        size: bytes, as the store says.
        modified: when it was written, in seconds since the epoch by the store's clock.
    """

    key: str
    size: int
    modified: float


class ObjectStore(Protocol):
    """Where bytes live.

    Every method may raise STORAGE_UNAVAILABLE: the store is away, refuses, is full, or does not keep what it
    is given. Repeating the call later is right for all of them.
    """

    def put(self, key: str, data: bytes) -> None:
        """Store `data` under `key`, durably and all at once; replaces what was there."""

    def get(self, key: str) -> bytes:
        """The bytes under `key`.

        Raises:
            KeyError: there are none.
            MooringError: OBJECT_DAMAGED when they are not the ones that the key names.
        """

    def exists(self, key: str) -> bool:
        """Whether `key` holds bytes."""

    def delete(self, key: str) -> None:
        """Remove `key`; a missing one is no error."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys that begin with `prefix`, in ascending order."""

    def entries(self, prefix: str = "") -> Iterator[ObjectEntry]:
        """The same with sizes and times."""


def check_key(key: str) -> str:
    """Return `key` if it is a relative path of plain segments.

    Raises:
        ValueError: for anything that could leave the store's root or clash with its temporary files.
    """
    if not all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
        raise ValueError(f"not an object key: {key!r}")
    return key


def content_key(stem: str, data: bytes, suffix: str) -> str:
    """A key for bytes that are written once: ``<stem>.<SHA-256 of data>.<suffix>``.

    The collector of unused objects (`gc.py`) relies on a key not being used again after its object was
    removed, so the stem holds an id that is new: of the upload, the job, the lease.
    """
    return check_key(f"{stem}.{hashlib.sha256(data).hexdigest()}.{suffix}")


def needed(objects: ObjectStore, key: str) -> bytes:
    """The bytes that a row names. Raises OBJECT_DAMAGED also where there are none."""
    try:
        return objects.get(key)
    except KeyError:
        raise MooringError(
            Reason.OBJECT_DAMAGED,
            f"The stored object {key} is gone.",
            remedy="Restore it from a backup, unless what it belongs to was deleted just now.",
        ) from None


def first_written(objects: ObjectStore, stem: str) -> bytes | None:
    """What was written first under a `content_key` of that stem; None for nothing that is whole.

    Several writers of one stem mean that one was taken for dead and went on: who came first is who counts.
    """
    for entry in sorted(objects.entries(f"{stem}."), key=lambda entry: (entry.modified, entry.key)):
        try:
            return objects.get(entry.key)
        except KeyError:  # deleted since it was listed
            continue
        except MooringError as error:
            if error.reason is not Reason.OBJECT_DAMAGED:
                raise
            log.warning("%s is passed over: %s", entry.key, error.message)
    return None


def intact(key: str, data: bytes) -> bool:
    """Whether `data` is what `key` names; true where a key names no content."""
    named = _CONTENT.search(key[-80:])
    if named is None or not key.endswith(named.group()):
        return True
    return hashlib.sha256(data).hexdigest() == named["sha256"]


def require_intact(key: str, data: bytes) -> bytes:
    """Return `data` if it is what `key` names. Raises OBJECT_DAMAGED."""
    if not intact(key, data):
        raise MooringError(
            Reason.OBJECT_DAMAGED,
            f"The stored object {key} is not the one that was written.",
            remedy="Restore it from a backup; make what it belongs to again where there is none.",
        )
    return data


class LocalObjects:
    """Objects as files under one folder.

    `put` writes a temporary file beside the target, fsyncs it, renames it and fsyncs the folder: after a
    crash a key holds the old bytes or the new ones, never a part.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)

    def put(self, key: str, data: bytes) -> None:
        """Store `data` under `key`, durably and all at once."""
        path = self._path(key)
        with _typed():
            self._make_folders(path.parent)
            descriptor, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)  # noqa: PTH105 - the pair with mkstemp's string path
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)  # noqa: PTH108
                raise
            _sync_folder(path.parent)

    def get(self, key: str) -> bytes:
        """The bytes under `key`. Raises KeyError when there are none, OBJECT_DAMAGED when they are others."""
        try:
            with _typed():
                data = self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise KeyError(key) from None
        return require_intact(key, data)

    def exists(self, key: str) -> bool:
        """Whether `key` holds bytes."""
        with _typed():
            return self._path(key).is_file()

    def delete(self, key: str) -> None:
        """Remove `key` if it is there."""
        path = self._path(key)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError), _typed():
            path.unlink()
            _sync_folder(path.parent)

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys that begin with `prefix`, in ascending order."""
        return (entry.key for entry in self.entries(prefix))

    def entries(self, prefix: str = "") -> Iterator[ObjectEntry]:
        """Keys, sizes and times, in ascending order of keys."""
        # Only the folder part of the prefix bounds the walk; the rest filters.
        folder = prefix.rpartition("/")[0]
        start = self._path(folder) if folder else self.root
        with _typed():
            found = sorted(
                (path.relative_to(self.root).as_posix(), path)
                for path in start.rglob("*")
                if not path.name.startswith(_TEMPORARY) and path.is_file()
            )
        for key, path in found:
            if not key.startswith(prefix):
                continue
            with contextlib.suppress(FileNotFoundError), _typed():  # deleted while we were listing
                status = path.stat()
                yield ObjectEntry(key, status.st_size, status.st_mtime)

    def remove_leftovers(self, older_than: float = 0.0) -> int:
        """Remove temporary files of processes that died while writing; returns how many.

        Args:
            older_than: seconds; younger ones may belong to a write under way.
        """
        removed = 0
        with _typed():
            for path in self.root.rglob(f"{_TEMPORARY}*"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime >= older_than:
                        path.unlink()
                        removed += 1
        return removed

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _make_folders(self, folder: Path) -> None:
        """Create `folder` and make each new entry durable in its parent."""
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for new in reversed(missing):
            new.mkdir(exist_ok=True)
            _sync_folder(new.parent)


@contextlib.contextmanager
def _typed() -> Iterator[None]:
    """Disk full, I/O errors and refused access as STORAGE_UNAVAILABLE; a missing file stays what it is."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise
    except OSError as error:
        log.warning("the object folder fails: %s", error)
        raise StorageUnavailableError(f"The object folder fails: {error.strerror}.") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
