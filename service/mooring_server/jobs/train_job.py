"""A training job: photos → adapter version."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mooring_server.engine.adapters import to_safetensors
from mooring_server.engine.bank import AdapterBank
from mooring_server.engine.model import BaseModel
from mooring_server.engine.policy import TaskClass
from mooring_server.evaluation import certificate
from mooring_server.evaluation.base_samples import SampleCache
from mooring_server.jobs.session import JobSession, finite
from mooring_server.jobs.subjects import load_photos
from mooring_server.storage.models import Document
from mooring_server.storage.objects import content_key, first_written
from mooring_server.training.config import TrainConfig
from mooring_server.training.trainer import TrainProgress, TrainResult, train


class TrainJob:
    """Runs jobs with spec ``{"subject", "adapter_id", "config"}``.

    Args:
        base: the resident base.
        bank: its bank.
        generic_prompts: prompts of the drift probe that a run is steered on.
    """

    def __init__(self, base: BaseModel, bank: AdapterBank, generic_prompts: Sequence[str]) -> None:
        self._base, self._bank, self._generic_prompts = base, bank, tuple(generic_prompts)
        self._samples = SampleCache()

    def run(self, session: JobSession) -> None:
        """Train, certify and publish; the job has SUCCEEDED when this returns.

        Raises:
            MooringError: the job cannot be done.
            StoppedError: the job was stopped.
            LeaseLostError: another runner has it.
        """
        spec, tenant = session.job.spec, session.job.tenant
        config = TrainConfig.from_json(spec["config"])
        subject = session.store.get_subject(tenant, spec["subject"])
        started = time.monotonic()
        result = session.drive(
            train(
                self._base,
                self._bank,
                _pinned_photos(session, spec["subject"]),
                config,
                class_noun=subject.class_noun,
                placeholder=subject.placeholder,
                generic_prompts=self._generic_prompts,
                checkpoint=session,
                samples=self._samples,
                on_progress=lambda progress: _report(session, progress),
            ),
            TaskClass.TRAINING,
        )
        session.span.phase("publishing")
        proof = certificate.build(self._base, result.weights, result.drift, budget=config.target_drift)
        summary = _summary(config, result, time.monotonic() - started)
        kept = {"certificate": proof.dumps(), "rights": json.dumps(subject.rights, sort_keys=True)}
        weights = dataclasses.replace(result.weights, metadata={**result.weights.metadata, **kept})
        data = to_safetensors(weights)
        # Named after the job and its content: a runner that takes over after a crash here writes the same
        # file again, and one that lost its lease cannot change the file that its successor published.
        key = content_key(f"adapters/{session.job.job_id}", data, "safetensors")
        session.persist(lambda: session.objects.put(key, data))
        history = json.dumps(finite({"rows": result.history})["rows"]).encode()
        artifacts = [session.put_artifact("history.json", "application/json", history)]
        if session.observer is not None and config.target_drift:
            session.observer.trained(result.drift.figure.value, config.target_drift)
        session.persist(
            lambda: session.store.publish_adapter(
                tenant,
                spec["adapter_id"],
                object_key=key,
                digest=weights.digest,
                base_digest=weights.base_digest,
                rank=weights.rank,
                size_bytes=len(data),
                class_noun=subject.class_noun,
                placeholder=subject.placeholder,
                rights=subject.rights,
                certificate=finite(proof.to_json()),
                summary=summary,
                subject_id=subject.subject_id,
                job_id=session.job.job_id,
                lease=session.job.lease,
                artifacts=artifacts,
            )
        )


def _pinned_photos(session: JobSession, subject_id: str) -> list[Image.Image]:
    """The photos that the subject had when the job first ran: later uploads must not change a resumed run."""
    tenant = session.job.tenant
    stem = f"jobs/{session.job.job_id}/photos"
    written = first_written(session.objects, stem)
    if written is None:
        pinned = [photo.sha256 for photo in session.store.photos(tenant, subject_id)]
        data = json.dumps(pinned).encode()
        session.persist(lambda: session.objects.put(content_key(stem, data, "json"), data))
    else:
        pinned = json.loads(written)
    return load_photos(session.store, session.objects, tenant, subject_id, only=pinned)


def _report(session: JobSession, progress: TrainProgress) -> None:
    figures: Document = {
        field.name: getattr(progress, field.name)
        for field in dataclasses.fields(progress)
        if field.name != "previews"
    }
    session.report(figures, [np.asarray(picture) for picture in progress.previews])


def _summary(config: TrainConfig, result: TrainResult, seconds: float) -> Document:
    last = result.history[-1] if result.history else {}
    return finite(
        {
            "method": str(config.method),
            "budget": config.target_drift,
            "strength": last.get("strength", config.strength),
            "rank": config.rank,
            "steps": config.steps,
            "seed": config.seed,
            "drift": result.drift.figure.to_json(),
            "scaled_down_by": result.scale,
            "loss": last.get("loss"),
            "sigma_max": last.get("sigma_max"),
            "seconds": seconds,
        }
    )
