"""What the commands print and return, against a scripted server."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from mooring.v1 import (
    adapter_pb2,
    evaluation_pb2,
    job_pb2,
    media_pb2,
    personalization_pb2,
    subject_pb2,
    training_pb2,
)
from mooring_server.cli import app
from PIL import Image
from scripted_server import ScriptedServer, abort_with
from typer.testing import CliRunner, Result

JOB = "tenants/local/jobs/0123456789abcdef0123456789abcdef"


def run(server: ScriptedServer, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--server", server.target])


# -- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 2),
        (grpc.StatusCode.OUT_OF_RANGE, 2),
        (grpc.StatusCode.NOT_FOUND, 3),
        (grpc.StatusCode.FAILED_PRECONDITION, 4),
        (grpc.StatusCode.ALREADY_EXISTS, 4),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 5),
        (grpc.StatusCode.INTERNAL, 1),
    ],
)
def test_errors_are_a_line_a_remedy_and_an_exit_code(
    server: ScriptedServer, code: grpc.StatusCode, exit_code: int
) -> None:
    server.answers["GetAdapter"] = lambda _, c: abort_with(
        c, code, "Adapter [rex] is odd.", reason="R", remedy="Do this.", fields={"name": "odd [one]"}
    )
    result = run(server, "adapters", "show", "rex")
    assert result.exit_code == exit_code
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: Adapter [rex] is odd.",
        "  → Do this.",
        "    name: odd [one]",
    ]


def test_a_server_that_is_not_there_is_one_clear_line() -> None:
    result = CliRunner().invoke(app, ["jobs", "list", "--server", "127.0.0.1:1"])
    assert result.exit_code == 5
    assert result.stderr.startswith("error: The server cannot be reached.\n")
    assert "mooring serve" in result.stderr
    assert "Traceback" not in result.stderr


def test_usage_errors_exit_with_2(server: ScriptedServer, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments in (
        ["evaluate"],
        ["train", "rex", "--method", "magic"],
        ["train", "rex", "--preset", "balanced", "--budget", "0.1"],
        ["subjects", "upload", "rex", str(tmp_path / "no.jpg")],
        ["subjects", "upload", "rex", str(empty)],
        ["generate", "a dog", "--count", "0"],
    ):
        result = run(server, *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert "Traceback" not in result.output
    assert not server.calls


# -- subjects -----------------------------------------------------------------------------------------------


def test_subjects_create_takes_folders_of_photos(server: ScriptedServer, tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "notes.txt"):
        (tmp_path / name).write_bytes(name.encode())
    names: list[str] = []
    subject = subject_pb2.Subject(
        name="tenants/local/subjects/rex", class_noun="dog", placeholder="<rex>", photo_count=2
    )

    def create(request: subject_pb2.CreateSubjectRequest, _: Any) -> Any:
        assert request.subject.rights.basis == subject_pb2.RightsDeclaration.BASIS_LICENSED
        return subject_pb2.CreateSubjectResponse(subject=subject)

    def upload(messages: Any, _: Any) -> Any:
        names.extend(m.file.filename for m in messages if m.WhichOneof("content") == "file")
        return subject_pb2.UploadPhotosResponse(added_count=2, subject=subject)

    server.answers.update({"CreateSubject": create, "UploadPhotos": upload})
    result = run(server, "subjects", "create", "rex", str(tmp_path), "--class", "dog", "--rights", "licensed")
    assert result.exit_code == 0, result.output
    assert names == ["a.png", "b.JPG"]
    assert "subject rex: 2 photos, dog, in prompts <rex>" in result.stdout
    assert "next: mooring train rex" in result.stdout


# -- training -----------------------------------------------------------------------------------------------


def trained(server: ScriptedServer, state: int = job_pb2.JOB_STATE_SUCCEEDED) -> None:
    """Let the server train: ten steps, then the terminal state."""
    spec = training_pb2.TrainSpec(subject="tenants/local/subjects/rex", adapter_id="rex")

    def watch(_: Any, __: Any) -> Any:
        for step in range(1, 11):
            message = job_pb2.WatchJobResponse(sequence=step)
            message.progress.phase, message.progress.step, message.progress.steps = "training", step, 10
            message.progress.training.loss = 0.5
            message.progress.training.drift, message.progress.training.drift_budget = 0.04, 0.05
            message.progress.training.strength = 0.031
            message.progress.training.sigma_max = 0.82
            message.progress.time_left.FromSeconds(10 - step)
            yield message
        ended = job_pb2.Job(name=JOB, state=state, adapter="tenants/local/adapters/rex@3", train=spec)
        ended.start_time.FromSeconds(1000)
        ended.end_time.FromSeconds(1065)
        if state == job_pb2.JOB_STATE_FAILED:
            ended.error.message = "The loss became NaN."
        yield job_pb2.WatchJobResponse(sequence=10, job=ended)

    server.answers["Train"] = lambda _, __: personalization_pb2.TrainResponse(
        job=job_pb2.Job(name=JOB, train=spec)
    )
    server.answers["WatchJob"] = watch
    adapter = adapter_pb2.Adapter(
        name="tenants/local/adapters/rex@3", placeholder="<rex>", class_noun="dog", drift_budget=0.05
    )
    adapter.drift.value = 0.048
    server.answers["GetAdapter"] = lambda _, __: adapter_pb2.GetAdapterResponse(adapter=adapter)


def test_train_shows_what_the_run_is_steered_by(server: ScriptedServer) -> None:
    trained(server)
    result = run(server, "train", "rex")
    assert result.exit_code == 0, result.output
    assert "adapter rex@3 in 1:05, drift 0.048 of 0.050" in result.stdout
    assert "next: mooring generate" in result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 10, "one line per tenth where there is no terminal"
    assert (
        lines[3]
        == "rex (spectral) training 4/10  loss 0.500  drift 0.040/0.050  λ 3.1e-02  σ 0.82  0:06 left"
    )


def test_train_takes_how_photos_are_seen_and_how_often_the_drift_is_measured(server: ScriptedServer) -> None:
    trained(server)
    answer, seen = server.answers["Train"], []
    server.answers["Train"] = lambda request, context: seen.append(request) or answer(request, context)
    options = "--framing letterbox --views 4 --flip --probe-every 20 --detach"
    assert run(server, "train", "rex", *options.split()).exit_code == 0
    assert run(server, "train", "rex", "--detach").exit_code == 0
    config, plain = (request.config for request in seen)
    assert config.framing == training_pb2.PHOTO_FRAMING_LETTERBOX
    assert (config.views, config.flip, config.probe_every) == (4, True, 20)
    assert not any(plain.HasField(name) for name in ("views", "flip", "probe_every"))


def test_train_prints_json_for_programs(server: ScriptedServer) -> None:
    trained(server)
    result = run(server, "train", "rex", "--json")
    document = json.loads(result.stdout)
    assert document["adapter"]["name"] == "tenants/local/adapters/rex@3"
    assert document["job"]["state"] == "JOB_STATE_SUCCEEDED"
    assert result.stderr == ""


def test_a_failed_training_exits_with_6(server: ScriptedServer) -> None:
    trained(server, job_pb2.JOB_STATE_FAILED)
    result = run(server, "train", "rex")
    assert result.exit_code == 6
    assert "error: The loss became NaN." in result.stderr


def test_detached_training_names_its_job(server: ScriptedServer) -> None:
    trained(server)
    result = run(server, "train", "rex", "--detach")
    assert result.exit_code == 0
    assert JOB.rsplit("/", 1)[1] in result.stdout
    assert "WatchJob" not in server.calls


def test_jobs_watch_prints_a_json_line_per_event(server: ScriptedServer) -> None:
    trained(server)
    job = job_pb2.Job(
        name=JOB, state=job_pb2.JOB_STATE_SUCCEEDED, train=training_pb2.TrainSpec(adapter_id="rex")
    )
    server.answers["GetJob"] = lambda _, __: job_pb2.GetJobResponse(job=job)
    server.answers["ListJobs"] = lambda _, __: job_pb2.ListJobsResponse(jobs=[job])
    result = run(server, "jobs", "watch", "0123", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == 11
    assert lines[0]["drift"] == 0.04
    assert lines[-1]["job"]["state"] == "JOB_STATE_SUCCEEDED"


def test_first_digits_name_a_job_only_when_they_are_enough(server: ScriptedServer) -> None:
    twins = [job_pb2.Job(name=f"tenants/local/jobs/01{i:030}") for i in range(2)]
    server.answers["ListJobs"] = lambda _, __: job_pb2.ListJobsResponse(jobs=twins)
    result = run(server, "jobs", "cancel", "01")
    assert result.exit_code == 2
    assert "2 jobs start with '01'" in result.stderr


# -- images -------------------------------------------------------------------------------------------------


def test_generate_saves_images_and_previews(server: ScriptedServer, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, format="PNG")
    data = buffer.getvalue()
    seen: list[personalization_pb2.GenerateRequest] = []

    def generate(request: personalization_pb2.GenerateRequest, _: Any) -> Any:
        seen.append(request)
        response = personalization_pb2.GenerateResponse
        preview = media_pb2.PreviewImage(index=1, media_type="image/png", width=8, height=8, data=data)
        yield response(progress=personalization_pb2.GenerateProgress(step=5, steps=25, previews=[preview]))
        for index in range(2):
            yield response(
                image=media_pb2.ImageChunk(
                    index=index,
                    seed=7 + index,
                    width=8,
                    height=8,
                    media_type="image/png",
                    size_bytes=len(data),
                    sha256=hashlib.sha256(data).hexdigest(),
                    data=data,
                    last=True,
                )
            )
        name, unknown = "tenants/local/adapters/rex@3", ["zeppelin", "[bold]"]
        yield response(done=personalization_pb2.GenerateDone(images=2, adapter=name, unknown_words=unknown))

    server.answers["Generate"] = generate
    arguments = ["generate", "A <rex> dog/../here!", "-a", "rex", "-n", "2", "--seed", "7", "--previews", "5"]
    result = run(server, *arguments, "-o", str(tmp_path / "new"))
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "a-rex-dog-here-7.png",
        "a-rex-dog-here-8-step005.png",
        "a-rex-dog-here-8.png",
    ]
    assert (seen[0].seed, seen[0].count, seen[0].preview_interval) == (7, 2, 5)
    assert "2 by rex@3" in result.stdout
    assert "not trained on: zeppelin, [bold]" in result.stderr
    document = json.loads(run(server, *arguments, "-o", str(tmp_path), "--json").stdout)
    assert [image["seed"] for image in document["images"]] == [7, 8]
    assert document["unknown_words"] == ["zeppelin", "[bold]"]


def test_generate_takes_several_adapters_with_their_scales(server: ScriptedServer, tmp_path: Path) -> None:
    seen: list[personalization_pb2.GenerateRequest] = []

    def generate(request: personalization_pb2.GenerateRequest, _: Any) -> Any:
        seen.append(request)
        used = personalization_pb2.UsedAdapter(adapter="tenants/local/adapters/cup@2", digest="sha256:c")
        name = "tenants/local/adapters/rex@3"
        done = personalization_pb2.GenerateDone(images=1, adapter=name, more_adapters=[used])
        yield personalization_pb2.GenerateResponse(done=done)

    server.answers["Generate"] = generate
    arguments = ["generate", "a <rex> dog with a <cup>", "-a", "rex", "-a", "cup:0.7", "-o", str(tmp_path)]
    result = run(server, *arguments)
    assert result.exit_code == 0, result.output
    assert "by rex@3 and cup@2" in result.stdout
    assert seen[0].adapter == "tenants/-/adapters/rex"
    assert not seen[0].HasField("adapter_scale")
    assert [use.adapter for use in seen[0].more_adapters] == ["tenants/-/adapters/cup"]
    assert seen[0].more_adapters[0].scale == pytest.approx(0.7)
    document = json.loads(run(server, *arguments, "--scale", "1.5", "--json").stdout)
    assert document["more_adapters"] == {"tenants/local/adapters/cup@2": "sha256:c"}
    assert seen[1].adapter_scale == 1.5
    assert seen[1].more_adapters[0].scale == pytest.approx(0.7)
    for wrong, says in ((["-a", "cup:much"], "no scale"), (["-a", "rex"], "given twice")):
        refused = run(server, *arguments, *wrong)
        assert refused.exit_code == 2
        assert says in refused.stderr
    assert len(seen) == 2


# -- evaluation ---------------------------------------------------------------------------------------------


def evaluated(server: ScriptedServer, filename: str) -> None:
    artifact = job_pb2.Artifact(filename=filename, media_type="text/html", size_bytes=2)
    ended = job_pb2.Job(name=JOB, state=job_pb2.JOB_STATE_SUCCEEDED, artifacts=[artifact])
    metrics = [
        evaluation_pb2.Metric(name="dino", value=0.61, low=0.5, high=0.7),
        evaluation_pb2.Metric(name="base_dino", value=0.31),
        evaluation_pb2.Metric(name="clip_t", value=0.28),
    ]
    evaluation = evaluation_pb2.Evaluation(adapter="tenants/local/adapters/rex@3", metrics=metrics)
    evaluation.drift.value, evaluation.drift.low, evaluation.drift.high = 0.048, 0.04, 0.055
    server.answers.update(
        {
            "Evaluate": lambda _, __: personalization_pb2.EvaluateResponse(job=job_pb2.Job(name=JOB)),
            "WatchJob": lambda _, __: iter([job_pb2.WatchJobResponse(sequence=1, job=ended)]),
            "GetEvaluation": lambda _, __: job_pb2.GetEvaluationResponse(evaluation=evaluation),
            "DownloadArtifact": lambda _, __: iter(
                [
                    job_pb2.DownloadArtifactResponse(
                        file=media_pb2.FileHeader(filename=filename, size_bytes=2)
                    ),
                    job_pb2.DownloadArtifactResponse(chunk=b"ok"),
                ]
            ),
        }
    )


def test_evaluate_shows_figures_and_downloads_the_report(server: ScriptedServer, tmp_path: Path) -> None:
    evaluated(server, "pairs/report.html")
    result = run(server, "evaluate", "rex", "-o", str(tmp_path / "r"))
    assert result.exit_code == 0, result.output
    dino = next(line for line in result.stdout.splitlines() if "DINO" in line)
    assert dino.split()[-5:] == ["0.610", "0.500", "to", "0.700", "0.310"]
    assert "0.048" in result.stdout
    assert (tmp_path / "r" / "pairs" / "report.html").read_bytes() == b"ok"
    assert json.loads((tmp_path / "r" / "figures.json").read_text())["drift"]["value"] == 0.048


@pytest.mark.parametrize("filename", ["../evil.html", "/tmp/evil.html", "a/../../evil.html"])
def test_artifacts_never_leave_their_folder(server: ScriptedServer, tmp_path: Path, filename: str) -> None:
    evaluated(server, filename)
    result = run(server, "evaluate", "rex", "-o", str(tmp_path / "r"))
    assert result.exit_code == 1
    assert "outside the folder" in result.stderr
    assert not (tmp_path / "evil.html").exists()


# -- adapters -----------------------------------------------------------------------------------------------


def test_adapters_show_orders_the_certificate_by_size(server: ScriptedServer) -> None:
    adapter = adapter_pb2.Adapter(name="tenants/local/adapters/rex@3", method="spectral", rank=8)
    for i, relative in enumerate([0.1, 0.3, 0.2]):
        adapter.certificate.layers.add(layer=f"unet.layer{i}", sigma_max=relative, relative=relative)
    server.answers["GetAdapter"] = lambda _, __: adapter_pb2.GetAdapterResponse(adapter=adapter)
    result = run(server, "adapters", "show", "rex", "--layers", "2")
    found = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("unet.")]
    assert found == ["unet.layer1", "unet.layer2"]


def imported() -> adapter_pb2.Adapter:
    adapter = adapter_pb2.Adapter(name="tenants/local/adapters/rex@1", method="imported", rank=8)
    adapter.source.format = adapter_pb2.SOURCE_FORMAT_KOHYA
    adapter.source.filenames.append("re[x].safetensors")
    adapter.source.rights.basis = subject_pb2.RightsDeclaration.BASIS_PUBLIC_DOMAIN
    adapter.certificate.sigma_max = 0.25
    adapter.certificate.layers.add(layer="unet.a", sigma_max=0.25, relative=0.1)
    return adapter


def test_adapters_import_says_what_it_was_and_that_drift_is_not_known(
    server: ScriptedServer, tmp_path: Path
) -> None:
    seen: list[Any] = []

    def answer(messages: Any, _: Any) -> Any:
        seen.extend(messages)
        return adapter_pb2.ImportAdapterResponse(adapter=imported())

    server.answers["ImportAdapter"] = answer
    (tmp_path / "rex.safetensors").write_bytes(b"12345678")
    arguments = ["adapters", "import", str(tmp_path / "rex.safetensors"), "--id", "rex", "--class", "dog"]
    refused = run(server, *arguments)
    assert refused.exit_code == 2, "rights are required"
    assert not seen
    result = run(server, *arguments, "--rights", "public_domain")
    assert result.exit_code == 0, result.output
    assert (seen[0].adapter.adapter_id, seen[0].adapter.class_noun) == ("rex", "dog")
    assert (seen[1].file.filename, seen[2].chunk) == ("rex.safetensors", b"12345678")
    said = " ".join(result.stdout.split())
    assert "rex@1: kohya file re[x].safetensors (public domain), rank 8, 1 layers, σ_max 0.2500" in said
    assert "not measured: mooring evaluate rex@1" in said
    server.answers["GetAdapter"] = lambda _, __: adapter_pb2.GetAdapterResponse(adapter=imported())
    shown = " ".join(run(server, "adapters", "show", "rex").stdout.split())
    assert "from kohya file re[x].safetensors" in shown
    assert "not measured" in shown
    assert json.loads(run(server, *arguments, "--rights", "owned", "--json").stdout)["method"] == "imported"


def test_empty_lists_say_how_to_begin(server: ScriptedServer) -> None:
    server.answers["ListAdapters"] = lambda _, __: adapter_pb2.ListAdaptersResponse()
    assert "mooring train --help" in run(server, "adapters", "list").stdout
    assert json.loads(run(server, "adapters", "list", "--json").stdout) == []
