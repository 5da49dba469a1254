"""Adapter files on a local disk, in front of an object store that is elsewhere.

A file's name is the digest of its key and the digest of its bytes: look-ups come by key, so one tenant's
never meets another's file, and a file that does not have the bytes its name says is deleted and fetched
anew. Files are written under a temporary name, fsynced and renamed; the folder is not fsynced, as a rename
lost in a crash is only a miss. The order of use is in the files' modification times and survives restarts.
One process uses a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from mooring_server.engine.tiers.lru import ByteLru
from mooring_server.engine.tiers.observer import TierObserver, Unobserved

_NAME = re.compile(r"(?P<key>[0-9a-f]{64})-(?P<content>[0-9a-f]{64})")
_TEMPORARY = ".tmp-"
_log = structlog.get_logger(__name__)


@dataclass
class _File:
    """One file; `path` is None while it is being written."""

    path: Path | None = None


class DiskCache:
    """Least recently used files of a folder, up to a number of bytes. Thread-safe; blocking.

    A disk that fails costs hits, never a request: errors are logged and the file counts as absent.

    Args:
        folder: made when it is missing; files of other names in it are left alone.
        budget: bytes of all files.
        observer: receives the numbers of the tier "disk".
    """

    def __init__(self, folder: Path, budget: int, observer: TierObserver | None = None) -> None:
        self._folder = folder
        self._observer = observer or Unobserved()
        self._lock = threading.Lock()
        self._files: ByteLru[_File] = ByteLru(budget)
        folder.mkdir(parents=True, exist_ok=True)
        self._read_folder()

    @property
    def held_bytes(self) -> int:
        """Of all files, those being written included."""
        return self._files.bytes

    def get(self, key: str) -> bytes | None:
        """The bytes kept under `key`, verified; None when there are none."""
        name = _digest(key.encode())
        with self._lock:
            file = self._files.find(name)
            path = None if file is None else file.path
        data = None if file is None or path is None else self._verified(name, file, path)
        self._observer.tier_lookup("disk", hit=data is not None)
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keep bytes under a key, which never gets others; nothing where they are kept or too large."""
        name = _digest(key.encode())
        with self._lock:
            if len(data) > self._files.budget or self._files.find(name) is not None:
                return
            file = _File()
            evicted = self._files.add(name, file, len(data), pinned=True)
        self._unlink(evicted)
        path = self._folder / f"{name}-{_digest(data)}"
        try:
            self._write(path, data)
        except OSError as error:
            _log.warning("adapter_disk_cache_write_failed", error=str(error))
            self._drop(name, file)
            return
        with self._lock:
            removed = self._files.find(name) is not file
            if not removed:
                file.path = path
                evicted = self._files.unpin(name)
        if removed:  # while it was being written
            self._delete(path)
        else:
            self._unlink(evicted)
        self._tell_bytes()

    def remove(self, key: str) -> None:
        """Delete what is kept under `key`."""
        with self._lock:
            file = self._files.remove(_digest(key.encode()))
        if file is not None and file.path is not None:
            self._delete(file.path)
        self._tell_bytes()

    def _verified(self, name: str, file: _File, path: Path) -> bytes | None:
        began = time.perf_counter()
        try:
            data = path.read_bytes()
            if path.name == f"{name}-{_digest(data)}":
                now = time.time_ns()
                os.utime(path, ns=(now, now))
                self._observer.tier_loaded("disk", time.perf_counter() - began)
                return data
            _log.warning("adapter_disk_cache_file_damaged", file=path.name)
        except FileNotFoundError:
            pass  # evicted a moment ago, or deleted by hand
        except OSError as error:
            _log.warning("adapter_disk_cache_read_failed", error=str(error))
        if self._drop(name, file):
            self._delete(path)
        return None

    def _write(self, path: Path, data: bytes) -> None:
        temporary = self._folder / f"{_TEMPORARY}{path.name}"
        try:
            with temporary.open("wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            now = time.time_ns()  # the kernel's own stamps are too coarse to order by
            os.utime(temporary, ns=(now, now))
            temporary.rename(path)
        except BaseException:
            self._delete(temporary)
            raise

    def _drop(self, name: str, file: _File) -> bool:
        """Forget a file; False when another one, or none, is kept under its name by now."""
        with self._lock:
            current = self._files.find(name) is file
            if current:
                self._files.remove(name)
        self._tell_bytes()
        return current

    def _unlink(self, evicted: list[_File]) -> None:
        for file in evicted:
            if file.path is not None:
                self._delete(file.path)
        if evicted:
            self._observer.tier_evicted("disk", len(evicted))

    def _delete(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

    def _tell_bytes(self) -> None:
        self._observer.tier_bytes("disk", self._files.bytes)

    def _read_folder(self) -> None:
        found = []
        for path in self._folder.iterdir():
            if path.name.startswith(_TEMPORARY):
                self._delete(path)
            elif match := _NAME.fullmatch(path.name):
                status = path.stat()
                found.append((status.st_mtime_ns, match["key"], path, status.st_size))
        for _, name, path, size in sorted(found):
            before = self._files.remove(name)
            if before is not None and before.path is not None:
                self._delete(before.path)
            self._unlink(self._files.add(name, _File(path), size))
        self._tell_bytes()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
