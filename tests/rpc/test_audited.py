"""What calls leave in the audit log of a server that knows who calls."""

from __future__ import annotations

import json
import time

import pytest
from mooring.v1 import adapter_pb2, gate_pb2, job_pb2, subject_pb2
from mooring.v1 import personalization_pb2 as pb
from mooring_server.config import Role
from mooring_server.errors import MooringError, Reason
from mooring_server.rpc import facts
from rpc_calls import DEADLINE, Stubs, failure_of, file_messages, publish

TENANT, PROMPT = "audited", "a photo of a dog"


@pytest.fixture(scope="module")
def runtime(guarded):
    return guarded.server.runtime


@pytest.fixture(scope="module")
def as_role(guarded, runtime):
    """The services, called in a role."""
    made = {role: Stubs(guarded.target, runtime.store.create_key(TENANT, role.value)[1]) for role in Role}
    return made.__getitem__


@pytest.fixture(scope="module")
def adapter(runtime):
    return publish(runtime, "kept", tenant=TENANT)


@pytest.fixture
def told(runtime):
    """The entries of this test: method without its service, resource, decision."""
    start = runtime.store.audit_head().number

    def entries():
        assert runtime.store.verify_audit().intact
        return list(runtime.store.audit_entries(tenant=TENANT, after=start))

    return entries


def short(entry):
    return entry.method.rpartition("/")[2], entry.resource, entry.decision


def generate(stubs, **values):
    request = pb.GenerateRequest(**{"prompt": PROMPT, "steps": 1} | values)
    return list(stubs.personalization.Generate(request, timeout=DEADLINE))


def test_a_generation_is_told_with_its_prompts_hash_and_adapters(as_role, adapter, told):
    name = f"tenants/{TENANT}/adapters/kept@1"
    generate(as_role(Role.USER), adapter=name)
    (entry,) = told()
    assert short(entry) == ("Generate", name, "allowed")
    assert (entry.prompt_hash, entry.digests) == (facts.prompt_hash(PROMPT), adapter.digest)
    assert (entry.tenant, entry.role) == (TENANT, "user")
    assert entry.subject
    assert entry.request_id


def test_what_the_engine_has_no_room_for_was_not_allowed(as_role, runtime, told, monkeypatch):
    def full(*_arguments, **_values):
        raise MooringError(Reason.QUEUE_FULL, "The queue is full.")

    with monkeypatch.context() as patched:
        patched.setattr(runtime.engine, "generate", full)
        failure = failure_of(lambda: generate(as_role(Role.USER)))
    assert failure.reason == "QUEUE_FULL"
    assert told() == []
    failure_of(lambda: generate(as_role(Role.USER), steps=0))
    failure_of(lambda: generate(as_role(Role.USER), adapter="tenants/-/adapters/nobody"))
    assert told() == []


def test_a_refused_prompt_is_told_as_refused(as_role, told):
    failure = failure_of(lambda: generate(as_role(Role.USER), prompt="csam"))
    assert failure.reason == "PROMPT_REFUSED"
    (entry,) = told()
    assert (short(entry), entry.prompt_hash) == (("Generate", "", "refused"), facts.prompt_hash("csam"))


def test_a_denied_call_is_told(as_role, told):
    failure = failure_of(lambda: generate(as_role(Role.READ_ONLY)))
    assert failure.reason == "NOT_ALLOWED"
    (entry,) = told()
    assert short(entry) == ("Generate", "", "denied")
    assert entry.role == "read-only"


def test_an_export_is_told(as_role, adapter, told):
    request = adapter_pb2.ExportAdapterRequest(
        name="tenants/-/adapters/kept@1", format=adapter_pb2.ADAPTER_FORMAT_NATIVE
    )
    list(as_role(Role.USER).adapters.ExportAdapter(request, timeout=DEADLINE))
    (entry,) = told()
    assert short(entry) == ("ExportAdapter", "tenants/-/adapters/kept@1", "allowed")


def test_a_changed_gate_and_what_it_refuses_are_told(as_role, adapter, told):
    admin = as_role(Role.ADMIN).adapters
    strict = adapter_pb2.UpdateGatePolicyRequest(preset=gate_pb2.GATE_PRESET_STRICT)
    revision = admin.UpdateGatePolicy(strict, timeout=DEADLINE).policy.revision
    admin.UpdateGatePolicy(strict, timeout=DEADLINE)  # changes nothing
    publishing = adapter_pb2.PublishAdapterRequest(name="tenants/-/adapters/kept@1")
    failure = failure_of(lambda: admin.PublishAdapter(publishing, timeout=DEADLINE))
    assert failure.reason.startswith("GATE_")
    publishing.validate_only = True
    failure_of(lambda: admin.PublishAdapter(publishing, timeout=DEADLINE))
    changed, refused = told()
    assert short(changed) == ("UpdateGatePolicy", f"gatePolicy@{revision}", "done")
    assert short(refused) == ("PublishAdapter", "adapters/kept@1", "refused")
    assert refused.digests == adapter.digest


def test_a_batch_is_told_with_its_rows_its_end_and_its_downloads(as_role, adapter, told):
    user = as_role(Role.USER)
    rows = [{"prompt": PROMPT, "steps": 1}, {"prompt": "a photo of a car", "steps": 1, "adapter": "kept"}]
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)

    def messages(content):
        yield pb.RunBatchRequest(settings=pb.BatchSettings())
        for message in file_messages("rows.jsonl", content):
            kind = message.WhichOneof("content")
            yield pb.RunBatchRequest(**{kind: getattr(message, kind)})

    bad = data + b'{"prompt": ""}\n'
    assert failure_of(lambda: user.personalization.RunBatch(messages(bad))).reason == "BATCH_NOT_VALID"
    assert told() == []
    job = user.personalization.RunBatch(messages(data), timeout=DEADLINE).job
    limit = time.monotonic() + DEADLINE
    while not job.HasField("end_time"):
        assert time.monotonic() < limit
        time.sleep(0.05)
        job = user.jobs.GetJob(job_pb2.GetJobRequest(name=job.name), timeout=DEADLINE).job
    wanted = job_pb2.DownloadArtifactRequest(name=job.name, filename="images/000001.png")
    list(user.jobs.DownloadArtifact(wanted, timeout=DEADLINE))
    list(user.jobs.DownloadBatch(job_pb2.DownloadBatchRequest(name=job.name), timeout=DEADLINE))
    wanted.filename = "nothing"
    failure_of(lambda: user.jobs.DownloadArtifact(wanted))
    name = job.name.removeprefix(f"tenants/{TENANT}/")
    entries = told()
    found = {short(entry) for entry in entries}
    assert found == {
        ("RunBatch", name, "done"),
        ("RunBatch", "", "allowed"),
        ("RunBatch", f"tenants/{TENANT}/adapters/kept@1", "allowed"),
        ("batch", name, "succeeded"),
        ("DownloadArtifact", f"{name}/images/000001.png", "allowed"),
        ("DownloadBatch", name, "allowed"),
    }
    assert len(entries) == len(found)
    (ended,) = (entry for entry in entries if entry.decision == "succeeded")
    assert (ended.method, ended.subject, ended.role) == ("EndJob/batch", "system", "system")


def test_a_subject_and_its_end_are_told(as_role, told):
    admin = as_role(Role.ADMIN).subjects
    rights = subject_pb2.RightsDeclaration(basis=subject_pb2.RightsDeclaration.BASIS_OWNED)
    subject = subject_pb2.Subject(class_noun="dog", rights=rights)
    request = subject_pb2.CreateSubjectRequest(subject_id="told", subject=subject)
    name = admin.CreateSubject(request, timeout=DEADLINE).subject.name
    admin.DeleteSubject(subject_pb2.DeleteSubjectRequest(name=name), timeout=DEADLINE)
    assert [short(entry) for entry in told()] == [
        ("CreateSubject", "subjects/told", "done"),
        ("DeleteSubject", "subjects/told", "done"),
    ]
