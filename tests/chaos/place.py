"""What a storm rages over: a database, objects, and the notes of what was asked for and answered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mooring_server.storage.objects import LocalObjects, ObjectStore
from mooring_server.storage.store import Store
from servers import S3

T = TypeVar("T")
TENANT = "acme"
RIGHTS = {"basis": "OWNED", "statement": "own work"}


@dataclass(frozen=True)
class Place:
    """Where everything is; workers get a copy of their own.

    Attributes:
        folder: of the notes and the workers' logs; nothing of the service is in there.
        url: of the database.
        root: folder of the objects; "" where they are in a bucket.
        bucket: the bucket.
        prefix: below which the objects are in it.
    """

    folder: Path
    url: str
    root: str = ""
    bucket: S3 | None = None
    prefix: str = ""

    def store(self, clock: Callable[[], float] | None = None) -> Store:
        """The database, opened anew."""
        return Store(self.url, clock=clock)

    def objects(self) -> ObjectStore:
        """The objects, opened anew."""
        return LocalObjects(self.root) if self.bucket is None else self.bucket.objects(self.prefix)

    @property
    def notes(self) -> Path:
        """JSON Lines of workers: ``{"begin": op, "number", "given"}`` and later ``{"done": …}``."""
        return self.folder / "notes"

    def said(self) -> list[dict[str, Any]]:
        """The notes so far."""
        text = self.notes.read_text() if self.notes.exists() else ""
        # a last line without its end is being written just now
        return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]

    def unanswered(self) -> list[dict[str, Any]]:
        """Requests that nobody has heard the answer of: a caller repeats them."""
        said = self.said()
        begun = {note["number"]: note for note in said if "begin" in note}
        for note in said:
            if "done" in note:
                begun.pop(note["number"], None)
        return list(begun.values())


def pages(method: Callable[..., tuple[list[T], str]], *arguments: Any, **options: Any) -> Iterator[T]:
    """Everything that a listing has."""
    token = ""
    while True:
        found, token = method(*arguments, page_size=1000, page_token=token, **options)
        yield from found
        if not token:
            return
