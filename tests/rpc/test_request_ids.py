"""A request id is a UUID or nothing, in every call that takes one (AIP-155)."""

from __future__ import annotations

import uuid

import pytest
from mooring.v1 import adapter_pb2, evaluation_pb2, job_pb2, media_pb2, personalization_pb2, subject_pb2
from mooring_server.errors import MooringError, Reason
from mooring_server.rpc import names
from rpc_calls import failure_of

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
