"""A request id is a UUID or nothing, in every call that takes one (AIP-155)."""

from __future__ import annotations

import uuid

import pytest
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
from mooring_server.errors import MooringError, Reason
from mooring_server.rpc import names
from rpc_calls import DEADLINE, failure_of, file_messages, make_subject, publish

BAD = "again"
CALLS = {
    "CreateSubject": lambda s: s.subjects.CreateSubject(
        subject_pb2.CreateSubjectRequest(subject_id="ids", request_id=BAD)
    ),
    "Train": lambda s: s.personalization.Train(personalization_pb2.TrainRequest(request_id=BAD)),
    "Evaluate": lambda s: s.personalization.Evaluate(personalization_pb2.EvaluateRequest(request_id=BAD)),
    "RunBatch": lambda s: s.personalization.RunBatch(
        iter(
            [personalization_pb2.RunBatchRequest(settings=personalization_pb2.BatchSettings(request_id=BAD))]
        )
    ),
    "PublishAdapter": lambda s: s.adapters.PublishAdapter(
        adapter_pb2.PublishAdapterRequest(name="tenants/-/adapters/nobody@1", request_id=BAD)
    ),
    "RollBackAdapter": lambda s: s.adapters.RollBackAdapter(
        adapter_pb2.RollBackAdapterRequest(name="tenants/-/adapters/nobody", request_id=BAD)
    ),
    "ImportAdapter": lambda s: s.adapters.ImportAdapter(
        iter(
            [
                adapter_pb2.ImportAdapterRequest(
                    adapter=adapter_pb2.AdapterImport(
                        adapter_id="ids",
                        request_id=BAD,
                        rights=subject_pb2.RightsDeclaration(basis=subject_pb2.RightsDeclaration.BASIS_OWNED),
                    )
                )
            ]
        )
    ),
}


def test_every_call_that_takes_one_is_tried_here():
    modules = (adapter_pb2, evaluation_pb2, job_pb2, media_pb2, personalization_pb2, subject_pb2)
    holders = {
        name
        for module in modules
        for name, message in module.DESCRIPTOR.message_types_by_name.items()
        if "request_id" in message.fields_by_name
    }
    carried = {"BatchSettings": "RunBatch", "AdapterImport": "ImportAdapter"}
    assert {carried.get(name, name.removesuffix("Request")) for name in holders} == set(CALLS)


@pytest.mark.parametrize("call", CALLS)
def test_another_request_id_is_refused_by_name(stubs, call):
    failure = failure_of(lambda: CALLS[call](stubs))
    assert (failure.code.name, failure.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    (field,) = failure.fields
    assert field.rpartition(".")[2] == "request_id"


def test_what_is_a_uuid():
    for good in ("", str(uuid.uuid4()), str(uuid.uuid4()).upper(), str(uuid.uuid1())):
        assert names.check_request_id(good) == good
    for bad in ("r", uuid.uuid4().hex, f"{{{uuid.uuid4()}}}", f"{uuid.uuid4()}\n", f" {uuid.uuid4()}"):
        with pytest.raises(MooringError) as refused:
            names.check_request_id(bad)
        assert refused.value.reason is Reason.INVALID_FIELD


def test_a_repeated_training_is_answered_though_its_subject_is_gone(stubs):
    name = make_subject(stubs, "repeated", photos=1)
    config = training_pb2.TrainingConfig(steps=1)
    request = personalization_pb2.TrainRequest(subject=name, config=config, request_id=str(uuid.uuid4()))
    job = stubs.personalization.Train(request, timeout=DEADLINE).job
    stubs.jobs.CancelJob(job_pb2.CancelJobRequest(name=job.name), timeout=DEADLINE)
    stubs.subjects.DeleteSubject(subject_pb2.DeleteSubjectRequest(name=name), timeout=DEADLINE)
    assert stubs.personalization.Train(request, timeout=DEADLINE).job.name == job.name
    request.config.steps = 2
    other = failure_of(lambda: stubs.personalization.Train(request, timeout=DEADLINE))
    assert other.reason == "REQUEST_ID_REUSED"


def test_a_repeated_request_is_answered_though_its_alias_has_moved_or_its_adapter_is_gone(stubs, runtime):
    subject = make_subject(stubs, "moved", photos=1)
    versions = [publish(runtime, "moved", seed=seed) for seed in (1, 2)]
    names_ = [f"tenants/-/adapters/{version.name}" for version in versions]

    def point(name: str) -> None:
        policy = gate_pb2.GatePolicy(mode=gate_pb2.GATE_MODE_OFF)
        stubs.adapters.UpdateGatePolicy(adapter_pb2.UpdateGatePolicyRequest(policy=policy), timeout=DEADLINE)
        stubs.adapters.PublishAdapter(adapter_pb2.PublishAdapterRequest(name=name), timeout=DEADLINE)

    def rows(request_id: str):
        yield personalization_pb2.RunBatchRequest(
            settings=personalization_pb2.BatchSettings(request_id=request_id)
        )
        data = b'{"prompt": "a dog", "adapter": "moved@1", "steps": 1}'
        for part in file_messages("x.jsonl", data):
            kind = part.WhichOneof("content")
            yield personalization_pb2.RunBatchRequest(**{kind: getattr(part, kind)})

    point(names_[0])
    request = personalization_pb2.EvaluateRequest(
        adapter="tenants/-/adapters/moved@live", subject=subject, request_id=str(uuid.uuid4())
    )
    job = stubs.personalization.Evaluate(request, timeout=DEADLINE).job
    stubs.jobs.CancelJob(job_pb2.CancelJobRequest(name=job.name), timeout=DEADLINE)
    batch_id = str(uuid.uuid4())
    batch = stubs.personalization.RunBatch(rows(batch_id), timeout=DEADLINE).job
    point(names_[1])
    stubs.adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name=names_[0]), timeout=DEADLINE)
    assert stubs.personalization.Evaluate(request, timeout=DEADLINE).job.name == job.name
    assert stubs.personalization.RunBatch(rows(batch_id), timeout=DEADLINE).job.name == batch.name
