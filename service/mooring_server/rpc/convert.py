"""Records of the store as messages of the contract. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from google.rpc import status_pb2
from mooring.v1 import (
    adapter_pb2,
    batch_pb2,
    evaluation_pb2,
    job_pb2,
    media_pb2,
    personalization_pb2,
    subject_pb2,
    training_pb2,
)

from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.rpc import convert_gate, names, status
from mooring_server.rpc.times import timestamp
from mooring_server.safety.policy import Verdict
from mooring_server.storage.models import (
    Adapter,
    Document,
    DoneRow,
    GateDecision,
    Job,
    JobEvent,
    JobState,
    Photo,
    Subject,
)
from mooring_server.training.config import TrainConfig

KINDS: Mapping[str, job_pb2.JobKind.ValueType] = {
    "train": job_pb2.JOB_KIND_TRAIN,
    "evaluate": job_pb2.JOB_KIND_EVALUATE,
    "batch": job_pb2.JOB_KIND_BATCH,
}
_PROMPT_KINDS: Mapping[str, evaluation_pb2.PromptKind.ValueType] = {
    "subject": evaluation_pb2.PROMPT_KIND_SUBJECT,
    "generic": evaluation_pb2.PROMPT_KIND_GENERIC,
    "class": evaluation_pb2.PROMPT_KIND_CLASS,
    "plain": evaluation_pb2.PROMPT_KIND_PLAIN,
}
_TARGETS = {"attention": "ATTENTION", "attention+ff": "ATTENTION_FF"}
_SMALLER_IS_BETTER = ("pres", "generic_change", "drift")

T = TypeVar("T")


# ---------------------------------------------------------------------------------------------- subjects


def subject(record: Subject, photos: list[Photo] | None = None) -> subject_pb2.Subject:
    """A subject, with its photos' descriptions where they are given."""
    return subject_pb2.Subject(
        name=names.subject(record.tenant, record.subject_id),
        display_name=record.display_name or record.subject_id,
        class_noun=record.class_noun,
        placeholder=record.placeholder,
        rights=rights(record.rights),
        photos=[photo(item) for item in photos or []],
        photo_count=record.photo_count,
        create_time=timestamp(record.create_time),
    )


def rights(document: Document) -> subject_pb2.RightsDeclaration:
    """A rights declaration as it is kept."""
    basis = f"BASIS_{str(document.get('basis', '')).upper()}"
    known = subject_pb2.RightsDeclaration.Basis
    return subject_pb2.RightsDeclaration(
        basis=known.Value(basis) if basis in known.keys() else known.BASIS_UNSPECIFIED,  # noqa: SIM118
        statement=str(document.get("statement", "")),
    )


def rights_document(declared: subject_pb2.RightsDeclaration, field: str) -> Document:
    """The declaration to keep; empty when there is none.

    Args:
        declared: as received.
        field: its path in the request.

    Raises:
        MooringError: INVALID_FIELD for a statement that is too long.
    """
    known = subject_pb2.RightsDeclaration.Basis
    if declared.basis == known.BASIS_UNSPECIFIED or declared.basis not in known.values():
        return {}
    if len(declared.statement) > 1000:
        problem = f"has {len(declared.statement)} characters; at most 1,000 are kept"
        raise MooringError(
            Reason.INVALID_FIELD,
            f"The rights statement {problem}.",
            fields=[FieldViolation(f"{field}.statement", problem)],
        )
    return {
        "basis": known.Name(declared.basis).removeprefix("BASIS_").lower(),
        "statement": declared.statement,
    }


def photo(record: Photo) -> subject_pb2.Photo:
    """A stored photo's description."""
    return subject_pb2.Photo(
        filename=record.filename,
        sha256=record.sha256,
        width=record.width,
        height=record.height,
        size_bytes=record.size_bytes,
        create_time=timestamp(record.create_time),
    )


# ---------------------------------------------------------------------------------------------- adapters


def adapter(
    record: Adapter,
    *,
    layers: bool,
    aliases: Sequence[str] = (),
    gate_decision: GateDecision | None = None,
) -> adapter_pb2.Adapter:
    """An adapter version.

    Args:
        record: the version.
        layers: whether to show its certificate's layers.
        aliases: those that point to it.
        gate_decision: the newest one about it.
    """
    made = adapter_pb2.Adapter(
        name=names.adapter(record.tenant, record.name),
        version=record.version,
        digest=record.digest,
        base_digest=record.base_digest,
        rank=record.rank,
        size_bytes=record.size_bytes,
        subject=names.subject(record.tenant, record.subject_id) if record.subject_id else "",
        job=names.job(record.tenant, record.job_id) if record.job_id else "",
        placeholder=record.placeholder,
        class_noun=record.class_noun,
        method=str(record.summary.get("method", "")),
        drift_budget=record.summary.get("budget"),
        create_time=timestamp(record.create_time),
        aliases=aliases,
    )
    if record.delete_time is not None:
        made.delete_time.CopyFrom(timestamp(record.delete_time))
    if gate_decision is not None:
        made.gate_decision.CopyFrom(convert_gate.decision(gate_decision))
    source = record.summary.get("source")
    if source is not None:
        made.source.CopyFrom(
            adapter_pb2.ImportSource(
                format=adapter_pb2.SourceFormat.Value(f"SOURCE_FORMAT_{source['format'].upper()}"),
                digest=source["digest"],
                filenames=source["files"],
                rights=rights(record.rights),
            )
        )
    if record.certificate:
        made.certificate.CopyFrom(certificate(record.certificate, layers=layers))
        if made.certificate.HasField("drift"):
            made.drift.CopyFrom(made.certificate.drift)
    return made


def certificate(document: Document, *, layers: bool) -> adapter_pb2.Certificate:
    """A certificate from its JSON form (`evaluation.certificate.Certificate.to_json`)."""
    made = adapter_pb2.Certificate(
        adapter_digest=document["adapter_digest"],
        base_digest=document["base_digest"],
        sigma_max=document["sigma_max"],
        relative_max=document["relative_max"],
        rank=document["rank"],
        adapter_scale=document["adapter_scale"],
        drift_budget=document["budget"],
    )
    if document["drift"] is not None:
        made.drift.CopyFrom(drift(document["drift"]))
    if layers:
        made.layers.extend(
            adapter_pb2.Certificate.Layer(
                layer=layer["name"],
                sigma_max=layer["sigma"],
                frobenius=layer["frobenius"],
                stable_rank=layer["stable_rank"],
                base_sigma_max=layer["base_sigma"],
                relative=layer["relative"],
            )
            for layer in document["layers"]
        )
        made.attentions.extend(
            adapter_pb2.Certificate.Attention(
                attention=attention["name"],
                head_dim=attention["head_dim"],
                logit_gain=attention["logit_gain"],
            )
            for attention in document["attentions"]
        )
    return made


def drift(document: Document) -> adapter_pb2.Drift:
    """A measured drift from its JSON form (`evaluation.probe.DriftFigure.to_json`)."""
    return adapter_pb2.Drift(
        value=document["value"],
        low=document["low"],
        high=document["high"],
        probe_digest=document["probe_digest"],
        guidance_scale=document["guidance_scale"],
        generic=document["generic"],
        class_noun=document["class"],
        points=document["points"],
        adapter_scale=document["adapter_scale"],
    )


# ---------------------------------------------------------------------------------------------- jobs


def job(record: Job) -> job_pb2.Job:
    """A job as it is now."""
    made = job_pb2.Job(
        name=names.job(record.tenant, record.job_id),
        kind=KINDS.get(record.kind, job_pb2.JOB_KIND_UNSPECIFIED),
        state=job_state(record.state),
        cancel_requested=record.cancel_requested,
        create_time=timestamp(record.create_time),
    )
    if record.start_time is not None:
        made.start_time.CopyFrom(timestamp(record.start_time))
    if record.end_time is not None:
        made.end_time.CopyFrom(timestamp(record.end_time))
    spec = record.spec
    if record.kind == "train":
        made.train.CopyFrom(
            training_pb2.TrainSpec(
                subject=names.subject(record.tenant, spec["subject"]),
                adapter_id=spec["adapter_id"],
                config=training_config(spec["config"]),
            )
        )
    elif record.kind == "evaluate":
        made.evaluate.CopyFrom(
            evaluation_pb2.EvaluateSpec(
                adapter=names.adapter(record.tenant, spec["adapter"]) if spec["adapter"] else "",
                subject=names.subject(record.tenant, spec["subject"]),
                config=evaluation_config(spec["config"]),
            )
        )
    elif record.kind == "batch":
        made.batch.CopyFrom(
            batch_pb2.BatchSpec(
                filename=spec["filename"],
                sha256=spec["sha256"],
                size_bytes=spec["size_bytes"],
                row_count=spec["rows"],
                adapter_count=spec["adapters"],
                base_digest=spec["base_digest"],
            )
        )
    if record.progress is not None:
        made.progress.CopyFrom(progress(record.progress))
    if record.result is not None:
        if record.kind == "train":
            made.adapter = names.adapter(record.tenant, record.result["adapter"])
        if record.kind == "batch":
            made.batch_result.CopyFrom(
                batch_pb2.BatchResult(
                    image_count=record.result["images"],
                    failed_count=record.result["failed"],
                    manifest_digest=record.result["manifest_digest"],
                )
            )
        made.artifacts.extend(artifact(item) for item in record.result.get("artifacts", ()))
    error = job_error(record)
    if error is not None:
        made.error.CopyFrom(error)
    return made


def job_at(record: Job, event: JobEvent) -> job_pb2.Job:
    """The job as it was when a "state" event happened, as far as later changes do not show."""
    made = job(record)
    if event.payload["state"] != record.state:
        for name in ("progress", "error", "end_time", "artifacts", "batch_result"):
            made.ClearField(name)
        made.adapter = ""
        made.cancel_requested = False
        made.state = job_state(JobState(event.payload["state"]))
        if made.state == job_pb2.JOB_STATE_PENDING:
            made.ClearField("start_time")
    return made


def job_state(state: JobState) -> job_pb2.JobState.ValueType:
    """A state's enum value."""
    return job_pb2.JobState.Value(f"JOB_STATE_{state}")


def job_error(record: Job) -> status_pb2.Status | None:
    """Why a job failed or was cancelled, in the form of every other error."""
    if record.error is not None:
        document = record.error
        try:
            reason = Reason(document.get("reason", ""))
        except ValueError:  # written by a newer server
            reason = Reason.INTERNAL
        fields = [FieldViolation(**item) for item in document.get("fields", ())]
        error = MooringError(
            reason,
            str(document.get("message", "")),
            remedy=str(document.get("remedy", "")),
            metadata={str(key): str(value) for key, value in document.get("metadata", {}).items()},
            fields=fields,
        )
        return status.to_status(error)
    if record.state is JobState.CANCELLED:
        return status.to_status(MooringError(Reason.CANCELLED, "The job was cancelled."))
    return None


def progress(document: Document, previews: Callable[[str], bytes] | None = None) -> job_pb2.JobProgress:
    """Progress from an event's payload.

    Args:
        document: the payload.
        previews: reads a preview by its object key; None leaves previews out.
    """
    made = job_pb2.JobProgress(
        phase=str(document.get("phase", "")),
        step=int(document.get("step", 0)),
        steps=int(document.get("steps", 0)),
        failed_rows=int(document.get("failed_rows", 0)),
    )
    left = document.get("seconds_left")
    if left is not None:
        made.time_left.FromMilliseconds(round(left * 1000))
    if document.get("loss") is not None:
        made.training.CopyFrom(
            job_pb2.TrainingFigures(
                loss=document["loss"],
                sigma_max=document.get("sigma_max"),
                drift=document.get("drift"),
                drift_budget=document.get("budget"),
                strength=document.get("strength"),
            )
        )
    for item in document.get("previews", ()) if previews else ():
        assert previews is not None
        try:
            data = previews(item["object_key"])
        except KeyError:  # removed since: the event is still worth having
            continue
        made.previews.append(
            media_pb2.PreviewImage(
                index=item["index"],
                media_type="image/png",
                width=item["width"],
                height=item["height"],
                data=data,
            )
        )
    return made


def verdict(found: Verdict, image_index: int | None = None) -> personalization_pb2.SafetyVerdict:
    """What a content check found of the prompts, or of an image."""
    return personalization_pb2.SafetyVerdict(
        check=found.check,
        allowed=found.allowed,
        category=found.category,
        score=found.score,
        image_index=image_index,
    )


def batch_row(done: DoneRow, row_count: int, image: bytes) -> batch_pb2.BatchRow:
    """A done row of a batch job."""
    return batch_pb2.BatchRow(
        row=done.row,
        position=done.position,
        row_count=row_count,
        filename=done.record.get("file", ""),
        size_bytes=len(image),
        sha256=done.record.get("sha256", ""),
        manifest_line=json.dumps(done.record, ensure_ascii=False),
    )


def artifact(document: Document) -> job_pb2.Artifact:
    """A job's file."""
    return job_pb2.Artifact(
        filename=document["filename"],
        media_type=document["media_type"],
        size_bytes=document["size_bytes"],
        sha256=document["sha256"],
    )


# -------------------------------------------------------------------------------- configurations


def training_config(document: Mapping[str, Any]) -> training_pb2.TrainingConfig:
    """A training configuration from `TrainConfig.to_json`; what an older server did not know is default."""
    document = {**TrainConfig().to_json(), **document}
    made = training_pb2.TrainingConfig(
        method=training_pb2.TrainingMethod.Value(f"TRAINING_METHOD_{document['method'].upper()}"),
        targets=training_pb2.TrainingTargets.Value(f"TRAINING_TARGETS_{_TARGETS[document['targets']]}"),
        framing=training_pb2.PhotoFraming.Value(f"PHOTO_FRAMING_{document['framing'].upper()}"),
        **{name: document[name] for name in PLAIN_TRAINING_FIELDS},
    )
    if document["strength"] is not None:
        made.fixed_strength = document["strength"]
    elif document["budget"] is not None:
        made.drift_budget = document["budget"]
    return made


PLAIN_TRAINING_FIELDS = (
    "rank",
    "steps",
    "learning_rate",
    "batch_size",
    "seed",
    "learn_embedding",
    "prior_images",
    "checkpoint_every",
    "preview_every",
    "embedding_learning_rate",
    "views",
    "flip",
    "probe_every",
)
"""Fields that are called the same and mean the same in `TrainConfig` and in the contract."""


def training_document(config: training_pb2.TrainingConfig) -> Document:
    """What a caller set, as `TrainConfig.from_json` reads it. Raises INVALID_FIELD for unknown enums."""
    document: Document = {
        name: getattr(config, name)
        for name in PLAIN_TRAINING_FIELDS
        if config.HasField(name)  # type: ignore[arg-type]
    }
    method = _enum_name(training_pb2.TrainingMethod, config.method, "TRAINING_METHOD_", "config.method")
    if method:
        document["method"] = method.lower()
    targets = _enum_name(training_pb2.TrainingTargets, config.targets, "TRAINING_TARGETS_", "config.targets")
    if targets:
        document["targets"] = next(key for key, value in _TARGETS.items() if value == targets)
    framing = _enum_name(training_pb2.PhotoFraming, config.framing, "PHOTO_FRAMING_", "config.framing")
    if framing:
        document["framing"] = framing.lower()
    match config.WhichOneof("strength"):
        case "preset":
            preset = _enum_name(training_pb2.DriftPreset, config.preset, "DRIFT_PRESET_", "config.preset")
            document["budget"] = (preset or "BALANCED").lower()
        case "drift_budget":
            document["budget"] = config.drift_budget
        case "fixed_strength":
            document["strength"] = config.fixed_strength
    return document


def evaluation_config(document: Mapping[str, Any]) -> evaluation_pb2.EvaluationConfig:
    """An evaluation configuration from a job's spec."""
    return evaluation_pb2.EvaluationConfig(
        **{name: document[name] for name in EVALUATION_FIELDS if document.get(name) is not None}
    )


EVALUATION_FIELDS = (
    "prompts",
    "generic_prompts",
    "seeds",
    "steps",
    "guidance_scale",
    "adapter_scale",
    "class_samples",
)


def evaluation_document(config: evaluation_pb2.EvaluationConfig) -> Document:
    """What a caller set, as `EvaluationConfig.from_json` reads it."""
    document: Document = {}
    for name in EVALUATION_FIELDS:
        if name in {"prompts", "generic_prompts", "seeds"}:
            if getattr(config, name):
                document[name] = list(getattr(config, name))
        elif config.HasField(name):  # type: ignore[arg-type]
            document[name] = getattr(config, name)
    return document


def evaluation(record: Job, content: Document) -> evaluation_pb2.Evaluation:
    """The figures of an evaluation from its stored JSON (`EvaluationResult.to_json` without pictures)."""
    made = evaluation_pb2.Evaluation(
        adapter=names.adapter(record.tenant, record.spec["adapter"]) if record.spec["adapter"] else "",
        adapter_digest=content["adapter_digest"] or "",
        base_digest=content["base_digest"],
        judges_digest=content["judges_digest"],
        metrics=_metrics(content["metrics"], content["intervals"]),
        prompts=[
            evaluation_pb2.PromptResult(
                prompt=pair["prompt"],
                base_prompt=pair["base_prompt"],
                seed=pair["seed"],
                kind=_PROMPT_KINDS.get(pair["kind"], evaluation_pb2.PROMPT_KIND_UNSPECIFIED),
                metrics=_metrics(pair["scores"], {}),
                image=pair.get("image", ""),
                base_image=pair.get("base_image", ""),
            )
            for pair in content["pairs"]
        ],
    )
    if content["drift"] is not None:
        made.drift.CopyFrom(drift(content["drift"]))
    if content["certificate"] is not None:
        made.certificate.CopyFrom(certificate(content["certificate"], layers=True))
    return made


def _metrics(values: Mapping[str, Any], intervals: Mapping[str, Any]) -> list[evaluation_pb2.Metric]:
    made = []
    for name, value in values.items():
        if value is None or name == "drift":  # drift has a message of its own
            continue
        low, high = intervals.get(name) or (None, None)
        made.append(
            evaluation_pb2.Metric(
                name=name,
                value=value,
                low=low,
                high=high,
                higher_is_better=name.removeprefix("base_") not in _SMALLER_IS_BETTER,
            )
        )
    return made


def _enum_name(enum: Any, value: int, prefix: str, field: str) -> str:
    """The value's name without prefix, empty for UNSPECIFIED. Raises INVALID_FIELD for an unknown number."""
    if value not in enum.values():
        choices = ", ".join(name.removeprefix(prefix) for name, number in enum.items() if number)
        problem = f"must be one of {choices}, not {value}"
        raise MooringError(
            Reason.INVALID_FIELD, f"{field} {problem}.", fields=[FieldViolation(field, problem)]
        )
    return str(enum.Name(value)).removeprefix(prefix) if value else ""
