"""A scripted server: real gRPC over loopback, answers decided by the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from mooring.v1 import (
    adapter_pb2_grpc,
    job_pb2_grpc,
    personalization_pb2_grpc,
    subject_pb2_grpc,
)

SERVICERS = {
    "PersonalizationService": personalization_pb2_grpc,
    "SubjectService": subject_pb2_grpc,
    "AdapterService": adapter_pb2_grpc,
    "JobService": job_pb2_grpc,
}


class ScriptedServer:
    """Answers each method with the function that the test put under its name; counts the calls.

    A function takes (request or request iterator, context) and returns a message or an iterator of them.
    """

    def __init__(self) -> None:
        self.answers: dict[str, Callable[..., Any]] = {}
        self.calls: dict[str, int] = {}
        self.port = 0
        self._server: grpc.Server | None = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        for service, module in SERVICERS.items():
            base = getattr(module, f"{service}Servicer")
            methods = {
                name: self._answer(name)
                for name in vars(base)
                if not name.startswith("_") and name[0].isupper()
            }
            getattr(module, f"add_{service}Servicer_to_server")(type(service, (base,), methods)(), server)
        self.port = server.add_insecure_port(f"127.0.0.1:{self.port}")
        server.start()
        self._server = server

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop(None).wait()
            self._server = None

    def _answer(self, name: str) -> Callable[..., Any]:
        def method(_servicer: Any, request: Any, context: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            return self.answers[name](request, context)

        return method


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A running one; `conftest.py` of the areas that want it imports this."""
    scripted = ScriptedServer()
    scripted.start()
    yield scripted
    scripted.stop()


def abort_with(
    context: Any,
    code: grpc.StatusCode,
    message: str,
    *,
    reason: str = "",
    remedy: str = "",
    fields: dict[str, str] | None = None,
    retry_seconds: float | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Abort as the server does: status message, ErrorInfo with remedy, BadRequest, RetryInfo."""
    info = error_details_pb2.ErrorInfo(
        reason=reason,
        domain="mooring",
        metadata={**(metadata or {}), **({"remedy": remedy} if remedy else {})},
    )
    details = [info]
    if fields:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=f, description=d) for f, d in fields.items()
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if retry_seconds is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(retry_seconds * 1000))
        details.append(retry)
    status = status_pb2.Status(code=code.value[0], message=f"{message} {remedy}".strip())
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    context.set_trailing_metadata([("grpc-status-details-bin", status.SerializeToString())])
    context.abort(code, status.message)
