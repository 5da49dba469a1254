"""A collector of traces: the real service of OTLP over gRPC, which keeps what it is sent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from rpc_calls import DEADLINE


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """A context manager; `hang` makes it take calls and never answer."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.asked = threading.Event()
        self._news = threading.Condition()
        self._hanging = threading.Event()
        self._let_go = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go.set()
        self._server.stop(None).wait()

    def hang(self) -> None:
        self._hanging.set()

    def Export(self, request, context):  # noqa: N802 - as in the contract
        self.asked.set()
        if self._hanging.is_set():
            self._let_go.wait(DEADLINE)
        with self._news:
            for group in request.resource_spans:
                self.resources.append(attributes_of(group.resource))
                self.spans += [span for scope in group.scope_spans for span in scope.spans]
            self._news.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_for(self, found: Callable[[list[Span]], Any]) -> Any:
        """What `found` makes of the spans, once that is something."""
        with self._news:
            self._news.wait_for(lambda: found(self.spans), timeout=DEADLINE)
            made = found(self.spans)
            assert made, sorted(f"{span.name} {attributes_of(span)}" for span in self.spans)
            return made


def attributes_of(part: Any) -> dict[str, Any]:
    """Attributes as a dictionary."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in part.attributes}
