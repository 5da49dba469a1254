"""Train, Evaluate and JobService on a real server: from photos to an adapter, its figures and its files."""

from __future__ import annotations

import hashlib
import json
import uuid

import pytest
from mooring.v1 import job_pb2 as pb
from mooring.v1 import personalization_pb2, training_pb2
from rpc_calls import DEADLINE, Stubs, failure_of, make_subject, publish, read_status

QUICK = {
    "steps": 4,
    "rank": 2,
    "batch_size": 1,
    "views": 1,
    "probe_every": 2,
    "checkpoint_every": 2,
    "preview_every": 2,
}


def train(stubs: Stubs, subject: str, *, config=None, **values) -> pb.Job:
    request = personalization_pb2.TrainRequest(
        subject=subject, config=training_pb2.TrainingConfig(**{**QUICK, **(config or {})}), **values
    )
    return stubs.personalization.Train(request, timeout=DEADLINE).job


def watch(stubs: Stubs, name: str, after: int = 0) -> list[pb.WatchJobResponse]:
    return list(stubs.jobs.WatchJob(pb.WatchJobRequest(name=name, after_sequence=after), timeout=DEADLINE))


def get(stubs: Stubs, name: str) -> pb.Job:
    return stubs.jobs.GetJob(pb.GetJobRequest(name=name), timeout=DEADLINE).job


def download(stubs: Stubs, name: str, filename: str):
    header, data = None, b""
    request = pb.DownloadArtifactRequest(name=name, filename=filename)
    for message in stubs.jobs.DownloadArtifact(request, timeout=DEADLINE):
        if message.HasField("file"):
            header = message.file
        else:
            data += message.chunk
    assert len(data) == header.size_bytes
    assert hashlib.sha256(data).hexdigest() == header.sha256
    return header, data


@pytest.fixture(scope="module")
def subject(stubs):
    return make_subject(stubs, "rex", placeholder="<rex>", display_name="Rex")


@pytest.fixture(scope="module")
def trained(stubs, subject):
    """A training that was watched to its end."""
    job = train(stubs, subject)
    assert job.state == pb.JOB_STATE_PENDING
    return job.name, watch(stubs, job.name)


def test_a_training_is_watched_from_pending_to_its_adapter(stubs, subject, trained):
    name, events = trained
    sequences = [event.sequence for event in events]
    assert sequences == list(range(1, len(events) + 1))
    states = [event.job.state for event in events if event.HasField("job")]
    assert states == [pb.JOB_STATE_PENDING, pb.JOB_STATE_RUNNING, pb.JOB_STATE_SUCCEEDED]
    progress = [event.progress for event in events if event.HasField("progress")]
    assert {"training"} <= {item.phase for item in progress}
    figures = [item.training for item in progress if item.phase == "training"]
    assert figures[-1].loss > 0
    assert figures[-1].drift_budget == pytest.approx(0.12)
    assert figures[-1].HasField("strength")
    previews = [preview for item in progress for preview in item.previews]
    assert previews
    assert previews[0].data.startswith(b"\x89PNG")
    job = events[-1].job
    assert job == get(stubs, name)
    assert job.kind == pb.JOB_KIND_TRAIN
    assert job.adapter == "tenants/local/adapters/rex@1"
    assert job.create_time.ToMicroseconds() <= job.start_time.ToMicroseconds() < job.end_time.ToMicroseconds()
    assert (job.train.subject, job.train.adapter_id) == (subject, "rex")
    assert (job.train.config.steps, job.train.config.rank) == (4, 2)
    assert job.train.config.learning_rate == 1e-3, "defaults are filled in"
    assert job.train.config.WhichOneof("strength") == "drift_budget"
    assert not job.HasField("error")


def test_watching_resumes_after_any_event(stubs, trained):
    name, events = trained
    for cut in (0, 1, len(events) // 2, len(events) - 1):
        resumed = watch(stubs, name, after=events[cut - 1].sequence if cut else 0)
        assert resumed == events[cut:]
    beyond = watch(stubs, name, after=events[-1].sequence)
    assert len(beyond) == 1, "who has seen everything still gets the end"
    assert beyond[0].job == events[-1].job
    assert beyond[0].sequence == events[-1].sequence


def test_a_watcher_that_leaves_does_not_stop_the_job(stubs, subject):
    job = train(stubs, subject, adapter_id="left-alone")
    call = stubs.jobs.WatchJob(pb.WatchJobRequest(name=job.name), timeout=DEADLINE)
    seen = next(call).sequence
    call.cancel()
    assert watch(stubs, job.name, after=seen)[-1].job.state == pb.JOB_STATE_SUCCEEDED


def test_the_trained_adapter_draws_its_subject(stubs, trained):
    adapter = trained[1][-1].job.adapter
    request = personalization_pb2.GenerateRequest(prompt="a photo of a <rex> dog", adapter=adapter, steps=2)
    responses = list(stubs.personalization.Generate(request, timeout=DEADLINE))
    assert responses[-1].done.adapter == adapter


def test_a_repeated_request_is_one_job(stubs, subject):
    request_id = str(uuid.uuid4())
    first = train(stubs, subject, adapter_id="once", request_id=request_id)
    assert train(stubs, subject, adapter_id="once", request_id=request_id).name == first.name
    failure = failure_of(lambda: train(stubs, subject, adapter_id="twice", request_id=request_id))
    assert failure.reason == "REQUEST_ID_REUSED"
    stubs.jobs.CancelJob(pb.CancelJobRequest(name=first.name), timeout=DEADLINE)


def test_cancelling_stops_a_running_job_at_its_next_step(stubs, subject):
    job = train(stubs, subject, config={"steps": 5000}, adapter_id="never")
    call = stubs.jobs.WatchJob(pb.WatchJobRequest(name=job.name), timeout=DEADLINE)
    next(event for event in call if event.progress.phase == "training")
    asked = stubs.jobs.CancelJob(pb.CancelJobRequest(name=job.name), timeout=DEADLINE).job
    assert asked.cancel_requested
    last = list(call)[-1].job
    assert last.state == pb.JOB_STATE_CANCELLED
    assert read_status(last.error).reason == "CANCELLED"
    again = stubs.jobs.CancelJob(pb.CancelJobRequest(name=job.name), timeout=DEADLINE).job
    assert again.state == pb.JOB_STATE_CANCELLED
    failure = failure_of(lambda: download(stubs, job.name, "x"))
    assert failure.reason == "JOB_HAS_NO_RESULT"


def test_a_finished_job_cannot_be_cancelled(stubs, trained):
    failure = failure_of(lambda: stubs.jobs.CancelJob(pb.CancelJobRequest(name=trained[0])))
    assert (failure.code.name, failure.reason) == ("FAILED_PRECONDITION", "JOB_NOT_CANCELLABLE")


def test_a_failure_after_the_start_is_in_the_job_with_reason_and_remedy(stubs, runtime):
    spec = {"subject": "nobody", "adapter_id": "x", "config": {"method": "none"}}
    job = runtime.store.create_job("local", "train", spec)
    last = watch(stubs, f"tenants/local/jobs/{job.job_id}")[-1].job
    assert last.state == pb.JOB_STATE_FAILED
    failure = read_status(last.error)
    assert failure.reason == "SUBJECT_NOT_FOUND"
    assert failure.metadata["remedy"]
    assert last.adapter == ""


@pytest.mark.parametrize(
    ("config", "code", "reason", "field"),
    [
        ({"steps": 0}, "OUT_OF_RANGE", "STEPS_OUT_OF_RANGE", "config.steps"),
        ({"steps": 20_001}, "OUT_OF_RANGE", "STEPS_OUT_OF_RANGE", "config.steps"),
        ({"rank": 9}, "INVALID_ARGUMENT", "ADAPTER_RANK_TOO_LARGE", "config.rank"),
        ({"rank": 0}, "INVALID_ARGUMENT", "INVALID_FIELD", "config.rank"),
        ({"learning_rate": -1.0}, "INVALID_ARGUMENT", "INVALID_FIELD", "config.learning_rate"),
        ({"learning_rate": float("nan")}, "INVALID_ARGUMENT", "INVALID_FIELD", "config.learning_rate"),
        ({"drift_budget": 0.0}, "INVALID_ARGUMENT", "INVALID_FIELD", "config.drift_budget"),
        ({"fixed_strength": -1.0}, "INVALID_ARGUMENT", "INVALID_FIELD", "config.fixed_strength"),
        ({"method": 99}, "INVALID_ARGUMENT", "INVALID_FIELD", "config.method"),
        ({"preset": 99}, "INVALID_ARGUMENT", "INVALID_FIELD", "config.preset"),
        ({"method": training_pb2.TRAINING_METHOD_NONE, "drift_budget": 0.1},
         "INVALID_ARGUMENT", "INVALID_FIELD", "config.drift_budget"),
    ],
)  # fmt: skip
def test_bad_training_requests_never_become_jobs(stubs, subject, config, code, reason, field):
    before = list_jobs(stubs)
    failure = failure_of(lambda: train(stubs, subject, config=config))
    assert (failure.code.name, failure.reason, list(failure.fields)) == (code, reason, [field])
    assert ({"minimum", "maximum"} <= set(failure.metadata)) == (reason == "STEPS_OUT_OF_RANGE")
    assert list_jobs(stubs) == before


def test_training_needs_a_subject_that_exists_with_photos_and_a_good_adapter_id(stubs, subject, runtime):
    assert failure_of(lambda: train(stubs, "tenants/local/subjects/nobody")).reason == "SUBJECT_NOT_FOUND"
    assert failure_of(lambda: train(stubs, "rex")).reason == "BAD_RESOURCE_NAME"
    assert list(failure_of(lambda: train(stubs, "")).fields) == ["subject"]
    empty = make_subject(stubs, "empty", photos=0)
    failure = failure_of(lambda: train(stubs, empty))
    assert (failure.code.name, failure.reason) == ("FAILED_PRECONDITION", "SUBJECT_HAS_NO_PHOTOS")
    assert list(failure_of(lambda: train(stubs, subject, adapter_id="Bad Id")).fields) == ["adapter_id"]
    failure = failure_of(lambda: train(stubs, subject, parent="tenants/rival"))
    assert (failure.code.name, failure.reason) == ("PERMISSION_DENIED", "NOT_ALLOWED")
    rights = {"basis": "owned"}
    runtime.store.create_subject("rival", "hidden", class_noun="dog", placeholder="<h>", rights=rights)
    told = {
        failure_of(lambda tenant=tenant: train(stubs, f"tenants/{tenant}/subjects/hidden")).message
        for tenant in ("rival", "void", "local")
    }
    assert len(told) == 1


def list_jobs(stubs, **values) -> list[str]:
    found, token = [], ""
    while True:
        request = pb.ListJobsRequest(page_size=3, page_token=token, **values)
        page = stubs.jobs.ListJobs(request, timeout=DEADLINE)
        found += [job.name for job in page.jobs]
        token = page.next_page_token
        if not token:
            return found


def test_jobs_are_listed_by_kind_and_state_in_pages(stubs, trained, evaluated):
    everything = list_jobs(stubs)
    assert len(everything) == len(set(everything)) > 3
    trainings = list_jobs(stubs, kind=pb.JOB_KIND_TRAIN)
    assert trained[0] in trainings
    assert evaluated.name not in trainings
    kinds = [kind for kind in pb.JobKind.values() if kind != pb.JOB_KIND_UNSPECIFIED]
    assert sorted(job for kind in kinds for job in list_jobs(stubs, kind=kind)) == sorted(everything)
    assert trained[0] in list_jobs(stubs, state=pb.JOB_STATE_SUCCEEDED)
    assert trained[0] not in list_jobs(stubs, state=pb.JOB_STATE_CANCELLED)
    assert failure_of(lambda: list_jobs(stubs, kind=99)).reason == "INVALID_FIELD"


def test_bad_job_names(stubs, runtime):
    for call in (
        lambda name: get(stubs, name),
        lambda name: watch(stubs, name),
        lambda name: stubs.jobs.CancelJob(pb.CancelJobRequest(name=name)),
        lambda name: stubs.jobs.GetEvaluation(pb.GetEvaluationRequest(name=name)),
        lambda name: download(stubs, name, "x"),
    ):
        assert failure_of(lambda call=call: call("jobs/1")).reason == "BAD_RESOURCE_NAME"
        assert failure_of(lambda call=call: call("tenants/local/jobs/none")).reason == "JOB_NOT_FOUND"
    theirs = runtime.store.create_job("rival", "unknown-kind", {})
    assert failure_of(lambda: get(stubs, f"tenants/rival/jobs/{theirs.job_id}")).reason == "JOB_NOT_FOUND"
    assert failure_of(lambda: watch(stubs, "tenants/-/jobs/x", after=-1)).reason == "INVALID_FIELD"


# ---------------------------------------------------------------------------------------------- evaluation

FEW = {
    "prompts": ["a photo of a {} in snow"],
    "generic_prompts": ["a red car", "a cat on grass"],
    "seeds": [1],
    "steps": 2,
    "class_samples": 2,
}


def evaluate(stubs: Stubs, **values) -> pb.Job:
    request = personalization_pb2.EvaluateRequest(**{"config": FEW, **values})
    return stubs.personalization.Evaluate(request, timeout=DEADLINE).job


def figures_of(stubs, job):
    return stubs.jobs.GetEvaluation(pb.GetEvaluationRequest(name=job.name), timeout=DEADLINE).evaluation


@pytest.fixture(scope="module")
def evaluated(stubs, trained):
    job = evaluate(stubs, adapter="tenants/-/adapters/rex")
    assert job.evaluate.adapter == "tenants/local/adapters/rex@1", (
        "the version is pinned when the job is made"
    )
    return watch(stubs, job.name)[-1].job


def test_an_evaluation_has_figures_with_intervals_and_every_prompts_values(stubs, evaluated, runtime):
    assert evaluated.state == pb.JOB_STATE_SUCCEEDED, evaluated.error
    result = stubs.jobs.GetEvaluation(
        pb.GetEvaluationRequest(name=evaluated.name), timeout=DEADLINE
    ).evaluation
    assert result.adapter == "tenants/local/adapters/rex@1"
    assert result.base_digest == runtime.base.digest
    metrics = {metric.name: metric for metric in result.metrics}
    assert {"clip_t", "clip_i", "dino", "pres", "div", "generic_clip_t", "base_clip_t"} <= metrics.keys()
    assert -1 <= metrics["dino"].value <= 1
    assert metrics["dino"].higher_is_better
    assert not metrics["pres"].higher_is_better
    assert result.drift.low <= result.drift.value <= result.drift.high
    assert result.certificate.layers
    assert all(layer.sigma_max >= 0 for layer in result.certificate.layers)
    rows = [row for row in result.prompts if row.prompt == "a photo of a <rex> dog in snow"]
    assert [row.seed for row in rows] == [1]
    assert rows[0].base_prompt == "a photo of a dog in snow"
    assert {metric.name for metric in rows[0].metrics} >= {"clip_t", "dino"}
    for filename in (rows[0].image, rows[0].base_image):
        header, data = download(stubs, evaluated.name, filename)
        assert header.media_type == "image/png"
        assert data.startswith(b"\x89PNG")


def test_its_report_and_figures_download_as_listed(stubs, evaluated):
    listed = {artifact.filename: artifact for artifact in evaluated.artifacts}
    header, page = download(stubs, evaluated.name, "report.html")
    assert header.media_type == "text/html"
    told = listed["report.html"]
    assert (header.size_bytes, header.sha256) == (told.size_bytes, told.sha256)
    assert b"<html" in page[:500].lower()
    assert json.loads(download(stubs, evaluated.name, "evaluation.json")[1])["metrics"]
    failure = failure_of(lambda: download(stubs, evaluated.name, "../evaluation.json"))
    assert (failure.code.name, failure.reason) == ("NOT_FOUND", "ARTIFACT_NOT_FOUND")


def test_the_base_alone_is_evaluated_too(stubs, subject):
    job = watch(stubs, evaluate(stubs, subject=subject).name)[-1].job
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
    result = figures_of(stubs, job)
    assert (result.adapter, result.adapter_digest) == ("", "")
    assert not result.HasField("drift")
    assert not result.HasField("certificate")


def test_bad_evaluations_never_become_jobs(stubs, subject, runtime):
    publish(runtime, "foreign", base_digest="sha256:" + "1" * 64)
    publish(runtime, "orphan")
    cases = [
        ({}, "INVALID_FIELD"),
        ({"adapter": "tenants/-/adapters/nobody", "subject": subject}, "ADAPTER_NOT_FOUND"),
        ({"adapter": "tenants/-/adapters/foreign", "subject": subject}, "BASE_DIGEST_MISMATCH"),
        ({"adapter": "tenants/-/adapters/orphan"}, "INVALID_FIELD"),
        ({"subject": "tenants/-/subjects/nobody"}, "SUBJECT_NOT_FOUND"),
        ({"subject": subject, "config": {**FEW, "steps": 151}}, "STEPS_OUT_OF_RANGE"),
        ({"subject": subject, "config": {**FEW, "prompts": [" "]}}, "EMPTY_PROMPT"),
        ({"subject": subject, "config": {**FEW, "seeds": range(17)}}, "INVALID_FIELD"),
        (
            {"subject": subject, "config": {**FEW, "prompts": ["a {} on the red beach " * 4]}},
            "PROMPT_TOO_LONG",
        ),
    ]
    for values, reason in cases:
        assert failure_of(lambda values=values: evaluate(stubs, **values)).reason == reason, values


def test_default_prompts_that_do_not_fit_a_long_class_noun_are_left_out(stubs):
    noun = "red and blue and small toy duck"
    subject = make_subject(stubs, "long-noun", class_noun=noun)
    job = evaluate(stubs, subject=subject, config={"generic_prompts": FEW["generic_prompts"]})
    stubs.jobs.CancelJob(pb.CancelJobRequest(name=job.name), timeout=DEADLINE)
    assert 0 < len(job.evaluate.config.prompts) < 6


def test_a_training_has_no_evaluation(stubs, trained):
    failure = failure_of(lambda: stubs.jobs.GetEvaluation(pb.GetEvaluationRequest(name=trained[0])))
    assert (failure.code.name, failure.reason) == ("FAILED_PRECONDITION", "JOB_HAS_NO_RESULT")
