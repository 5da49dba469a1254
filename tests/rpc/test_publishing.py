"""Aliases and the gate on a real server."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from google.protobuf import field_mask_pb2
from mooring.v1 import adapter_pb2 as pb
from mooring.v1 import evaluation_pb2, gate_pb2, job_pb2, personalization_pb2, subject_pb2
from mooring_server.storage.models import Judgement, Verdict
from rpc_calls import DEADLINE, GOOD_DRIFT, evaluated, failure_of, make_subject, publish

PASSING = Judgement(Verdict.PASSED, [], {}, "")
PASSED, REFUSED = gate_pb2.GATE_VERDICT_PASSED, gate_pb2.GATE_VERDICT_REFUSED

CERTIFICATE = {
    "adapter_digest": "sha256:" + "0" * 64,
    "base_digest": "sha256:" + "0" * 64,
    "rank": 4,
    "adapter_scale": 1.0,
    "budget": 0.12,
    "sigma_max": 0.0447,
    "relative_max": 0.012,
    "drift": None,
    "layers": [],
    "attentions": [],
}
"""As a moored adapter has it, less its layers and its drift."""


class Calls:
    """AdapterService in short."""

    def __init__(self, stubs):
        self.stub = stubs.adapters
        self.stubs = stubs

    def publish(self, name, **values):
        request = pb.PublishAdapterRequest(name=f"tenants/-/adapters/{name}", **values)
        return self.stub.PublishAdapter(request, timeout=DEADLINE)

    def roll_back(self, name, **values):
        request = pb.RollBackAdapterRequest(name=f"tenants/-/adapters/{name}", **values)
        return self.stub.RollBackAdapter(request, timeout=DEADLINE).alias

    def get(self, name, **values):
        request = pb.GetAdapterRequest(name=f"tenants/-/adapters/{name}", **values)
        return self.stub.GetAdapter(request, timeout=DEADLINE).adapter

    def delete(self, name):
        request = pb.DeleteAdapterRequest(name=f"tenants/-/adapters/{name}")
        return self.stub.DeleteAdapter(request, timeout=DEADLINE)

    def delete_alias(self, name):
        request = pb.DeleteAliasRequest(name=f"tenants/-/adapters/{name}")
        return self.stub.DeleteAlias(request, timeout=DEADLINE)

    def moves(self, name):
        request = pb.ListAliasMovesRequest(name=f"tenants/-/adapters/{name}")
        return list(self.stub.ListAliasMoves(request, timeout=DEADLINE).moves)

    def decisions(self, name):
        request = pb.ListGateDecisionsRequest(adapter=f"tenants/-/adapters/{name}")
        return list(self.stub.ListGateDecisions(request, timeout=DEADLINE).decisions)

    def aliases(self, name=""):
        request = pb.ListAliasesRequest(adapter=f"tenants/-/adapters/{name}" if name else "")
        return list(self.stub.ListAliases(request, timeout=DEADLINE).aliases)

    def policy(self):
        return self.stub.GetGatePolicy(pb.GetGatePolicyRequest(), timeout=DEADLINE).policy

    def set_policy(self, *mask, preset=gate_pb2.GATE_PRESET_UNSPECIFIED, **values):
        request = pb.UpdateGatePolicyRequest(policy=gate_pb2.GatePolicy(**values), preset=preset)
        if mask:
            request.update_mask.CopyFrom(field_mask_pb2.FieldMask(paths=mask))
        return self.stub.UpdateGatePolicy(request, timeout=DEADLINE).policy


@pytest.fixture
def calls(stubs):
    """With the default gate again after each test."""
    made = Calls(stubs)
    yield made
    made.set_policy(preset=gate_pb2.GATE_PRESET_BALANCED)


def candidate(runtime, adapter_id, *, seed=0, **row):
    """A version with a certificate."""
    return publish(runtime, adapter_id, seed=seed, row={"certificate": CERTIFICATE} | row)


def versions(runtime, adapter_id, count, *, first_seed=0, **row):
    """Versions that the gate passes."""
    made = [candidate(runtime, adapter_id, seed=first_seed + seed, **row) for seed in range(count)]
    for version in made:
        evaluated(runtime, version)
    return made


def test_a_published_version_is_live_with_its_decision(calls, runtime):
    version = versions(runtime, "p-one", 1)[0]
    answer = calls.publish("p-one@1")
    assert answer.alias.name == "tenants/local/adapters/p-one@live"
    assert answer.alias.adapter == "tenants/local/adapters/p-one@1"
    assert (answer.alias.adapter_digest, answer.alias.previous_adapter) == (version.digest, "")
    decision = answer.decision
    assert (decision.verdict, decision.alias, decision.adapter_digest) == (PASSED, "live", version.digest)
    assert decision.evaluation.startswith("tenants/local/jobs/")
    found = {check.figure: check for check in decision.checks}
    assert list(found) == [
        "evaluation", "rights", "prompts", "generic_prompts", "dino_gain", "generic_clip_t_drop",
        "drift", "drift_over_budget", "relative_sigma",
    ]  # fmt: skip
    drift = found["drift_over_budget"]
    assert (drift.value, drift.threshold, drift.measured) == (
        pytest.approx(0.15 / 0.12),
        1.5,
        pytest.approx(0.125 / 0.12),
    )
    described = calls.get("p-one@live")
    assert described.name == "tenants/local/adapters/p-one@1"
    assert list(described.aliases) == ["live"]
    assert described.gate_decision == decision
    listed = calls.stub.ListAdapters(pb.ListAdaptersRequest(page_size=1), timeout=DEADLINE).adapters[0]
    assert (list(listed.aliases), listed.gate_decision) == (["live"], decision)


BAD = {
    "dino_gain": ({"dino": 0.44}, "0.01", "at least 0.05"),
    "generic_clip_t_drop": ({"generic_clip_t_drop": [0.033, 0.03, 0.04]}, "0.033", "at most 0.02"),
    "drift": ({"drift": GOOD_DRIFT | {"value": 0.09, "high": 0.6}}, "0.6", "at most 0.5"),
    "prompts": ({"prompts": 1}, "1", "at least 4"),
    "generic_prompts": ({"generic_prompts": 2}, "2", "at least 8"),
}


@pytest.mark.parametrize("figure", BAD)
def test_a_refusal_names_the_failing_figure_and_moves_nothing(calls, runtime, figure):
    changes, value, bound = BAD[figure]
    version = candidate(runtime, f"p-bad-{figure.replace('_', '-')}", seed=100, summary={})
    evaluated(runtime, version, **changes)
    failure = failure_of(lambda: calls.publish(version.name))
    assert (failure.code.name, failure.reason) == ("FAILED_PRECONDITION", "GATE_REFUSED")
    assert failure.metadata[figure] == f"{value}, must be {bound}"
    assert failure.fields == {f"gate.{figure}": f"{value}, must be {bound}"}
    assert figure.replace("_", " ") in failure.message
    assert calls.aliases(version.adapter_id) == []
    (kept,) = calls.decisions(version.name)
    assert (kept.verdict, kept.name) == (REFUSED, failure.metadata["decision"])
    assert [check.figure for check in kept.checks if not check.passed] == [figure]
    assert calls.get(version.name).gate_decision == kept


def test_every_failing_figure_is_named(calls, runtime):
    version = candidate(
        runtime, "p-worst", seed=101, rights={}, certificate=CERTIFICATE | {"relative_max": 1.467}
    )
    evaluated(
        runtime,
        version,
        dino=0.1,
        generic_clip_t_drop=[0.2, 0.1, 0.3],
        drift=GOOD_DRIFT | {"value": 4.0, "high": 4.8},
    )
    failure = failure_of(lambda: calls.publish("p-worst"))
    expected = {
        "rights", "dino_gain", "generic_clip_t_drop", "drift", "drift_over_budget", "relative_sigma",
    }  # fmt: skip
    assert {name.removeprefix("gate.") for name in failure.fields} == expected
    assert expected <= failure.metadata.keys()


def test_only_the_newest_evaluation_of_this_very_adapter_counts(calls, runtime):
    version = candidate(runtime, "p-eval", seed=102, subject_id="own")
    other = publish(runtime, "p-eval-other", seed=103)
    evaluated(runtime, other)
    evaluated(runtime, version, adapter_digest=other.digest)
    evaluated(runtime, version, base_digest="sha256:" + "5" * 64)
    evaluated(runtime, version, adapter_scale=0.0)
    evaluated(runtime, version, subject="another")
    failure = failure_of(lambda: calls.publish("p-eval@1"))
    assert (failure.code.name, failure.reason) == ("FAILED_PRECONDITION", "GATE_NEEDS_EVALUATION")
    assert "mooring evaluate p-eval@1" in failure.message
    assert list(failure.fields) == ["gate.evaluation"]
    evaluated(runtime, version)
    good = calls.publish("p-eval@1").decision
    newest = evaluated(runtime, version, dino=0.0)
    failure = failure_of(lambda: calls.publish("p-eval@1"))
    assert failure.reason == "GATE_REFUSED"
    assert calls.decisions("p-eval@1")[0].evaluation == f"tenants/local/jobs/{newest}" != good.evaluation


def test_a_real_evaluation_is_what_the_gate_judges(calls, runtime, stubs):
    subject = make_subject(stubs, "p-real")
    version = candidate(runtime, "p-real", seed=104, subject_id="p-real")
    request = personalization_pb2.EvaluateRequest(
        adapter="tenants/-/adapters/p-real@1",
        subject=subject,
        config=evaluation_pb2.EvaluationConfig(
            prompts=["a photo of a {}", "a photo of a {} in the snow"],
            generic_prompts=["a photo of a car", "a photo of a house"],
            steps=1,
            class_samples=0,
        ),
    )
    job = stubs.personalization.Evaluate(request, timeout=DEADLINE).job
    events = stubs.jobs.WatchJob(job_pb2.WatchJobRequest(name=job.name), timeout=DEADLINE)
    assert list(events)[-1].job.state == job_pb2.JOB_STATE_SUCCEEDED
    evaluation = stubs.jobs.GetEvaluation(
        job_pb2.GetEvaluationRequest(name=job.name), timeout=DEADLINE
    ).evaluation
    calls.set_policy(mode=gate_pb2.GATE_MODE_WARN, min_dino=-1.0)
    decision = calls.publish("p-real@1").decision
    assert decision.evaluation == job.name
    found = {check.figure: check for check in decision.checks}
    metrics = {metric.name: metric.value for metric in evaluation.metrics}
    assert found["dino"].value == metrics["dino"]
    assert found["dino_gain"].value == pytest.approx(metrics["dino"] - metrics["base_dino"])
    assert found["generic_clip_t_drop"].value == pytest.approx(
        metrics["base_generic_clip_t"] - metrics["generic_clip_t"]
    )
    assert (found["drift"].value, found["drift"].measured) == (evaluation.drift.high, evaluation.drift.value)
    assert (found["prompts"].value, found["generic_prompts"].value) == (2, 2)
    assert version.digest == evaluation.adapter_digest


def test_modes_and_certificates_without_an_evaluation(calls, runtime):
    candidate(runtime, "p-mode", seed=105)
    assert failure_of(lambda: calls.publish("p-mode")).reason == "GATE_NEEDS_EVALUATION"
    calls.set_policy(mode=gate_pb2.GATE_MODE_WARN)
    assert calls.publish("p-mode").decision.verdict == gate_pb2.GATE_VERDICT_WARNED
    calls.set_policy(mode=gate_pb2.GATE_MODE_OFF)
    off = calls.publish("p-mode").decision
    assert (off.verdict, list(off.checks)) == (gate_pb2.GATE_VERDICT_NOT_CHECKED, [])
    calls.set_policy(
        mode=gate_pb2.GATE_MODE_ENFORCE, require_evaluation=False, max_sigma=0.3, max_relative_sigma=0.5
    )
    failure = failure_of(lambda: calls.publish("p-mode"))
    assert failure.fields["gate.drift"] == "not measured, must be at most 0.5"
    certificate = CERTIFICATE | {"drift": GOOD_DRIFT, "sigma_max": 0.4, "relative_max": 0.2}
    certified = candidate(runtime, "p-sigma", seed=107, certificate=certificate)
    failure = failure_of(lambda: calls.publish(certified.name))
    assert failure.fields == {"gate.sigma": "0.4, must be at most 0.3"}
    calls.set_policy("max_sigma")
    decision = calls.publish(certified.name).decision
    assert (decision.verdict, decision.evaluation) == (PASSED, "")
    assert [check.figure for check in decision.checks] == [
        "rights", "drift", "drift_over_budget", "relative_sigma",
    ]  # fmt: skip


def test_rolling_back_goes_further_back_each_time_and_the_history_keeps_all(calls, runtime):
    versions(runtime, "p-back", 3, first_seed=110)
    assert failure_of(lambda: calls.roll_back("p-back")).reason == "ALIAS_NOT_FOUND"
    for version in (1, 2, 3):
        calls.publish(f"p-back@{version}")
    assert calls.publish("p-back@3").alias.previous_adapter.endswith("@2")  # again: nothing new to go back to
    assert calls.roll_back("p-back").adapter.endswith("@2")
    calls.delete("p-back@3")
    back = calls.roll_back("p-back")
    assert (back.adapter[-2:], back.previous_adapter) == ("@1", "")
    failure = failure_of(lambda: calls.roll_back("p-back"))
    assert (failure.code.name, failure.reason) == ("FAILED_PRECONDITION", "NOTHING_TO_ROLL_BACK")
    calls.delete_alias("p-back@live")
    history = [(move.kind, move.adapter[-2:], move.previous_adapter[-2:]) for move in calls.moves("p-back")]
    published, rolled, deleted = (
        gate_pb2.ALIAS_MOVE_KIND_PUBLISH,
        gate_pb2.ALIAS_MOVE_KIND_ROLL_BACK,
        gate_pb2.ALIAS_MOVE_KIND_DELETE,
    )
    assert history == [
        (deleted, "", "@1"),
        (rolled, "@1", "@2"),
        (rolled, "@2", "@3"),
        (published, "@3", "@3"),
        (published, "@3", "@2"),
        (published, "@2", "@1"),
        (published, "@1", ""),
    ]
    assert failure_of(lambda: calls.get("p-back@live")).reason == "ALIAS_NOT_FOUND"
    assert failure_of(lambda: calls.delete_alias("p-back@live")).reason == "ALIAS_NOT_FOUND"


def test_rolling_back_passes_over_what_was_deleted(calls, runtime):
    versions(runtime, "p-gap", 3, first_seed=115)
    for version in (1, 2, 3):
        calls.publish(f"p-gap@{version}")
    calls.delete("p-gap@2")
    assert calls.aliases("p-gap")[0].previous_adapter.endswith("@1")
    assert calls.roll_back("p-gap").adapter.endswith("@1")


def test_aliases_resolve_wherever_an_adapter_is_named(calls, runtime, stubs):
    first, second = versions(runtime, "p-named", 2, first_seed=120)
    calls.publish("p-named@1", alias="canary")
    name = "tenants/-/adapters/p-named@canary"
    request = personalization_pb2.GenerateRequest(prompt="a photo of a dog", steps=1, adapter=name)
    done = list(stubs.personalization.Generate(request, timeout=DEADLINE))[-1].done
    assert (done.adapter, done.adapter_digest) == ("tenants/local/adapters/p-named@1", first.digest)
    exported = stubs.adapters.ExportAdapter(pb.ExportAdapterRequest(name=name), timeout=DEADLINE)
    assert next(iter(exported)).file.filename == "p-named-1.safetensors"
    subject = make_subject(stubs, "p-named")
    request = personalization_pb2.EvaluateRequest(adapter=name, subject=subject)
    job = stubs.personalization.Evaluate(request, timeout=DEADLINE).job
    stubs.jobs.CancelJob(job_pb2.CancelJobRequest(name=job.name), timeout=DEADLINE)
    assert job.evaluate.adapter == "tenants/local/adapters/p-named@1"
    assert calls.get("p-named").version == 2  # no version still means the newest
    assert calls.publish("p-named@canary").alias.adapter.endswith("@1")
    assert [alias.name.rpartition("@")[2] for alias in calls.aliases("p-named")] == ["canary", "live"]
    assert second.version == 2


def test_a_running_request_keeps_its_version_when_the_alias_moves(calls, runtime, stubs):
    first, second = versions(runtime, "p-run", 2, first_seed=125)
    calls.publish("p-run@1")
    request = personalization_pb2.GenerateRequest(
        prompt="a photo of a dog", steps=150, adapter="tenants/-/adapters/p-run@live"
    )
    running = stubs.personalization.Generate(request, timeout=DEADLINE)
    for event in running:
        if event.HasField("progress"):
            break
    calls.publish("p-run@2")
    request.steps = 1
    after = list(stubs.personalization.Generate(request, timeout=DEADLINE))[-1].done
    before = list(running)[-1].done
    assert (before.adapter_digest, after.adapter_digest) == (first.digest, second.digest)


def test_a_version_that_an_alias_points_to_is_not_deleted(calls, runtime):
    versions(runtime, "p-used", 2, first_seed=130)
    calls.publish("p-used@1")
    calls.publish("p-used@1", alias="canary")
    for name in ("p-used@1", "p-used@live", "p-used"):
        failure = failure_of(lambda name=name: calls.delete(name))
        assert (failure.code.name, failure.reason) == ("FAILED_PRECONDITION", "ADAPTER_IN_USE")
        assert failure.metadata["aliases"] == "canary, live"
    assert calls.get("p-used@2").version == 2  # all or none
    calls.delete("p-used@2")
    calls.publish("p-used@live")
    for alias in ("live", "canary"):
        calls.delete_alias(f"p-used@{alias}")
    calls.delete("p-used")
    assert failure_of(lambda: calls.get("p-used")).reason == "ADAPTER_NOT_FOUND"


def test_deleted_versions_leave_a_tombstone(calls, runtime):
    versions(runtime, "p-tomb", 2, first_seed=135)
    calls.delete("p-tomb@2")
    failure = failure_of(lambda: calls.get("p-tomb@2"))
    assert (failure.reason, "was deleted on" in failure.message) == ("ADAPTER_NOT_FOUND", True)
    assert failure_of(lambda: calls.publish("p-tomb@2")).reason == "ADAPTER_NOT_FOUND"
    tomb = calls.get("p-tomb@2", show_deleted=True)
    assert tomb.HasField("delete_time")
    assert not calls.get("p-tomb@1", show_deleted=True).HasField("delete_time")
    shown = calls.stub.ListAdapters(pb.ListAdaptersRequest(show_deleted=True), timeout=DEADLINE).adapters
    names = [(item.name.rpartition("/")[2], item.HasField("delete_time")) for item in shown]
    assert [item for item in names if item[0].startswith("p-tomb@")] == [
        ("p-tomb@2", True),
        ("p-tomb@1", False),
    ]
    hidden = calls.stub.ListAdapters(pb.ListAdaptersRequest(), timeout=DEADLINE).adapters
    assert "tenants/local/adapters/p-tomb@2" not in [item.name for item in hidden]


def test_repeated_requests_change_nothing(calls, runtime):
    first, _ = versions(runtime, "p-twice", 2, first_seed=140)
    refused = str(uuid.uuid4())
    calls.set_policy(min_dino=0.99)
    assert failure_of(lambda: calls.publish("p-twice@1", request_id=refused)).reason == "GATE_REFUSED"
    calls.set_policy("min_dino")
    once = calls.publish("p-twice@1", request_id=refused)  # a refusal is not remembered
    calls.publish("p-twice@2")
    assert calls.publish("p-twice@1", request_id=refused) == once
    assert calls.get("p-twice@live").version == 2
    back = str(uuid.uuid4())
    answer = calls.roll_back("p-twice", request_id=back)
    assert calls.roll_back("p-twice", request_id=back) == answer
    assert calls.get("p-twice@live").digest == first.digest
    again = failure_of(lambda: calls.publish("p-twice@2", request_id=refused))
    assert (again.code.name, again.reason) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")


def test_validate_only_keeps_nothing(calls, runtime):
    versions(runtime, "p-dry", 1, first_seed=145)
    answer = calls.publish("p-dry", validate_only=True)
    assert (answer.decision.verdict, answer.decision.name) == (PASSED, "")
    assert answer.alias.adapter.endswith("@1")
    calls.set_policy(min_dino=0.99)
    failure = failure_of(lambda: calls.publish("p-dry", validate_only=True))
    assert (failure.reason, "decision" in failure.metadata) == ("GATE_REFUSED", False)
    assert (calls.aliases("p-dry"), calls.decisions("p-dry"), calls.moves("p-dry")) == ([], [], [])


def test_concurrent_publishes_come_one_after_the_other(calls, runtime):
    count = 6
    versions(runtime, "p-race", count, first_seed=150)
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(lambda n: calls.publish(f"p-race@{n}"), range(1, count + 1)))
    moves = calls.moves("p-race")[::-1]
    assert sorted(move.adapter for move in moves) == sorted(answer.alias.adapter for answer in answers)
    # each saw the one before it: a chain without forks
    assert [move.previous_adapter for move in moves] == ["", *(move.adapter for move in moves[:-1])]
    assert calls.get("p-race@live").name == moves[-1].adapter
    for move in moves[-2::-1]:
        assert calls.roll_back("p-race").adapter == move.adapter


def test_the_policy_is_changed_by_field(calls):
    start = calls.policy()
    assert (start.mode, start.require_evaluation, start.min_dino_gain) == (
        gate_pb2.GATE_MODE_ENFORCE,
        True,
        0.05,
    )
    changed = calls.set_policy(min_dino=0.5, allowed_rights=[subject_pb2.RightsDeclaration.BASIS_OWNED])
    assert (changed.min_dino, changed.min_dino_gain, changed.revision) == (0.5, 0.05, start.revision + 1)
    assert changed.updated_by == "local"
    assert calls.set_policy(min_dino=0.5).revision == changed.revision  # no change, no revision
    cleared = calls.set_policy("min_dino", "allowed_rights")
    assert (cleared.HasField("min_dino"), list(cleared.allowed_rights)) == (False, [])
    strict = calls.set_policy(preset=gate_pb2.GATE_PRESET_STRICT, max_drift=0.2)
    assert (strict.max_drift, strict.max_generic_clip_t_drop) == (0.2, 0.01)
    bare = calls.set_policy("*", max_drift=0.3)
    assert (bare.max_drift, bare.require_rights, bare.HasField("min_dino_gain")) == (0.3, False, False)


@pytest.mark.parametrize(
    ("values", "mask", "field"),
    [
        ({"max_drift": -1.0}, (), "policy.max_drift"),
        ({"max_sigma": float("nan")}, (), "policy.max_sigma"),
        ({"min_prompts": 201}, (), "policy.min_prompts"),
        ({}, ("revision",), "update_mask"),
        ({"mode": 9}, (), "policy.mode"),
        ({"allowed_rights": [0]}, (), "policy.allowed_rights"),
    ],
)
def test_policies_that_cannot_be(calls, values, mask, field):
    before = calls.policy()
    failure = failure_of(lambda: calls.set_policy(*mask, **values))
    assert (failure.reason, list(failure.fields)) == ("INVALID_FIELD", [field])
    assert calls.policy() == before


def test_what_is_another_tenants_looks_absent(calls, runtime, stubs):
    rivals = publish(runtime, "p-rival", tenant="rival", seed=160)
    evaluated(runtime, rivals)

    def answers(tenant, adapter):
        base = f"tenants/{tenant}/adapters/{adapter}"
        tried = [
            lambda: calls.stub.PublishAdapter(pb.PublishAdapterRequest(name=f"{base}@1"), timeout=DEADLINE),
            lambda: calls.stub.RollBackAdapter(pb.RollBackAdapterRequest(name=base), timeout=DEADLINE),
            lambda: calls.stub.DeleteAlias(pb.DeleteAliasRequest(name=f"{base}@live"), timeout=DEADLINE),
            lambda: calls.stub.GetAdapter(
                pb.GetAdapterRequest(name=f"{base}@1", show_deleted=True), timeout=DEADLINE
            ),
            lambda: calls.stub.GetAdapter(pb.GetAdapterRequest(name=f"{base}@live"), timeout=DEADLINE),
        ]
        failures = [failure_of(call) for call in tried]
        listed = calls.stub.ListAliasMoves(pb.ListAliasMovesRequest(name=base), timeout=DEADLINE)
        decided = calls.stub.ListGateDecisions(pb.ListGateDecisionsRequest(adapter=base), timeout=DEADLINE)
        pointing = calls.stub.ListAliases(pb.ListAliasesRequest(adapter=base), timeout=DEADLINE)
        assert [*listed.moves, *decided.decisions, *pointing.aliases] == []
        return [(failure.code, failure.reason, failure.message) for failure in failures]

    runtime.store.publish_alias(
        "rival", "p-rival", 1, "live", judge=lambda adapter, _evaluations, _policy: PASSING, actor="rival"
    )
    for tenant in ("rival", "local", "nobody"):
        assert answers(tenant, "p-rival") == answers("local", "p-rival")
    for name in ("tenants/rival/gatePolicy", "tenants/nobody/gatePolicy"):
        failure = failure_of(
            lambda name=name: calls.stub.GetGatePolicy(pb.GetGatePolicyRequest(name=name), timeout=DEADLINE)
        )
        assert failure.reason == "NOT_ALLOWED"


def test_an_adapter_of_another_base_is_not_published(calls, runtime):
    publish(runtime, "p-foreign", seed=165, base_digest="sha256:" + "7" * 64)
    assert failure_of(lambda: calls.publish("p-foreign")).reason == "BASE_DIGEST_MISMATCH"


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("roll_back", "p-x@1"),
        ("roll_back", "p-x@live"),
        ("delete_alias", "p-x"),
        ("delete_alias", "p-x@1"),
        ("moves", "p-x@1"),
        ("decisions", "p-x@live"),
        ("aliases", "p-x@1"),
    ],
)
def test_names_that_do_not_fit(calls, call, name):
    failure = failure_of(lambda: getattr(calls, call)(name))
    assert (failure.code.name, failure.reason) == ("INVALID_ARGUMENT", "BAD_RESOURCE_NAME")


def test_decisions_are_counted(calls, runtime):
    def count(verdict):
        return runtime.metrics.gate_decisions.labels(verdict)._value.get()

    before = count("passed"), count("refused")
    versions(runtime, "p-count", 1, first_seed=170)
    calls.publish("p-count")
    calls.set_policy(min_dino=0.99)
    failure_of(lambda: calls.publish("p-count"))
    assert (count("passed"), count("refused")) == (before[0] + 1, before[1] + 1)
