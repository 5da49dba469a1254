"""An evaluation job: an adapter version (or the base alone) → figures, pictures and a report."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from mooring_server.engine.adapters import AdapterWeights, from_safetensors
from mooring_server.engine.bank import AdapterBank
from mooring_server.engine.model import BaseModel
from mooring_server.engine.policy import TaskClass
from mooring_server.errors import MooringError, Reason
from mooring_server.evaluation import gate, report
from mooring_server.evaluation.config import EvaluationConfig
from mooring_server.evaluation.evaluate import EvaluationCache, EvaluationProgress, evaluate
from mooring_server.evaluation.judges import Judges
from mooring_server.evaluation.prompts import PromptSets
from mooring_server.evaluation.result import EvaluationResult, png
from mooring_server.jobs.session import JobSession, finite
from mooring_server.jobs.subjects import load_photos
from mooring_server.provenance.marks import Marker, Origin
from mooring_server.storage.models import Adapter, Document, JobState
from mooring_server.storage.objects import needed


class EvaluateJob:
    """Runs jobs with spec ``{"adapter": "id@version" or "", "subject", "config"}``.

    Args:
        base: the resident base.
        bank: its bank.
        judges: CLIP and DINO; None where none are configured.
        prompts: used where the spec names none, and to measure drift with.
        marker: signs into pictures where they come from.
    """

    def __init__(
        self,
        base: BaseModel,
        bank: AdapterBank,
        judges: Judges | None,
        prompts: PromptSets,
        marker: Marker,
    ) -> None:
        self._base, self._bank, self._judges, self._marker = base, bank, judges, marker
        self._defaults = {
            "prompts": prompts.scenes,
            "generic_prompts": prompts.generic,
            "probe_prompts": prompts.held_out,
        }
        self._cache = EvaluationCache()

    def run(self, session: JobSession) -> None:
        """Evaluate, store the artifacts and finish the job.

        Raises:
            MooringError: the job cannot be done.
            StoppedError: the job was stopped.
            LeaseLostError: another runner has it.
        """
        if self._judges is None:
            raise MooringError(
                Reason.JUDGES_NOT_AVAILABLE,
                "This server has no judges (CLIP and DINO) to evaluate with.",
                remedy="Start it with the directories of both.",
            )
        spec, tenant = session.job.spec, session.job.tenant
        row, adapter = self._adapter(session, spec["adapter"])
        subject_id = spec["subject"] or ("" if row is None else row.subject_id)
        photos = load_photos(session.store, session.objects, tenant, subject_id)
        subject = session.store.get_subject(tenant, subject_id)
        given = {name: value for name, value in spec["config"].items() if value not in ([], None, "")}
        config = EvaluationConfig.from_json(
            self._defaults
            | {
                "class_noun": (row.class_noun if row else "")
                or subject.class_noun,  # an import may have none
                "placeholder": "" if row is None else row.placeholder,
                "budget": None if row is None else row.summary.get("budget"),
            }
            | given
        )
        clock = _Clock(session)
        result = session.drive(
            evaluate(
                self._base,
                self._bank,
                self._judges,
                adapter,
                photos,
                config,
                on_progress=clock.report,
                cache=self._cache,
            ),
            TaskClass.EVALUATION,
        )
        session.span.phase("publishing")
        artifacts = _artifacts(session, result, photos, self._marker, title=spec["adapter"] or "base")
        document: Document = {
            "evaluation": artifacts[0]["object_key"],
            "artifacts": artifacts,
            "metrics": finite(dict(result.metrics)),
            "figures": finite(gate.figures(result, subject_id)),
        }
        session.persist(
            lambda: session.store.finish_job(
                tenant, session.job.job_id, session.job.lease, JobState.SUCCEEDED, result=document
            )
        )

    def _adapter(self, session: JobSession, name: str) -> tuple[Adapter | None, AdapterWeights | None]:
        if not name:
            return None, None
        adapter_id, _, version = name.partition("@")
        row = session.store.get_adapter(session.job.tenant, adapter_id, int(version) if version else None)
        return row, from_safetensors(needed(session.objects, row.object_key), self._base)


class _Clock:
    """Turns units of work into progress events with the seconds left."""

    def __init__(self, session: JobSession) -> None:
        self._session, self._started = session, time.monotonic()

    def report(self, progress: EvaluationProgress) -> None:
        elapsed = time.monotonic() - self._started
        left = elapsed / progress.step * (progress.steps - progress.step) if progress.step else None
        self._session.report(
            {"phase": progress.phase, "step": progress.step, "steps": progress.steps, "seconds_left": left}
        )


def _artifacts(
    session: JobSession,
    result: EvaluationResult,
    photos: Sequence[Image.Image],
    marker: Marker,
    *,
    title: str,
) -> list[Document]:
    """Store every file; the first is evaluation.json, whose pairs name their pictures' files.

    Picture files carry their mark. What report.html shows does not: the page is a document of its own, and
    C2PA has no form for pictures inside one.
    """
    adapters = (result.adapter_digest,) if result.adapter_digest else ()
    base, adapted = Origin(result.base_digest), Origin(result.base_digest, adapters)
    grid = report.grid([(title, result)], photos=photos)
    content = finite(result.to_json(images=False))
    pictures = []
    for index, (pair, entry) in enumerate(zip(result.pairs, content["pairs"], strict=True)):
        for field, pixels, origin in (("image", pair.adapted, adapted), ("base_image", pair.base, base)):
            if pixels is not None:
                entry[field] = f"pairs/{index:04d}-{'base' if field == 'base_image' else 'adapted'}.png"
                data = marker.mark(png(pixels), origin)
                pictures.append(session.put_artifact(entry[field], "image/png", data))
    page = report.render([(title, result)], photos=photos, title=f"Evaluation of {title}").encode()
    return [
        session.put_artifact("evaluation.json", "application/json", json.dumps(content).encode()),
        session.put_artifact("report.html", "text/html", page),
        session.put_artifact(
            "grid.png", "image/png", marker.mark(png(grid), replace(adapted, composite=bool(photos)))
        ),
        *pictures,
    ]
