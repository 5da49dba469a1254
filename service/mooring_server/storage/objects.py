"""Objects: immutable-by-key bytes (photos, checkpoints, adapters, evaluation results).

One protocol with a local-folder implementation; a bucket implements the same five methods. Keys are made by
the server from its own ids (never from what a user typed) and are still checked here, because this is the
last place before the file system.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_TEMPORARY = ".tmp-"  # no key segment can begin with a dot


class ObjectStore(Protocol):
    """Where bytes live."""

    def put(self, key: str, data: bytes) -> None:
        """Store `data` under `key`, durably and all at once; replaces what was there."""

    def get(self, key: str) -> bytes:
        """The bytes under `key`. Raises KeyError when there are none."""

    def exists(self, key: str) -> bool:
        """Whether `key` holds bytes."""

    def delete(self, key: str) -> None:
        """Remove `key`; a missing one is no error."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys that begin with `prefix`, in ascending order."""


def check_key(key: str) -> str:
    """Return `key` if it is a relative path of plain segments.

    Raises:
        ValueError: for anything that could leave the store's root or clash with its temporary files.
    """
    if not all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
        raise ValueError(f"not an object key: {key!r}")
    return key


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
        """The bytes under `key`. Raises KeyError when there are none."""
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise KeyError(key) from None

    def exists(self, key: str) -> bool:
        """Whether `key` holds bytes."""
        return self._path(key).is_file()

    def delete(self, key: str) -> None:
        """Remove `key` if it is there."""
        path = self._path(key)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            path.unlink()
            _sync_folder(path.parent)

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys that begin with `prefix`, in ascending order."""
        # Only the folder part of the prefix bounds the walk; the rest filters.
        folder = prefix.rpartition("/")[0]
        start = self._path(folder) if folder else self.root
        keys = (
            path.relative_to(self.root).as_posix()
            for path in start.rglob("*")
            if path.is_file() and not path.name.startswith(_TEMPORARY)
        )
        yield from sorted(key for key in keys if key.startswith(prefix))

    def remove_leftovers(self) -> int:
        """Remove temporary files of processes that died while writing; returns how many.

        Only for a folder that no other process is writing to (the embedded server at start).
        """
        leftovers = list(self.root.rglob(f"{_TEMPORARY}*"))
        for path in leftovers:
            path.unlink(missing_ok=True)
        return len(leftovers)

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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
