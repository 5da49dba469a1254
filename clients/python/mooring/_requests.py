"""Requests built from plain Python values; shared by the sync and the asyncio client.

Ids stand for resource names wherever one is asked for ("rex" is `tenants/-/subjects/rex`, where `-` is the
caller's own tenant), messages that have a name stand for it, and enums are spelled as words.
"""

from __future__ import annotations

import hashlib
import io
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from google.protobuf import field_mask_pb2

from mooring.errors import FieldViolation, InvalidArgumentError
from mooring.v1 import (
    adapter_pb2,
    evaluation_pb2,
    gate_pb2,
    job_pb2,
    media_pb2,
    personalization_pb2,
    subject_pb2,
    training_pb2,
)

CHUNK_BYTES = 256 * 1024
Photo = Any
"""A path, bytes, (filename, bytes) or a `PIL.Image`."""
AdapterFiles: TypeAlias = str | Path | Iterable[str | Path | tuple[str, bytes]]
"""A file or folder, several of them, or (filename, bytes) pairs."""
PEFT_CONFIG = "adapter_config.json"


def new_request_id() -> str:
    """A fresh UUID: what makes a creating call safe to repeat."""
    return str(uuid.uuid4())


def resource_name(collection: str, resource: Any) -> str:
    """Full resource name of an id, a name or a message that has one.

    Args:
        collection: "subjects", "adapters" or "jobs".
        resource: for example "rex", "tenants/acme/subjects/rex" or a Subject; "" stays "".
    """
    text = resource if isinstance(resource, str) else str(resource.name)
    return text if not text or text.startswith("tenants/") else f"tenants/-/{collection}/{text}"


def enum_value(enum: Any, word: str, field: str) -> Any:
    """The enum's number for a word such as "spectral" of TRAINING_METHOD_SPECTRAL.

    Args:
        enum: generated enum wrapper; its zero value ends in UNSPECIFIED.
        word: lower-case tail of the value's name; "" is the zero value, the server's default.
        field: request field to blame.

    Raises:
        InvalidArgumentError: the word is not one of the enum's; says which are.
    """
    names = list(enum.keys())
    prefix = next(name for name in names if name.endswith("UNSPECIFIED")).removesuffix("UNSPECIFIED")
    value = prefix + (word.upper().replace("-", "_").replace("+", "_") or "UNSPECIFIED")
    if value not in names:
        known = ", ".join(n.removeprefix(prefix).lower() for n in names if not n.endswith("UNSPECIFIED"))
        raise InvalidArgumentError(
            f"{field} {word!r} is not known.",
            reason="INVALID_FIELD",
            remedy=f"Choose one of {known}.",
            fields=[FieldViolation(field, f"one of {known}")],
        )
    return enum.Value(value)


def create_subject(
    subject_id: str,
    *,
    class_noun: str,
    rights: str,
    statement: str = "",
    placeholder: str = "",
    display_name: str = "",
    request_id: str = "",
) -> subject_pb2.CreateSubjectRequest:
    """Request of `create_subject`; see `mooring.Client.create_subject`."""
    basis = enum_value(subject_pb2.RightsDeclaration.Basis, rights, "subject.rights.basis")
    return subject_pb2.CreateSubjectRequest(
        subject_id=subject_id,
        subject=subject_pb2.Subject(
            class_noun=class_noun,
            placeholder=placeholder,
            display_name=display_name,
            rights=subject_pb2.RightsDeclaration(basis=basis, statement=statement),
        ),
        request_id=request_id or new_request_id(),
    )


def read_photos(photos: Iterable[Photo]) -> list[tuple[str, bytes]]:
    """Names and bytes of photos given as paths, bytes, (filename, bytes) or `PIL.Image`.

    Raises:
        InvalidArgumentError: a path cannot be read; names every such file.
    """
    found: list[tuple[str, bytes]] = []
    bad: list[FieldViolation] = []
    for i, photo in enumerate(photos):
        if isinstance(photo, bytes):
            found.append((f"photo-{i}", photo))
        elif isinstance(photo, tuple):
            found.append(photo)
        elif hasattr(photo, "save"):
            buffer = io.BytesIO()
            photo.save(buffer, format="PNG")
            found.append((f"photo-{i}.png", buffer.getvalue()))
        else:
            try:
                found.append((Path(photo).name, Path(photo).read_bytes()))
            except OSError as error:
                bad.append(FieldViolation(f"files[{i}]", f"{photo}: {error.strerror or error}"))
    if bad:
        raise InvalidArgumentError(
            f"{len(bad)} of the photos cannot be read.",
            reason="BAD_IMAGE",
            remedy="Check the paths.",
            fields=bad,
        )
    return found


def upload_messages(
    subject: Any, files: Sequence[tuple[str, bytes]]
) -> Iterator[subject_pb2.UploadPhotosRequest]:
    """The stream of an upload: the subject, then each file's header and chunks."""
    yield subject_pb2.UploadPhotosRequest(subject=resource_name("subjects", subject))
    for filename, data in files:
        yield subject_pb2.UploadPhotosRequest(file=header_of(filename, data))
        for start in range(0, len(data), CHUNK_BYTES):
            yield subject_pb2.UploadPhotosRequest(chunk=data[start : start + CHUNK_BYTES])


def train(
    subject: Any,
    *,
    adapter_id: str = "",
    method: str = "",
    preset: str = "",
    drift_budget: float | None = None,
    fixed_strength: float | None = None,
    targets: str = "",
    framing: str = "",
    request_id: str = "",
    **settings: Any,
) -> personalization_pb2.TrainRequest:
    """Request of `train`; see `mooring.Client.train`.

    Raises:
        InvalidArgumentError: more than one of preset, drift_budget and fixed_strength, or an unknown word.
    """
    if sum([bool(preset), drift_budget is not None, fixed_strength is not None]) > 1:
        raise InvalidArgumentError(
            "preset, drift_budget and fixed_strength exclude each other.",
            reason="INVALID_FIELD",
            remedy="Give one of them, or none for the balanced preset.",
            fields=[FieldViolation("config.strength", "more than one given")],
        )
    config = training_pb2.TrainingConfig(
        method=enum_value(training_pb2.TrainingMethod, method, "config.method"),
        targets=enum_value(training_pb2.TrainingTargets, targets, "config.targets"),
        framing=enum_value(training_pb2.PhotoFraming, framing, "config.framing"),
        **given(settings),
    )
    if preset:
        config.preset = enum_value(training_pb2.DriftPreset, preset, "config.preset")
    if drift_budget is not None:
        config.drift_budget = drift_budget
    if fixed_strength is not None:
        config.fixed_strength = fixed_strength
    return personalization_pb2.TrainRequest(
        subject=resource_name("subjects", subject),
        adapter_id=adapter_id,
        config=config,
        request_id=request_id or new_request_id(),
    )


def evaluate(
    adapter: Any = "", *, subject: Any = "", request_id: str = "", **settings: Any
) -> personalization_pb2.EvaluateRequest:
    """Request of `evaluate`; see `mooring.Client.evaluate`."""
    return personalization_pb2.EvaluateRequest(
        adapter=resource_name("adapters", adapter),
        subject=resource_name("subjects", subject),
        config=evaluation_pb2.EvaluationConfig(**given(settings)),
        request_id=request_id or new_request_id(),
    )


def generate(
    prompt: str,
    *,
    adapter: Any = "",
    more_adapters: Mapping[Any, float] | None = None,
    sampler: str = "",
    **settings: Any,
) -> personalization_pb2.GenerateRequest:
    """Request of `generate`; see `mooring.Client.generate`."""
    return personalization_pb2.GenerateRequest(
        prompt=prompt,
        adapter=resource_name("adapters", adapter),
        more_adapters=[
            personalization_pb2.AdapterUse(adapter=resource_name("adapters", name), scale=scale)
            for name, scale in (more_adapters or {}).items()
        ],
        sampler=enum_value(personalization_pb2.Sampler, sampler, "sampler"),
        **given(settings),
    )


def batch_messages(
    requests: Iterable[tuple[str, Mapping[str, Any]]], failures: list[BaseException]
) -> Iterator[personalization_pb2.GenerateBatchRequest]:
    """The stream of a batch: an id and the keyword arguments of `generate` for each request.

    Args:
        requests: the caller's iterable.
        failures: takes what the iterable raised, which gRPC would only report as a cancelled call.
    """
    try:
        for key, arguments in requests:
            yield personalization_pb2.GenerateBatchRequest(id=key, request=generate(**arguments))
    except Exception as error:
        failures.append(error)
        raise


def list_jobs(*, kind: str = "", state: str = "") -> job_pb2.ListJobsRequest:
    """Request of `list_jobs`; "" is any."""
    return job_pb2.ListJobsRequest(
        kind=enum_value(job_pb2.JobKind, kind, "kind"), state=enum_value(job_pb2.JobState, state, "state")
    )


def export_adapter(adapter: Any, *, file_format: str = "") -> adapter_pb2.ExportAdapterRequest:
    """Request of `export_adapter`; "" is Mooring's own safetensors file."""
    return adapter_pb2.ExportAdapterRequest(
        name=resource_name("adapters", adapter),
        format=enum_value(adapter_pb2.AdapterFormat, file_format, "format"),
    )


def publish_adapter(
    adapter: Any, *, alias: str = "", validate_only: bool = False, request_id: str = ""
) -> adapter_pb2.PublishAdapterRequest:
    """Request of `publish_adapter`; "" is the alias "live"."""
    return adapter_pb2.PublishAdapterRequest(
        name=resource_name("adapters", adapter),
        alias=alias,
        validate_only=validate_only,
        request_id=request_id or new_request_id(),
    )


def roll_back_adapter(
    adapter: Any, *, alias: str = "", request_id: str = ""
) -> adapter_pb2.RollBackAdapterRequest:
    """Request of `roll_back_adapter`; "" is the alias "live"."""
    return adapter_pb2.RollBackAdapterRequest(
        name=resource_name("adapters", adapter), alias=alias, request_id=request_id or new_request_id()
    )


def update_gate_policy(
    *, preset: str = "", mode: str = "", allowed_rights: Iterable[str] | None = None, **thresholds: Any
) -> adapter_pb2.UpdateGatePolicyRequest:
    """Request of `update_gate_policy`.

    Args:
        preset: preset to start from; "" is the policy in force.
        mode: "enforce", "warn" or "off"; "" leaves it.
        allowed_rights: bases that pass; an empty list for any, None leaves them.
        thresholds: fields of `GatePolicy`; None no longer checks, what is left out stays.

    Raises:
        InvalidArgumentError: a word or a threshold is not known.
    """
    policy = gate_pb2.GatePolicy()
    known = {field.name for field in gate_pb2.GatePolicy.DESCRIPTOR.fields}
    unknown = sorted(set(thresholds) - known)
    if unknown:
        raise InvalidArgumentError(
            f"the gate has no threshold {unknown[0]!r}.",
            reason="INVALID_FIELD",
            remedy=f"Known: {', '.join(sorted(known))}.",
            fields=[FieldViolation(f"policy.{unknown[0]}", "is not known")],
        )
    paths = list(thresholds)
    for name, value in thresholds.items():
        if value is not None:
            setattr(policy, name, value)
    if mode:
        policy.mode = enum_value(gate_pb2.GateMode, mode, "policy.mode")
        paths.append("mode")
    if allowed_rights is not None:
        basis = subject_pb2.RightsDeclaration.Basis
        policy.allowed_rights.extend(
            enum_value(basis, word, "policy.allowed_rights") for word in allowed_rights
        )
        paths.append("allowed_rights")
    return adapter_pb2.UpdateGatePolicyRequest(
        policy=policy,
        update_mask=field_mask_pb2.FieldMask(paths=paths),
        preset=enum_value(gate_pb2.GatePreset, preset, "preset"),
    )


def import_messages(
    adapter_id: str,
    files: Sequence[tuple[str, bytes]],
    *,
    rights: str,
    statement: str = "",
    class_noun: str = "",
    placeholder: str = "",
    request_id: str = "",
) -> Iterator[adapter_pb2.ImportAdapterRequest]:
    """The stream of an import: what the files are, then each file's header and chunks.

    Raises:
        InvalidArgumentError: `rights` is an unknown word; at once, not when the stream is read.
    """
    basis = enum_value(subject_pb2.RightsDeclaration.Basis, rights, "adapter.rights.basis")
    first = adapter_pb2.AdapterImport(
        adapter_id=adapter_id,
        rights=subject_pb2.RightsDeclaration(basis=basis, statement=statement),
        class_noun=class_noun,
        placeholder=placeholder,
        request_id=request_id or new_request_id(),
    )

    def messages() -> Iterator[adapter_pb2.ImportAdapterRequest]:
        yield adapter_pb2.ImportAdapterRequest(adapter=first)
        for filename, data in files:
            yield adapter_pb2.ImportAdapterRequest(file=header_of(filename, data))
            for start in range(0, len(data), CHUNK_BYTES):
                yield adapter_pb2.ImportAdapterRequest(chunk=data[start : start + CHUNK_BYTES])

    return messages()


def read_adapter_files(files: AdapterFiles) -> list[tuple[str, bytes]]:
    """Names and bytes of an adapter's files.

    Args:
        files: a path or several, or (filename, bytes) pairs. A folder stands for its .safetensors files and
            `adapter_config.json`; PEFT's `adapter_model.safetensors` brings the latter along.

    Raises:
        InvalidArgumentError: a path cannot be read, or a folder holds no such file.
    """
    given_files = [files] if isinstance(files, str | Path) else list(files)
    found: dict[str, bytes] = {}
    for item in given_files:
        if isinstance(item, tuple):
            found[item[0]] = item[1]
            continue
        path = Path(item)
        paths = [path]
        if path.is_dir():
            paths = sorted([*path.glob("*.safetensors"), *path.glob(PEFT_CONFIG)])
        elif path.name == "adapter_model.safetensors" and (path.parent / PEFT_CONFIG).is_file():
            paths.append(path.parent / PEFT_CONFIG)
        try:
            found |= {each.name: each.read_bytes() for each in paths}
        except OSError as error:
            raise _unreadable(f"{path} cannot be read: {error.strerror or error}.") from error
        if not paths:
            raise _unreadable(f"{path} holds no .safetensors file.")
    return list(found.items())


def header_of(filename: str, data: bytes) -> media_pb2.FileHeader:
    """Announce a file."""
    return media_pb2.FileHeader(
        filename=filename, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
    )


def _unreadable(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        message,
        reason="INVALID_FIELD",
        remedy="Name .safetensors files, or a folder of them.",
        fields=[FieldViolation("files", message)],
    )


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given: None means the server's default."""
    return {name: value for name, value in settings.items() if value is not None}
