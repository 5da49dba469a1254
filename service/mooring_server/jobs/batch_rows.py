"""Rows of a batch: as they are pinned when the job is made, and as lines of the manifest when they are done.

A pinned row is complete: every default is filled in and every adapter has its version, so that what a row
gives depends on nothing but the row and the base. A line of the manifest holds nothing of the run (no times,
no attempts, no names of jobs) but the digest of the image's file, whose provenance mark has a time: equal
files give manifests that differ in `sha256` and `size_bytes` alone, however often a run was interrupted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from mooring_server.errors import MooringError
from mooring_server.storage.models import Document

MANIFEST = "manifest.jsonl"
_FILENAME = re.compile(r"images/([0-9]{6,9})\.png")


@dataclass(frozen=True)
class PinnedAdapter:
    """An adapter version and how strongly it acts."""

    adapter: str
    version: int
    digest: str
    scale: float

    @property
    def name(self) -> str:
        """``<adapter>@<version>``."""
        return f"{self.adapter}@{self.version}"


@dataclass(frozen=True)
class PinnedRow:
    """One image to draw.

    Attributes:
        row: number of its line in the file, from 1.
        id: the caller's name for it; "" for none.
    """

    row: int
    id: str
    prompt: str
    negative_prompt: str
    adapters: tuple[PinnedAdapter, ...]
    steps: int
    guidance_scale: float
    width: int
    height: int
    seed: int
    sampler: str

    @staticmethod
    def from_json(document: Document) -> PinnedRow:
        """A row from its JSON form."""
        adapters = tuple(PinnedAdapter(**item) for item in document["adapters"])
        return PinnedRow(**{**document, "adapters": adapters})


def dump_rows(rows: Iterable[PinnedRow]) -> bytes:
    """Rows as JSON Lines."""
    return b"".join(_line(asdict(row)) for row in rows)


def load_rows(data: bytes) -> list[PinnedRow]:
    """Rows from JSON Lines."""
    return [PinnedRow.from_json(json.loads(line)) for line in data.splitlines()]


def manifest_of(row: PinnedRow, base_digest: str) -> Document:
    """What the manifest says of a row whatever comes of it."""
    document: Document = {"row": row.row}
    if row.id:
        document["id"] = row.id
    return document | {
        "prompt": row.prompt,
        "negative_prompt": row.negative_prompt,
        "adapters": [{"adapter": use.name, "digest": use.digest, "scale": use.scale} for use in row.adapters],
        "base_digest": base_digest,
        "seed": row.seed,
        "steps": row.steps,
        "guidance_scale": row.guidance_scale,
        "sampler": row.sampler,
        "width": row.width,
        "height": row.height,
    }


def error_document(error: MooringError) -> Document:
    """What the manifest says of a row's error."""
    return {"reason": str(error.reason), "message": error.message, "remedy": error.remedy}


def dump_manifest(records: Sequence[Document]) -> bytes:
    """The manifest: one line a row, in the order of the file."""
    return b"".join(_line(record) for record in sorted(records, key=lambda record: record["row"]))


def filename_of(row: int) -> str:
    """Name of a row's image among the job's files."""
    return f"images/{row:06d}.png"


def row_of(filename: str) -> int | None:
    """The row whose image has this name; None when the name is none of an image."""
    match = _FILENAME.fullmatch(filename)
    return int(match[1]) if match and filename_of(int(match[1])) == filename else None


def image_key(job_id: str, row: int, sha256: str) -> str:
    """Where a row's image is stored.

    Named after its contents too: a runner that lost its lease without noticing writes beside its successor's
    image, never over it.
    """
    return f"jobs/{job_id}/artifacts/images/{row:06d}.{sha256}.png"


def rows_stem(job_id: str) -> str:
    """What the key of a job's pinned rows begins with; see `objects.content_key`."""
    return f"jobs/{job_id}/rows"


def _line(document: Document) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
