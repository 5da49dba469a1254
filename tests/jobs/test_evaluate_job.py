"""An evaluation job on tiny real models: every artifact that it names can be read."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest
from mooring_server.engine.base import load_base
from mooring_server.evaluation.judges import Judges
from mooring_server.jobs.subjects import PhotoUpload
from mooring_server.provenance import identity
from mooring_server.provenance.verify import MarkState, examine
from mooring_server.storage.models import Job, JobState
from pictures import png, quarters
from tiny_judges import save_tiny_clip, save_tiny_vit
from worker import GENERIC, PATIENCE, open_state, running

TRAINING = {"steps": 4, "rank": 2, "preview_every": 0, "probe_points": 4, "control_points": 2, "views": 1}
FIGURES = {"steps": 2, "class_samples": 2, "probe_points": 4, "prompts": [], "generic_prompts": []}


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory, tiny_sd15: Path) -> Judges:
    root = tmp_path_factory.mktemp("judges")
    tokenizer = load_base(tiny_sd15).tokenizers[0]
    return Judges.load(save_tiny_clip(root / "clip", tokenizer), save_tiny_vit(root / "dino"))


def finished(store, job: Job) -> Job:
    deadline = time.monotonic() + PATIENCE
    while not store.get_job("acme", job.job_id).state.final:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return store.get_job("acme", job.job_id)


@pytest.mark.parametrize("adapter", ["duck@1", ""])
def test_every_artifact_of_an_evaluation_can_be_read(
    adapter: str, judges: Judges, tiny_sd15: Path, tmp_path: Path
) -> None:
    store, objects = open_state(tmp_path)
    store.create_subject("acme", "duck", class_noun="duck", placeholder="<duck>", rights={"basis": "OWNED"})
    upload = PhotoUpload(store, objects, "acme", "duck")
    upload.add("a.png", png(quarters(48, 40)))
    upload.commit()
    with running(tmp_path, tiny_sd15, judges):
        train = {"subject": "duck", "adapter_id": "duck", "config": TRAINING}
        assert finished(store, store.create_job("acme", "train", train)).error is None
        spec = {"adapter": adapter, "subject": "duck", "config": FIGURES}
        done = finished(store, store.create_job("acme", "evaluate", spec))
        missing = {"adapter": "duck@7", "subject": "duck", "config": FIGURES}
        lost = finished(store, store.create_job("acme", "evaluate", missing))
    assert done.state is JobState.SUCCEEDED, done.error
    files = {artifact["filename"]: artifact for artifact in done.result["artifacts"]}
    for artifact in files.values():
        data = objects.get(artifact["object_key"])
        assert (len(data), hashlib.sha256(data).hexdigest()) == (artifact["size_bytes"], artifact["sha256"])
    assert {"evaluation.json", "report.html", "grid.png"} < files.keys()
    digest = json.loads(objects.get(done.result["evaluation"]))["adapter_digest"]
    authority = (tmp_path / identity.FOLDER / identity.AUTHORITY).read_text()
    for name in (name for name in files if name.endswith(".png")):
        mark = examine(objects.get(files[name]["object_key"]), authority)
        assert (mark.state, mark.trusted) == (MarkState.VALID, True), name
        assert mark.adapters == ((digest,) if adapter and not name.endswith("-base.png") else ()), name
        assert mark.source.startswith("composite") == (name == "grid.png"), name  # photos stand beside it
    document = json.loads(objects.get(done.result["evaluation"]))
    assert document["metrics"] == done.result["metrics"]
    assert document["config"]["generic_prompts"] == document["config"]["probe_prompts"]
    assert document["config"]["probe_prompts"] == list(GENERIC[1::2]), "not what training was steered on"
    pictures = {pair[name] for pair in document["pairs"] for name in ("image", "base_image") if name in pair}
    assert pictures == {name for name in files if name.startswith("pairs/")}
    assert ("image" in document["pairs"][0]) == bool(adapter)
    assert (document["adapter_digest"] is None) == (not adapter)
    assert lost.error["reason"] == "ADAPTER_NOT_FOUND"
    store.close()
