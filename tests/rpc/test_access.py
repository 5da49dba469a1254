"""A real server that asks who calls: tenants beside each other, keys and tokens as they end, operators."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import structlog
from credentials import Issuer
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from mooring.v1 import adapter_pb2, job_pb2, subject_pb2
from mooring.v1 import personalization_pb2 as pb
from mooring_server.config import Role
from mooring_server.server import EmbeddedServer
from rpc_calls import DEADLINE, Failure, Stubs, failure_of, make_subject, png, publish, upload
from test_generate import drawn, generate

SECRET = "0123456789abcdef0123456789abcdef"


def as_(guarded: EmbeddedServer, keys: dict[tuple[str, Role], str], tenant: str, role: Role) -> Stubs:
    return Stubs(guarded.target, keys[tenant, role])


@pytest.fixture(scope="module")
def acme(guarded: EmbeddedServer, keys: dict[tuple[str, Role], str]) -> Stubs:
    return as_(guarded, keys, "acme", Role.ADMIN)


@pytest.fixture(scope="module")
def other(guarded: EmbeddedServer, keys: dict[tuple[str, Role], str]) -> Stubs:
    return as_(guarded, keys, "other", Role.ADMIN)


# -- another tenant's things look like nothing ---------------------------------------------------------------


@pytest.fixture(scope="module")
def things(guarded: EmbeddedServer, other: Stubs) -> dict[str, str]:
    """Names of things of the tenant "other", and of things that nobody has."""
    runtime = guarded.server.runtime
    subject = make_subject(other, "secret")
    publish(runtime, "secret", tenant="other")
    job = runtime.store.create_job("other", "elsewhere", {})  # of no kind that a runner takes
    return {
        "subjects": subject,
        "adapters": "tenants/other/adapters/secret",
        "jobs": f"tenants/other/jobs/{job.job_id}",
    }


ABSENT = {
    "subjects": "tenants/other/subjects/absent",
    "adapters": "tenants/other/adapters/absent",
    "jobs": f"tenants/other/jobs/{SECRET}",
}
PROBES: dict[str, Callable[[Stubs, dict[str, str]], Any]] = {
    "GetSubject": lambda s, n: s.subjects.GetSubject(
        subject_pb2.GetSubjectRequest(name=n["subjects"]), timeout=DEADLINE
    ),
    "DeleteSubject": lambda s, n: s.subjects.DeleteSubject(
        subject_pb2.DeleteSubjectRequest(name=n["subjects"]), timeout=DEADLINE
    ),
    "UploadPhotos": lambda s, n: upload(s, n["subjects"], {"a.png": png()}),
    "Train": lambda s, n: s.personalization.Train(pb.TrainRequest(subject=n["subjects"]), timeout=DEADLINE),
    "GetAdapter": lambda s, n: s.adapters.GetAdapter(
        adapter_pb2.GetAdapterRequest(name=n["adapters"]), timeout=DEADLINE
    ),
    "GetAdapter of a version": lambda s, n: s.adapters.GetAdapter(
        adapter_pb2.GetAdapterRequest(name=n["adapters"] + "@1"), timeout=DEADLINE
    ),
    "DeleteAdapter": lambda s, n: s.adapters.DeleteAdapter(
        adapter_pb2.DeleteAdapterRequest(name=n["adapters"]), timeout=DEADLINE
    ),
    "ExportAdapter": lambda s, n: s.adapters.ExportAdapter(
        adapter_pb2.ExportAdapterRequest(name=n["adapters"]), timeout=DEADLINE
    ),
    "Generate": lambda s, n: s.personalization.Generate(
        pb.GenerateRequest(prompt="a photo", adapter=n["adapters"]), timeout=DEADLINE
    ),
    "GetJob": lambda s, n: s.jobs.GetJob(job_pb2.GetJobRequest(name=n["jobs"]), timeout=DEADLINE),
    "CancelJob": lambda s, n: s.jobs.CancelJob(job_pb2.CancelJobRequest(name=n["jobs"]), timeout=DEADLINE),
    "WatchJob": lambda s, n: s.jobs.WatchJob(job_pb2.WatchJobRequest(name=n["jobs"]), timeout=DEADLINE),
    "GetEvaluation": lambda s, n: s.jobs.GetEvaluation(
        job_pb2.GetEvaluationRequest(name=n["jobs"]), timeout=DEADLINE
    ),
    "DownloadArtifact": lambda s, n: s.jobs.DownloadArtifact(
        job_pb2.DownloadArtifactRequest(name=n["jobs"], filename="x"), timeout=DEADLINE
    ),
}


def told(failure: Failure, names: dict[str, str]) -> Any:
    """All that a caller learns, but its own words and the number of its own call."""

    def without(text: str) -> str:
        for name in names.values():
            text = text.replace(name.rsplit("/", 1)[1], "…")
        return text

    metadata = {key: without(value) for key, value in failure.metadata.items() if key != "request_id"}
    return failure.code, without(failure.message), failure.reason, metadata, failure.fields, failure.retry


@pytest.mark.parametrize("probe", PROBES)
def test_what_belongs_to_another_tenant_is_told_apart_from_nothing_by_nothing(
    guarded: EmbeddedServer,
    acme: Stubs,
    things: dict[str, str],
    probe: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same answer, and by the same queries: so no clock tells either."""
    asked: dict[str, list[tuple[str, Any]]] = {}
    from sqlalchemy import event

    engine = guarded.server.runtime.store._engine
    results = {}
    for what, names in (("present", things), ("absent", ABSENT)):
        statements = asked[what] = []

        def note(_connection: Any, _cursor: Any, statement: str, *_: Any, into: Any = statements) -> None:
            # not the runner's own looking
            if threading.current_thread().name.startswith(("mooring-call", "mooring-long")):
                into.append(statement)

        event.listen(engine, "before_cursor_execute", note)
        try:
            results[what] = told(failure_of(lambda names=names: PROBES[probe](acme, names)), names)
        finally:
            event.remove(engine, "before_cursor_execute", note)
    assert results["present"] == results["absent"]
    assert results["present"][0] is grpc.StatusCode.NOT_FOUND
    assert asked["present"] == asked["absent"]
    assert asked["present"], "nothing was looked at: the comparison above would hold for anything"


def test_naming_another_tenant_as_parent_tells_nothing_of_it(acme: Stubs, things: dict[str, str]) -> None:
    def failures(tenant: str) -> list[Any]:
        parent = f"tenants/{tenant}"
        calls: list[Callable[[], Any]] = [
            lambda: acme.subjects.ListSubjects(subject_pb2.ListSubjectsRequest(parent=parent)),
            lambda: acme.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(parent=parent)),
            lambda: acme.jobs.ListJobs(job_pb2.ListJobsRequest(parent=parent)),
            lambda: acme.personalization.Train(pb.TrainRequest(parent=parent)),
        ]
        return [told(failure_of(call), {"tenant": parent}) for call in calls]

    assert failures("other") == failures("nobody")


def test_lists_hold_the_own_tenant_s_things_only(acme: Stubs, other: Stubs, things: dict[str, str]) -> None:
    make_subject(acme, "own", photos=0)
    mine = acme.subjects.ListSubjects(subject_pb2.ListSubjectsRequest(), timeout=DEADLINE).subjects
    theirs = other.subjects.ListSubjects(subject_pb2.ListSubjectsRequest(), timeout=DEADLINE).subjects
    assert {s.name.split("/")[1] for s in mine} == {"acme"}
    assert {s.name.split("/")[1] for s in theirs} == {"other"}


# -- credentials begin and end -------------------------------------------------------------------------------


def info(stubs: Stubs) -> str:
    tenant: str = stubs.personalization.GetServerInfo(pb.GetServerInfoRequest(), timeout=DEADLINE).tenant
    return tenant


def test_a_revoked_or_expired_key_is_refused_by_the_next_call(guarded: EmbeddedServer) -> None:
    store = guarded.server.runtime.store
    key, secret = store.create_key("acme", "user")
    stubs = Stubs(guarded.target, secret)
    assert info(stubs) == "tenants/acme"
    store.revoke_key(key.key_id)
    refused = failure_of(lambda: info(stubs))
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAUTHENTICATED, "NOT_AUTHENTICATED")
    _, expired = store.create_key("acme", "user", expire_time=time.time() - 1)
    assert failure_of(lambda: info(Stubs(guarded.target, expired))).code is grpc.StatusCode.UNAUTHENTICATED


def test_every_bad_credential_gets_the_same_answer_and_the_log_its_cause(
    guarded: EmbeddedServer, issuer: Issuer
) -> None:
    store = guarded.server.runtime.store
    revoked, secret = store.create_key("acme", "user")
    store.revoke_key(revoked.key_id)
    _, good = store.create_key("acme", "user")
    bad = {
        "": "missing",
        secret: "key_revoked",
        f"{good[:-1]}{'0' if good[-1] != '0' else '1'}": "key_secret",
        f"moor_{'0' * 16}_{'0' * 64}": "key_unknown",
        "moor_nonsense": "key_malformed",
        "nonsense": "token_malformed",
        "two words": "header",
        issuer.token(exp=1): "token_expired",
        issuer.token(aud="another"): "token_audience",
    }
    answers = set()
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        for credential in bad:
            failure = failure_of(lambda credential=credential: info(Stubs(guarded.target, credential)))
            answers.add((failure.code, failure.message, failure.reason, tuple(sorted(failure.metadata))))

        def causes() -> list[str]:
            return [line.get("refused", "") for line in lines if line["event"] == "rpc"]

        give_up = time.monotonic() + DEADLINE
        while len(causes()) < len(bad) and time.monotonic() < give_up:
            time.sleep(0.01)  # a call's line is written when its answer is on its way already
    assert len(answers) == 1
    assert sorted(causes()) == sorted(bad.values())


def test_a_token_opens_its_tenant_in_its_role(guarded: EmbeddedServer, issuer: Issuer) -> None:
    assert info(Stubs(guarded.target, issuer.token(tenant="other", role="read-only"))) == "tenants/other"
    assert info(Stubs(guarded.target, issuer.token("two", "PS256"))) == "tenants/acme"
    reader = Stubs(guarded.target, issuer.token(role="read-only"))
    assert failure_of(lambda: generate(reader)).code is grpc.StatusCode.PERMISSION_DENIED


def test_two_credentials_at_once_are_refused(
    guarded: EmbeddedServer, keys: dict[tuple[str, Role], str]
) -> None:
    stubs = Stubs(guarded.target, keys["acme", Role.USER])
    second = [("authorization", f"Bearer {keys['other', Role.USER]}")]
    call = stubs.personalization.GetServerInfo
    failure = failure_of(lambda: call(pb.GetServerInfoRequest(), metadata=second, timeout=DEADLINE))
    assert failure.code is grpc.StatusCode.UNAUTHENTICATED


def test_reflection_asks_too_where_it_is_told_to(
    guarded: EmbeddedServer, keys: dict[tuple[str, Role], str]
) -> None:
    def services(credential: str) -> int:
        channel = Stubs(guarded.target, credential).channel
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = list(stub.ServerReflectionInfo(iter([request]), timeout=DEADLINE))
        return len(answers[0].list_services_response.service)

    assert services(keys["acme", Role.READ_ONLY]) > 4
    assert failure_of(lambda: services("")).code is grpc.StatusCode.UNAUTHENTICATED


# -- operators -----------------------------------------------------------------------------------------------


def test_an_operator_sees_and_stops_work_and_touches_nothing_else(
    guarded: EmbeddedServer, keys: dict[tuple[str, Role], str], things: dict[str, str]
) -> None:
    operator = as_(guarded, keys, "acme", Role.OPERATOR)
    job = guarded.server.runtime.store.create_job("other", "elsewhere", {})
    name = f"tenants/other/jobs/{job.job_id}"
    listed = operator.jobs.ListJobs(job_pb2.ListJobsRequest(parent="tenants/other"), timeout=DEADLINE).jobs
    assert name in {found.name for found in listed}
    own = operator.jobs.ListJobs(job_pb2.ListJobsRequest(parent="tenants/-"), timeout=DEADLINE).jobs
    assert name not in {found.name for found in own}
    assert operator.jobs.GetJob(job_pb2.GetJobRequest(name=name), timeout=DEADLINE).job.name == name
    cancelled = operator.jobs.CancelJob(job_pb2.CancelJobRequest(name=name), timeout=DEADLINE).job
    assert cancelled.state == job_pb2.JOB_STATE_CANCELLED
    for probe in ("WatchJob", "GetEvaluation", "DownloadArtifact", "GetSubject", "GetAdapter"):
        assert (
            failure_of(lambda probe=probe: PROBES[probe](operator, things)).code is grpc.StatusCode.NOT_FOUND
        )
    for probe in ("DeleteSubject", "Train", "Generate", "ExportAdapter", "UploadPhotos"):
        failure = failure_of(lambda probe=probe: PROBES[probe](operator, things))
        assert failure.code is grpc.StatusCode.PERMISSION_DENIED


# -- tenants beside each other -------------------------------------------------------------------------------


def test_interleaved_tenants_get_the_bits_that_each_gets_alone(
    guarded: EmbeddedServer, keys: dict[tuple[str, Role], str]
) -> None:
    """Adapters of one name, and prompts of one text, that belong to two tenants, in the same batches."""
    runtime = guarded.server.runtime
    callers = {tenant: as_(guarded, keys, tenant, Role.USER) for tenant in ("acme", "other")}
    for seed, tenant in enumerate(callers):
        publish(runtime, "twin", tenant=tenant, seed=seed)
    wanted = [(tenant, seed) for seed in range(3) for tenant in callers]

    def draw(tenant: str, seed: int) -> np.ndarray:
        values = {"prompt": "a photo of <rex> dog", "adapter": "tenants/-/adapters/twin", "seed": seed}
        return drawn(generate(callers[tenant], **values))[0]

    alone = {key: draw(*key) for key in wanted}
    start = threading.Barrier(len(wanted))

    def together(key: tuple[str, int]) -> np.ndarray:
        start.wait(DEADLINE)
        return draw(*key)

    with ThreadPoolExecutor(len(wanted)) as threads:
        mixed = dict(zip(wanted, threads.map(together, wanted), strict=True))
    for key in wanted:
        assert np.array_equal(alone[key], mixed[key]), key
    assert not np.array_equal(alone["acme", 0], alone["other", 0]), "each tenant's adapter is its own"
