"""Every method that the server registers against every role, by its tables and over a real connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import Default
from mooring_server import server as server_module
from mooring_server.config import Role
from mooring_server.errors import MooringError
from mooring_server.rpc import permissions
from mooring_server.rpc.permissions import GRANTS, RULES, Permission, Rule, may, require, rule_of
from mooring_server.server import EmbeddedServer
from rpc_calls import DEADLINE, read_failure

SERVICES = (*server_module._SERVICES, "grpc.health.v1.Health")
METHODS: dict[str, MethodDescriptor] = {
    f"{service}/{method.name}": method
    for service in SERVICES
    for method in Default().FindServiceByName(service).methods
}

# Written out a second time on purpose: a change of the tables must be meant twice.
EVERYBODY = set(Role)
WORKERS = {Role.USER, Role.ADMIN}
EXPECTED: dict[str, set[Role]] = {
    "PersonalizationService/GetServerInfo": EVERYBODY,
    "PersonalizationService/Train": WORKERS,
    "PersonalizationService/Evaluate": WORKERS,
    "PersonalizationService/Generate": WORKERS,
    "PersonalizationService/GenerateBatch": WORKERS,
    "PersonalizationService/RunBatch": WORKERS,
    "SubjectService/CreateSubject": WORKERS,
    "SubjectService/GetSubject": EVERYBODY,
    "SubjectService/ListSubjects": EVERYBODY,
    "SubjectService/DeleteSubject": {Role.ADMIN},
    "SubjectService/UploadPhotos": WORKERS,
    "AdapterService/GetAdapter": EVERYBODY,
    "AdapterService/ListAdapters": EVERYBODY,
    "AdapterService/DeleteAdapter": {Role.ADMIN},
    "AdapterService/ExportAdapter": WORKERS,
    "AdapterService/ImportAdapter": {Role.ADMIN},
    "AdapterService/PublishAdapter": {Role.ADMIN},
    "AdapterService/RollBackAdapter": {Role.ADMIN},
    "AdapterService/DeleteAlias": {Role.ADMIN},
    "AdapterService/ListAliases": EVERYBODY,
    "AdapterService/ListAliasMoves": EVERYBODY,
    "AdapterService/GetGatePolicy": EVERYBODY,
    "AdapterService/UpdateGatePolicy": {Role.ADMIN},
    "AdapterService/ListGateDecisions": EVERYBODY,
    "JobService/GetJob": EVERYBODY,
    "JobService/ListJobs": EVERYBODY,
    "JobService/CancelJob": {*WORKERS, Role.OPERATOR},
    "JobService/WatchJob": EVERYBODY,
    "JobService/GetEvaluation": EVERYBODY,
    "JobService/DownloadArtifact": EVERYBODY,
    "JobService/DownloadBatch": EVERYBODY,
}


def allowed(method: str) -> set[Role]:
    return {role for role in Role if may(role, RULES[method])}


def test_every_method_has_a_rule_and_every_rule_a_method() -> None:
    assert set(RULES) == set(METHODS)


def test_roles_may_what_the_table_says() -> None:
    found = {name.removeprefix("mooring.v1."): allowed(name) for name in RULES if name.startswith("mooring.")}
    assert found == EXPECTED


def test_health_alone_is_open() -> None:
    assert {name.split("/")[0] for name, rule in RULES.items() if rule.permission is Permission.OPEN} == {
        "grpc.health.v1.Health"
    }
    assert all(Permission.OPEN not in granted for granted in GRANTS.values())


def test_what_was_never_declared_is_refused_to_everybody() -> None:
    rule = rule_of("mooring.v1.JobService/Undeclared")
    assert rule is None
    for role in Role:
        with pytest.raises(MooringError, match="may not make this call"):
            require(role, rule)


def test_reflection_is_as_open_as_the_setting_says() -> None:
    name = "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    assert rule_of(name, reflection=Permission.OPEN) == Rule(Permission.OPEN)
    assert rule_of(name) == Rule(Permission.READ)


def test_operators_go_anywhere_only_where_pictures_and_weights_do_not_show() -> None:
    assert {name.split("/")[1] for name, rule in RULES.items() if rule.operators_anywhere} == {
        "GetJob",
        "ListJobs",
        "CancelJob",
    }


# -- over a connection --------------------------------------------------------------------------------------


def outcome(channel: grpc.Channel, name: str, credential: str) -> tuple[grpc.StatusCode, str]:
    """The code and the reason that an empty request ends with."""
    method = METHODS[name]
    ways = (method.client_streaming, method.server_streaming)
    sort = "_".join("stream" if streams else "unary" for streams in ways)
    call: Callable[..., Any] = getattr(channel, sort)(f"/{name}")
    metadata = [("authorization", f"Bearer {credential}")] if credential else []
    request: Any = iter([b""]) if method.client_streaming else b""
    try:
        answer = call(request, metadata=metadata, timeout=DEADLINE)
        if method.server_streaming:
            next(answer, None)
            answer.cancel()
    except grpc.RpcError as error:
        failed: Any = error
        return failed.code(), read_failure(failed.code(), failed.details(), failed.trailing_metadata()).reason
    return grpc.StatusCode.OK, ""


@pytest.fixture(scope="module")
def channel(guarded: EmbeddedServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(guarded.target) as opened:
        yield opened


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("mooring.")])
def test_each_method_is_open_to_just_its_roles(
    channel: grpc.Channel, keys: dict[tuple[str, Role], str], name: str
) -> None:
    assert outcome(channel, name, "") == (grpc.StatusCode.UNAUTHENTICATED, "NOT_AUTHENTICATED")
    for role in Role:
        code, reason = outcome(channel, name, keys["acme", role])
        refused = (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, "NOT_ALLOWED")
        assert refused == (role not in EXPECTED[name.removeprefix("mooring.v1.")]), (role, code, reason)
        assert code not in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INTERNAL}


def test_health_needs_no_credential(channel: grpc.Channel) -> None:
    assert outcome(channel, "grpc.health.v1.Health/Check", "")[0] is grpc.StatusCode.OK


def test_a_method_that_does_not_exist_is_not_implemented(
    channel: grpc.Channel, keys: dict[tuple[str, Role], str]
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/mooring.v1.JobService/Nothing")(
            b"", metadata=[("authorization", f"Bearer {keys['acme', Role.ADMIN]}")], timeout=DEADLINE
        )
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_registered_method_without_a_rule_is_refused(
    channel: grpc.Channel, keys: dict[tuple[str, Role], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "mooring.v1.JobService/ListJobs"
    assert outcome(channel, name, keys["acme", Role.ADMIN])[0] is grpc.StatusCode.OK
    monkeypatch.setattr(permissions, "RULES", {k: rule for k, rule in RULES.items() if k != name})
    assert outcome(channel, name, keys["acme", Role.ADMIN]) == (
        grpc.StatusCode.PERMISSION_DENIED,
        "NOT_ALLOWED",
    )
