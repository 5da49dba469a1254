"""RunBatch: a file of rows in, a queued job out.

Everything that can be known is checked before the job exists: each line becomes the GenerateRequest that it
stands for and goes through the same checks. Adapters are looked up once a file, so that a version published
meanwhile cannot divide it, and loaded one combination at a time, so that a file with a thousand adapters
takes the memory of one.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

from mooring.v1 import personalization_pb2 as pb

from mooring_server.engine.model import SAMPLERS
from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.jobs.batch_job import queue_batch
from mooring_server.jobs.batch_rows import PinnedAdapter, PinnedRow
from mooring_server.jobs.photos import safe_filename
from mooring_server.rpc import generation, names
from mooring_server.rpc.runtime import Runtime, find_adapter
from mooring_server.rpc.transfer import IncomingFile
from mooring_server.storage.models import Job

MAX_LINE_BYTES = 64 * 1024
MAX_VIOLATIONS = 100
"""Faulty lines that are looked for; a file with more is not read further."""


async def receive(
    runtime: Runtime, tenant: str, messages: AsyncIterator[pb.RunBatchRequest], hold: Callable[[int], None]
) -> Job:
    """Take the upload and queue its job.

    Args:
        runtime: the server's parts.
        tenant: who sends.
        messages: the stream.
        hold: told how many bytes are held; see `HeldFiles.call`.

    Raises:
        MooringError: INVALID_FIELD, DIGEST_MISMATCH, BATCH_TOO_LARGE, BATCH_NOT_VALID with a violation per
            line, REQUEST_ID_REUSED, QUOTA_EXCEEDED, QUEUE_FULL.
    """
    settings: pb.BatchSettings | None = None
    file: IncomingFile | None = None
    async for message in messages:
        kind = message.WhichOneof("content")
        if kind == "settings":
            if settings is not None:
                raise _protocol("settings", "comes once, in the first message")
            settings = message.settings
            names.check_parent(tenant, settings.parent, "settings.parent")
            names.check_request_id(settings.request_id, "settings.request_id")
        elif settings is None:
            raise _protocol("settings", "must be in the first message")
        elif kind == "file":
            if file is not None:
                raise _protocol("file", "comes once")
            file = IncomingFile(message.file, 0, runtime.settings.max_batch_bytes, too_large=_too_large)
        elif kind == "chunk" and file is not None:
            file.add(message.chunk)
            hold(file.held_bytes)
        else:
            raise _protocol("content", "must be the file header, or a chunk after it")
    if settings is None:
        raise _protocol("settings", "must be in the first message")
    if file is None:
        raise _protocol("file", "is missing")
    return await runtime.long.run(tenant, _queue, runtime, tenant, settings.request_id, file)


def _queue(runtime: Runtime, tenant: str, request_id: str, file: IncomingFile) -> Job:
    """Blocking."""
    filename, data = safe_filename(file.header.filename), file.finish()
    asked = {"filename": filename, "sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    made_before = runtime.store.job_made_before(tenant, "batch", request_id, asked)
    if made_before is not None:
        return made_before
    generation.require_device_time(runtime, tenant)
    checker = _Checker(runtime, tenant)
    rows = checker.check(data)
    spec = {
        **asked,
        "rows": len(rows),
        "adapters": len({use.name for row in rows for use in row.adapters}),
        "base_digest": runtime.base.digest,
    }
    return queue_batch(
        runtime.store,
        runtime.objects,
        tenant,
        rows,
        spec,
        request_id=request_id,
        traceparent=runtime.tracing.traceparent(),
        audited=checker.audited,
        asked=asked,
    )


class _Checker:
    """Turns the lines of one file into pinned rows; collects what is wrong with them.

    Attributes:
        audited: entries of the audit log, one a row that can be drawn.
    """

    def __init__(self, runtime: Runtime, tenant: str) -> None:
        self._runtime, self._tenant = runtime, tenant
        self.audited: list[dict[str, Any]] = []
        self._found: dict[str, tuple[str, str, int] | MooringError] = {}
        self._violations: dict[int, list[FieldViolation]] = {}

    def check(self, data: bytes) -> list[PinnedRow]:
        """The rows in file order. Raises BATCH_TOO_LARGE, BATCH_NOT_VALID."""
        read: list[tuple[int, str, pb.GenerateRequest]] = []
        ids: dict[str, int] = {}
        limit = self._runtime.settings.max_batch_rows
        count = 0
        # one line at a time: a file of short lines would take many times its size when cut at once
        for number, line in enumerate(io.BytesIO(data), start=1):
            if not line.strip():
                continue
            count += 1
            if count > limit:
                raise MooringError(
                    Reason.BATCH_TOO_LARGE,
                    f"The file has more than {limit} rows.",
                    remedy="Split it into several batches.",
                    metadata={"limit": str(limit)},
                )
            try:
                row_id, request = self._parsed(line.removesuffix(b"\n"))
                if row_id and ids.setdefault(row_id, number) != number:
                    _wrong("id", f"{row_id!r} is the id of line {ids[row_id]} already")
                read.append((number, row_id, request))
            except MooringError as error:
                self._note(number, error)
        if not count:
            raise MooringError(
                Reason.BATCH_NOT_VALID,
                "The file has no rows.",
                remedy='Write one JSON object a line, for example {"prompt": "a red car in the snow"}.',
                fields=[FieldViolation("lines", "at least one is required")],
            )
        rows = self._pinned(read)
        if self._violations:
            raise self._combined(count)
        return rows

    def _parsed(self, line: bytes) -> tuple[str, pb.GenerateRequest]:
        document = _object(line)
        for name in document:
            if name not in _FIELDS:
                _wrong(name[:64], f"is no field of a row; there are {', '.join(_FIELDS)}")
        values = {name: _FIELDS[name](name, value) for name, value in document.items() if value is not None}
        row_id = values.pop("id", "")
        more = [
            pb.AdapterUse(
                adapter=self._versioned(f"more_adapters[{index}].adapter", use.get("adapter", "")),
                **{key: value for key, value in use.items() if key == "scale"},
            )
            for index, use in enumerate(values.pop("more_adapters", ()))
        ]
        if values.get("adapter"):
            values["adapter"] = self._versioned("adapter", values["adapter"])
        try:
            return row_id, pb.GenerateRequest(**values, more_adapters=more)
        except ValueError as error:  # an integer beyond the field's bits
            _wrong("", f"has a number that is too large ({error})")

    def _versioned(self, field: str, name: str) -> str:
        """The full name of the version that a name means, the same for all lines."""
        full = name if name.startswith("tenants/") or not name else f"tenants/{names.OWN}/adapters/{name}"
        if full not in self._found:
            try:
                record = find_adapter(self._runtime, names.resolve_adapter(self._tenant, full, field))
                versioned = names.adapter(self._tenant, record.name)
                self._found[full] = (versioned, record.adapter_id, record.version)
                self._found[versioned] = self._found[full]
            except MooringError as error:
                self._found[full] = error
        found = self._found[full]
        if isinstance(found, MooringError):
            _wrong(field, str(found), reason=found.reason)
        return found[0]

    def _pinned(self, read: list[tuple[int, str, pb.GenerateRequest]]) -> list[PinnedRow]:
        rows = []
        for number, row_id, request in sorted(read, key=lambda item: _adapters_of(item[2])):
            if len(self._violations) >= MAX_VIOLATIONS:
                break
            try:
                prepared = generation.prepare(self._runtime, self._tenant, request)
            except MooringError as error:
                self._note(number, error)
                continue
            self.audited.append(prepared.audited("allowed"))
            wanted, native = prepared.request, self._runtime.base.native_size
            uses = []
            for name, use in zip(prepared.adapters, wanted.adapters, strict=True):
                found = self._found[name]
                assert not isinstance(found, MooringError)
                uses.append(PinnedAdapter(found[1], found[2], use.weights.digest, use.scale))
            rows.append(
                PinnedRow(
                    row=number,
                    id=row_id,
                    prompt=wanted.prompt,
                    negative_prompt=wanted.negative_prompt,
                    adapters=tuple(uses),
                    steps=wanted.steps,
                    guidance_scale=wanted.guidance_scale,
                    width=wanted.width or native,
                    height=wanted.height or native,
                    seed=wanted.seed,
                    sampler=wanted.sampler,
                )
            )
        return sorted(rows, key=lambda row: row.row)

    def _note(self, number: int, error: MooringError) -> None:
        line = f"lines[{number}]"
        self._violations[number] = [
            FieldViolation(f"{line}.{fault.field}" if fault.field else line, fault.description)
            for fault in error.fields
        ] or [FieldViolation(line, str(error))]

    def _combined(self, count: int) -> MooringError:
        bad = sorted(self._violations)
        which = f"{len(bad)} of {count} rows" if len(bad) < MAX_VIOLATIONS else f"{len(bad)} rows or more"
        first = self._violations[bad[0]][0]
        return MooringError(
            Reason.BATCH_NOT_VALID,
            f"{which} cannot be used; the first is line {bad[0]}: {first.description}",
            remedy="Nothing was queued. Correct these lines and submit the file again.",
            metadata={"faulty_rows": str(len(bad))},
            fields=[fault for number in bad for fault in self._violations[number]],
        )


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        _wrong("", f"has {len(line)} bytes; at most {MAX_LINE_BYTES} are read")
    try:
        document = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _wrong("", f"is not JSON in UTF-8 ({str(error)[:120]})")
    if not isinstance(document, dict):
        _wrong("", 'is not a JSON object such as {"prompt": "a red car"}')
    return document


def _no_constant(text: str) -> NoReturn:
    message = f"{text} is no JSON number"
    raise ValueError(message)


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        _wrong(field, "must be a string")
    if not value.isprintable() and any(0xD800 <= ord(letter) < 0xE000 or letter == "\0" for letter in value):
        _wrong(field, "holds a character that is no text")
    return value


def _identifier(field: str, value: Any) -> str:
    if len(_text(field, value)) > 128:
        _wrong(field, "must have at most 128 characters")
    return str(value)


def _whole(field: str, value: Any) -> int:
    if type(value) is not int:
        _wrong(field, "must be a whole number")
    return value


def _natural(field: str, value: Any) -> int:
    if _whole(field, value) < 0:
        _wrong(field, "must not be negative")
    return int(value)


def _number(field: str, value: Any) -> float:
    try:
        number = float(value) if type(value) in {int, float} else math.nan
    except OverflowError:  # a whole number beyond every float
        number = math.inf
    if not math.isfinite(number):
        _wrong(field, "must be a number")
    return number


def _sampler(field: str, value: Any) -> int:
    word = _text(field, value).removeprefix("SAMPLER_").lower()
    if word not in SAMPLERS:
        _wrong(field, f"must be one of {', '.join(SAMPLERS)}, not {word[:64]!r}")
    number: int = pb.Sampler.Value(f"SAMPLER_{word.upper()}")
    return number


def _uses(field: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        _wrong(field, 'must be a list such as [{"adapter": "rex", "scale": 0.8}]')
    checks = {"adapter": _text, "scale": _number}
    found = []
    for index, use in enumerate(value):
        if not isinstance(use, dict) or not use.get("adapter") or set(use) - set(checks):
            _wrong(f"{field}[{index}]", 'must be an object such as {"adapter": "rex", "scale": 0.8}')
        found.append({key: checks[key](f"{field}[{index}].{key}", item) for key, item in use.items()})
    return found


_FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "id": _identifier,
    "prompt": _text,
    "negative_prompt": _text,
    "adapter": _text,
    "adapter_scale": _number,
    "more_adapters": _uses,
    "steps": _whole,
    "guidance_scale": _number,
    "width": _whole,
    "height": _whole,
    "seed": _natural,
    "sampler": _sampler,
}


def _adapters_of(request: pb.GenerateRequest) -> tuple[str, ...]:
    return request.adapter, *(use.adapter for use in request.more_adapters)


def _wrong(field: str, problem: str, *, reason: Reason = Reason.INVALID_FIELD) -> NoReturn:
    raise MooringError(reason, problem, fields=[FieldViolation(field, problem)])


def _too_large(size: int, limit: int) -> MooringError:
    return MooringError(
        Reason.BATCH_TOO_LARGE,
        f"The file has {size} bytes; at most {limit} are taken.",
        remedy="Split it into several batches.",
        metadata={"limit": str(limit)},
    )


def _protocol(field: str, problem: str) -> MooringError:
    return MooringError(
        Reason.INVALID_FIELD,
        f"The upload stream is out of order: {field} {problem}.",
        remedy="Send the settings, then the file's header and its chunks.",
        fields=[FieldViolation(field, problem)],
    )
