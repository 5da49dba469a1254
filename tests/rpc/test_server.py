"""The server as a process and as any client meets it: health, reflection, buf curl, metrics, drain."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from mooring.v1 import job_pb2, personalization_pb2
from mooring_server.errors import MooringError, Reason
from mooring_server.jobs import train_job
from mooring_server.server import EmbeddedServer
from rpc_calls import DEADLINE, Stubs, failure_of, make_subject, settings_for

OURS = {
    "mooring.v1.PersonalizationService",
    "mooring.v1.SubjectService",
    "mooring.v1.AdapterService",
    "mooring.v1.JobService",
}
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
BUF = Path(sys.executable).parent / "buf"


def health_of(channel, service="") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE).status


def test_every_service_is_healthy_once_the_base_is_resident(stubs):
    for service in ("", *OURS):
        assert health_of(stubs.channel, service) == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        health_of(stubs.channel, "mooring.v1.Nothing")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_health_lists_every_service(stubs):
    stub = health_pb2_grpc.HealthStub(stubs.channel)
    listed = stub.List(health_pb2.HealthListRequest(), timeout=DEADLINE).statuses
    assert {name: answer.status for name, answer in listed.items()} == dict.fromkeys(("", *OURS), SERVING)


def test_reflection_lists_and_describes_every_service(stubs):
    database = ProtoReflectionDescriptorDatabase(stubs.channel)
    services = set(database.get_services())
    assert services == OURS | {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    described = database.FindFileContainingSymbol("mooring.v1.PersonalizationService")
    assert isinstance(described, descriptor_pb2.FileDescriptorProto)
    assert "Generate" in [method.name for method in described.service[0].method]
    for service in services:
        assert database.FindFileContainingSymbol(service).service


def buf_curl(target: str, path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        BUF,
        "curl",
        "--protocol",
        "grpc",
        "--http2-prior-knowledge",
        *arguments,
        f"http://{target}{path}",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)


def test_any_client_can_list_and_generate_with_reflection_alone(server):
    listed = buf_curl(server.target, "", "--list-services")
    assert listed.returncode == 0, listed.stderr
    assert set(listed.stdout.split()) >= OURS
    request = json.dumps({"prompt": "a photo of a dog", "steps": 2})
    drawn = buf_curl(server.target, "/mooring.v1.PersonalizationService/Generate", "-d", request)
    assert drawn.returncode == 0, drawn.stderr
    decoder, text, events = json.JSONDecoder(), drawn.stdout.strip(), []
    while text:
        event, end = decoder.raw_decode(text)
        events.append(event)
        text = text[end:].strip()
    assert events[-1]["done"]["images"] == 1
    images = [event["image"] for event in events if "image" in event]
    assert images[0]["data"].startswith("iVBORw0KGgo"), "a PNG in base64"


def test_any_client_can_read_why_a_call_failed(server):
    refused = buf_curl(server.target, "/mooring.v1.PersonalizationService/Generate", "-d", '{"prompt": ""}')
    assert refused.returncode != 0
    error = json.loads(refused.stderr)
    assert error["code"] == "invalid_argument"
    details = {detail["type"]: base64.b64decode(detail["value"] + "==") for detail in error["details"]}
    info = error_details_pb2.ErrorInfo.FromString(details["google.rpc.ErrorInfo"])
    assert (info.domain, info.reason) == ("mooring", "EMPTY_PROMPT")


# ---------------------------------------------------------------------------------------------- metrics


def scrape(server) -> dict[str, float]:
    text = urllib.request.urlopen(server.metrics_url, timeout=DEADLINE).read().decode()
    return {
        match[1]: float(match[2])
        for match in re.finditer(r"^([a-zA-Z_:]+(?:\{[^}]*\})?) ([-+0-9.eEInfNa]+)$", text, re.MULTILINE)
    }


def total(samples: dict[str, float], name: str, *labels: str) -> float:
    return sum(
        value
        for key, value in samples.items()
        if key.partition("{")[0] == name and all(label in key for label in labels)
    )


def test_metrics_count_what_was_done(server, stubs):
    before = scrape(server)
    # a prompt that no other test has had encoded
    request = personalization_pb2.GenerateRequest(prompt="a dog a dog a photo", steps=3, count=2)
    list(stubs.personalization.Generate(request, timeout=DEADLINE))
    after = scrape(server)

    def grew(name: str, *labels: str) -> float:
        return total(after, name, *labels) - total(before, name, *labels)

    assert grew("mooring_images_total") == 2
    assert grew("mooring_steps_total") == 6
    assert grew("grpc_server_handled_total", 'grpc_method="Generate"', 'grpc_code="OK"') == 1
    assert grew("mooring_queue_wait_seconds_count", 'class="interactive"') == 1
    assert grew("mooring_stage_seconds_count", 'stage="denoise"') == 3
    assert grew("mooring_prompt_cache_queries_total") > grew("mooring_prompt_cache_hits_total")
    assert grew("mooring_stage_seconds_count", 'stage="text_encode"') >= 1
    assert grew("mooring_stage_seconds_count", 'stage="decode"') == 2
    assert grew("mooring_batch_rows_count") == 3
    assert grew("mooring_tick_seconds_count", 'class="interactive"') >= 3
    assert total(after, "mooring_ready") == 1
    assert total(after, "mooring_device_bytes", 'kind="weights"') > 10_000
    assert total(after, "mooring_build_info") == 1
    assert total(after, "mooring_queue_depth", 'class="interactive"') == 0


def test_a_running_training_shows_its_figures(server, stubs):
    subject = make_subject(stubs, "measured")
    config = {"steps": 3000, "rank": 2, "batch_size": 1, "views": 1, "probe_every": 2, "preview_every": 0}
    request = personalization_pb2.TrainRequest(subject=subject, config=config)
    job = stubs.personalization.Train(request, timeout=DEADLINE).job
    watch = stubs.jobs.WatchJob(job_pb2.WatchJobRequest(name=job.name), timeout=DEADLINE)
    next(event for event in watch if event.progress.training.HasField("drift"))
    samples = scrape(server)
    assert samples['mooring_jobs{kind="train",state="RUNNING"}'] == 1
    assert samples["mooring_training_budget"] == pytest.approx(0.12)
    assert samples["mooring_training_drift"] >= 0
    assert samples["mooring_training_strength"] >= 0
    assert samples["mooring_training_sigma_max"] >= 0
    by_layer = [s for name, s in samples.items() if name.startswith("mooring_training_layer_sigma{layer=")]
    assert max(by_layer) == samples["mooring_training_sigma_max"]
    stubs.jobs.CancelJob(job_pb2.CancelJobRequest(name=job.name), timeout=DEADLINE)
    assert list(watch)[-1].job.state == job_pb2.JOB_STATE_CANCELLED
    samples = scrape(server)
    assert samples['mooring_jobs{kind="train",state="CANCELLED"}'] >= 1
    assert "mooring_training_drift" not in samples


# ---------------------------------------------------------------------------------------------- life


def test_an_address_in_use_is_said(server, tiny_sd15, tmp_path):
    from mooring_server.server import Server

    taken = settings_for(tiny_sd15, tmp_path, listen=server.target, metrics_listen="")

    async def start():
        await Server(taken).start()

    import asyncio

    with pytest.raises(MooringError) as caught:
        asyncio.run(start())
    assert caught.value.reason is Reason.INVALID_FIELD
    assert server.target in caught.value.message


def test_a_base_that_cannot_be_loaded_ends_the_start_with_the_reason(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MooringError) as caught, EmbeddedServer(settings_for(tmp_path / "empty", tmp_path)):
        pass
    assert caught.value.reason is Reason.BASE_NOT_USABLE


def test_one_judge_alone_is_refused(tiny_sd15, tmp_path):
    settings = settings_for(tiny_sd15, tmp_path, clip_judge=str(tmp_path))
    with pytest.raises(MooringError) as caught, EmbeddedServer(settings):
        pass
    assert caught.value.reason is Reason.JUDGES_NOT_AVAILABLE


@pytest.fixture
def small_server(tiny_sd15, tmp_path):
    with EmbeddedServer(settings_for(tiny_sd15, tmp_path)) as running:
        yield running


def test_without_judges_evaluation_is_refused_and_announced(small_server):
    stubs = Stubs(small_server.target)
    info = stubs.personalization.GetServerInfo(personalization_pb2.GetServerInfoRequest(), timeout=DEADLINE)
    assert not info.evaluation_available
    subject = make_subject(stubs, "rex")
    request = personalization_pb2.EvaluateRequest(subject=subject)
    failure = failure_of(lambda: stubs.personalization.Evaluate(request, timeout=DEADLINE))
    assert (failure.code.name, failure.reason) == ("FAILED_PRECONDITION", "JUDGES_NOT_AVAILABLE")


@pytest.fixture
def waits_to_be_drained(monkeypatch):
    """Trainings go no further than their twentieth step until their server drains."""
    report = train_job._report

    def held(session, progress):
        report(session, progress)
        while progress.phase == "training" and progress.step == 20 and not session.wanted():
            time.sleep(0.01)

    monkeypatch.setattr(train_job, "_report", held)


def test_a_job_handed_back_at_shutdown_goes_on_with_the_next_server(tiny_sd15, tmp_path, waits_to_be_drained):
    settings = settings_for(tiny_sd15, tmp_path, drain_seconds=DEADLINE)
    config = {"steps": 60, "rank": 2, "batch_size": 1, "views": 1, "checkpoint_every": 5, "preview_every": 0}
    with EmbeddedServer(settings) as first:
        stubs = Stubs(first.target)
        request = personalization_pb2.TrainRequest(subject=make_subject(stubs, "rex"), config=config)
        job = stubs.personalization.Train(request, timeout=DEADLINE).job
        watch = stubs.jobs.WatchJob(job_pb2.WatchJobRequest(name=job.name), timeout=DEADLINE)
        event = next(event for event in watch if event.progress.step >= 20)
        closed = threading.Thread(target=first.__exit__, args=(None, None, None))
        closed.start()
        failure = failure_of(lambda: watch)  # the watcher is told, rather than cut off
        assert (failure.code.name, failure.reason, failure.retry) == ("UNAVAILABLE", "DRAINING", True)
        closed.join()
    with EmbeddedServer(settings) as second:
        stubs = Stubs(second.target)
        request = job_pb2.WatchJobRequest(name=job.name, after_sequence=event.sequence)
        events = list(stubs.jobs.WatchJob(request, timeout=DEADLINE))
        states = [event.job.state for event in events if event.HasField("job")]
        assert states == [job_pb2.JOB_STATE_PENDING, job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_SUCCEEDED]
        assert events[-1].job.adapter.endswith("/rex@1")


PROGRAM = """
import asyncio, sys
from mooring_server.config import Settings
from mooring_server.server import serve
asyncio.run(serve(Settings(), on_ready=lambda target: print(target, flush=True)))
"""


def start_process(tiny_sd15, tmp_path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "MOORING_BASE": str(tiny_sd15),
        "MOORING_STATE_DIR": str(tmp_path),
        "MOORING_LISTEN": "127.0.0.1:0",
        "MOORING_METRICS_LISTEN": "",
        "MOORING_THREADS": "1",
        "MOORING_DRAIN_PAUSE_SECONDS": "5",
        "MOORING_DRAIN_SECONDS": str(DEADLINE),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_sigterm_answers_the_running_call_says_not_serving_and_exits_0(tiny_sd15, tmp_path):
    process = start_process(tiny_sd15, tmp_path)
    try:
        assert process.stdout is not None
        target = process.stdout.readline().strip()
        assert target.startswith("127.0.0.1:")
        stubs = Stubs(target)
        health = health_pb2_grpc.HealthStub(stubs.channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=DEADLINE
        )
        assert next(health).status == SERVING
        request = personalization_pb2.GenerateRequest(prompt="a photo of a dog", steps=30, count=2)
        call = stubs.personalization.Generate(request, timeout=DEADLINE)
        next(call)
        process.send_signal(signal.SIGTERM)
        assert next(health).status == NOT_SERVING
        # during the pause, calls are still answered: load balancers have not noticed yet
        assert stubs.personalization.GetServerInfo(
            personalization_pb2.GetServerInfoRequest(), timeout=DEADLINE
        ).version
        responses = list(call)
        seen = [response.WhichOneof("event") for response in responses]
        assert seen.count("image") == 2
        assert seen[-1] == "done"
        _, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0
    finally:
        process.kill()
    lines = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    events = [line["event"] for line in lines]
    assert events.index("serving") < events.index("draining") < events.index("stopped")
    calls = [line for line in lines if line["event"] == "rpc" and line["method"].endswith("/Generate")]
    assert [(line["code"], line["tenant"]) for line in calls] == [("OK", "local")]


def test_a_base_of_the_sdxl_layout_is_served_by_the_same_code(tiny_sdxl, tmp_path):
    with EmbeddedServer(settings_for(tiny_sdxl, tmp_path)) as running:
        stubs = Stubs(running.target)
        info = stubs.personalization.GetServerInfo(
            personalization_pb2.GetServerInfoRequest(), timeout=DEADLINE
        )
        assert info.base.kind == "sdxl"
        request = personalization_pb2.GenerateRequest(prompt="a photo of a dog", steps=2)
        responses = list(stubs.personalization.Generate(request, timeout=DEADLINE))
        assert responses[-1].done.base_digest == info.base.digest
        config = {"steps": 2, "rank": 2, "batch_size": 1, "views": 1, "preview_every": 0}
        request = personalization_pb2.TrainRequest(subject=make_subject(stubs, "rex"), config=config)
        name = stubs.personalization.Train(request, timeout=DEADLINE).job.name
        last = list(stubs.jobs.WatchJob(job_pb2.WatchJobRequest(name=name), timeout=DEADLINE))[-1].job
        assert last.state == job_pb2.JOB_STATE_SUCCEEDED, last.error
