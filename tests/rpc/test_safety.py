"""The content checks at the edge: prompts refused, images withheld, verdicts told, tenants exempt."""

from __future__ import annotations

import dataclasses
import json

import mooring
import pytest
from mooring.v1 import personalization_pb2 as pb
from mooring_server.safety.phrases import PhraseCheck, Rule
from mooring_server.safety.policy import SafetyPolicy, Verdict
from rpc_calls import DEADLINE, failure_of, make_subject, read_status

PROMPT = "a photo of a dog"


class DarkPictures:
    """Refuses pictures whose mean is below a limit."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def judge(self, pixels) -> Verdict:
        score = 1 - float(pixels.mean()) / 255
        refused = pixels.mean() < self.limit
        return Verdict("dark", allowed=not refused, category="dark" if refused else "", score=score)


@pytest.fixture
def policy(server, monkeypatch):
    """Sets the policy of the running server for one test."""

    def put(**parts) -> None:
        made = SafetyPolicy(**parts)
        monkeypatch.setattr(
            server.server, "_runtime", dataclasses.replace(server.server.runtime, safety=made)
        )
        monkeypatch.setattr(server.server._runner._works["batch"], "safety", made)

    return put


CARS = PhraseCheck([Rule("cars", (("red", "car"),))])


def generate(stubs, **values):
    request = pb.GenerateRequest(**{"prompt": PROMPT, "steps": 3, **values})
    return list(stubs.personalization.Generate(request, timeout=DEADLINE))


def test_a_refused_prompt_is_an_error_before_anything_is_drawn(stubs, policy):
    policy(prompt_checks=[CARS])
    failure = failure_of(lambda: generate(stubs, prompt="a big RED  car"))
    assert (failure.code.name, failure.reason) == ("INVALID_ARGUMENT", "PROMPT_REFUSED")
    assert (failure.metadata["category"], list(failure.fields)) == ("cars", ["prompt"])
    assert generate(stubs, negative_prompt="red car")[-1].done.images == 1  # says what shall not be seen


def test_verdicts_come_with_the_answer(stubs, policy):
    policy(prompt_checks=[CARS], image_checks=[DarkPictures(0)])
    done = generate(stubs, count=2)[-1].done
    assert [(v.check, v.allowed, v.HasField("image_index")) for v in done.safety] == [
        ("phrases", True, False),
        ("dark", True, True),
        ("dark", True, True),
    ]
    assert [v.image_index for v in done.safety[1:]] == [0, 1]
    policy()
    assert not generate(stubs)[-1].done.safety


def test_a_withheld_image_is_not_sent_nor_are_previews(stubs, policy, server):
    policy(image_checks=[DarkPictures(256)])
    responses = generate(stubs, count=2, preview_interval=1)
    assert not any(response.HasField("image") for response in responses)
    assert not any(response.progress.previews for response in responses)
    done = responses[-1].done
    assert done.images == 2
    assert [(v.category, v.allowed, v.image_index) for v in done.safety] == [
        ("dark", False, 0),
        ("dark", False, 1),
    ]
    with mooring.Client(server.target) as client:
        *_, last = client.generate(PROMPT, steps=2)
    assert last.withheld == (0,)
    policy()
    assert any(response.progress.previews for response in generate(stubs, preview_interval=1))


def test_requests_of_a_stream_are_checked_each(stubs, policy):
    policy(prompt_checks=[CARS], image_checks=[DarkPictures(256)])
    requests = [
        pb.GenerateBatchRequest(id=name, request={"prompt": prompt, "steps": 2})
        for name, prompt in (("good", PROMPT), ("bad", "a red car"))
    ]
    found = {r.id: r for r in stubs.personalization.GenerateBatch(iter(requests), timeout=DEADLINE)}
    assert read_status(found["bad"].error).reason == "PROMPT_REFUSED"
    assert [v.allowed for v in found["good"].done.safety] == [True, False]


def test_a_check_that_fails_lets_nothing_through(stubs, policy):
    class Broken:
        def judge(self, _pixels):
            raise RuntimeError("no number")

    policy(image_checks=[Broken()])
    failure = failure_of(lambda: generate(stubs))
    assert failure.reason == "INTERNAL"


def test_exempt_tenants_are_not_checked(stubs, policy):
    policy(prompt_checks=[CARS], image_checks=[DarkPictures(256)], exempt={"local"})
    responses = generate(stubs, prompt="a red car")
    assert any(response.HasField("image") for response in responses)
    assert not responses[-1].done.safety


def test_evaluation_prompts_are_checked(stubs, policy):
    policy(prompt_checks=[CARS])
    make_subject(stubs, "checked")
    request = pb.EvaluateRequest(
        subject="tenants/-/subjects/checked", config={"prompts": ["a photo of {}", "a {} beside a red car"]}
    )
    failure = failure_of(lambda: stubs.personalization.Evaluate(request, timeout=DEADLINE))
    assert (failure.reason, list(failure.fields)) == ("PROMPT_REFUSED", ["config.prompts[1]"])


def test_a_batch_names_refused_lines_and_keeps_verdicts_in_its_manifest(server, policy):
    rows = [{"prompt": PROMPT, "steps": 2, "seed": seed} for seed in range(2)]
    with mooring.Client(server.target) as client:
        policy(prompt_checks=[CARS])
        bad = "".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "a red car"}]).encode()
        with pytest.raises(mooring.errors.InvalidArgumentError) as caught:
            client.run_batch(("bad.jsonl", bad))
        assert [fault.field for fault in caught.value.fields] == ["lines[3].prompt"]

        policy(prompt_checks=[CARS], image_checks=[DarkPictures(256)])
        good = "".join(json.dumps(row) + "\n" for row in rows).encode()
        job = client.wait(client.run_batch(("good.jsonl", good)))
        assert (job.batch_result.image_count, job.batch_result.failed_count) == (0, 2)
        lines = [json.loads(x) for x in client.download_artifact(job, "manifest.jsonl").splitlines()]
    for line in lines:
        assert line["error"]["reason"] == "IMAGE_WITHHELD"
        assert "file" not in line
        assert [(v["check"], v["allowed"]) for v in line["safety"]] == [("phrases", True), ("dark", False)]


def test_a_row_that_a_stricter_policy_refuses_later_fails_alone(server, policy, runtime, monkeypatch):
    with mooring.Client(server.target) as client:
        monkeypatch.setattr(runtime.engine, "max_queue", 0)  # the job waits for its turn
        rows = [{"prompt": "a red car", "steps": 2}, {"prompt": PROMPT, "steps": 2}]
        policy()
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        job = client.run_batch(("rows.jsonl", data))
        policy(prompt_checks=[CARS])
        monkeypatch.setattr(runtime.engine, "max_queue", 64)
        job = client.wait(job)
        lines = [json.loads(x) for x in client.download_artifact(job, "manifest.jsonl").splitlines()]
    assert lines[0]["error"]["reason"] == "PROMPT_REFUSED"
    assert lines[1]["safety"] == [{"check": "phrases", "allowed": True, "category": "", "score": 0.0}]
