"""OpenTelemetry's SDK set up to send spans by OTLP; imported only when tracing is on.

Everything that can be set is read by the SDK from its standard variables: endpoint, headers, certificates,
sampler, limits, batching. Spans go into a bounded queue and a thread sends them, so that a collector that is
away, slow or hangs costs spans and never a call.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanKind, Tracer, TraceState
from opentelemetry.util.types import Attributes

from mooring_server.telemetry.logs import get_logger

log = get_logger("mooring.traces")


class FollowingSampler(Sampler):
    """Decides by what a span belongs to, and asks another sampler about new traces only.

    A child within this process is recorded when its parent is, whatever sampler is set. A root that links to
    spans (a tick, a job) is recorded when one of them is: its own trace id says nothing about theirs.

    Args:
        inner: decides about traces that begin here or come from a caller.
    """

    def __init__(self, inner: Sampler) -> None:
        self._inner = inner

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """See `Sampler`."""
        parent = trace.get_current_span(parent_context).get_span_context()
        if parent.is_valid and not parent.is_remote:
            wanted = parent.trace_flags.sampled
        elif links and not parent.is_valid:
            wanted = any(link.context.trace_flags.sampled for link in links)
        else:
            return self._inner.should_sample(
                parent_context, trace_id, name, kind, attributes, links, trace_state
            )
        state = parent.trace_state if parent.is_valid else None
        if wanted:
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes, state)
        return SamplingResult(Decision.DROP, None, state)

    def get_description(self) -> str:
        """See `Sampler`."""
        return f"FollowingSampler{{{self._inner.get_description()}}}"


def open_tracer(version: str) -> tuple[Tracer, Callable[[float], None]]:
    """A tracer that sends to the collector of the environment, and how to end it.

    Args:
        version: of the software.

    Returns:
        The tracer, and a function that sends what is left within so many seconds.
    """
    by_variables = TracerProvider(shutdown_on_exit=False).sampler
    provider = TracerProvider(
        sampler=FollowingSampler(by_variables), resource=_resource(version), shutdown_on_exit=False
    )
    exporter = OTLPSpanExporter()
    provider.add_span_processor(BatchSpanProcessor(exporter))

    def close(seconds: float) -> None:
        # The SDK's shutdown keeps no timeout: a thread does it, which the process need not wait for.
        ending = threading.Thread(target=provider.shutdown, name="trace-flush", daemon=True)
        ending.start()
        ending.join(seconds)
        if ending.is_alive():
            log.warning("spans were dropped: the collector took none of them", seconds=round(seconds, 1))
            exporter.shutdown()  # cuts off what is being sent

    return provider.get_tracer("mooring_server", version), close


def _resource(version: str) -> Resource:
    """What the variables say of this process, and what they leave out."""
    given = Resource.create()
    ours: dict[str, str] = {}
    if str(given.attributes.get("service.name", "")).startswith("unknown_service"):
        ours["service.name"] = "mooring"
    if "service.version" not in given.attributes:
        ours["service.version"] = version
    if "service.instance.id" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        ours["service.instance.id"] = f"{socket.gethostname()}-{os.getpid()}"
    return given.merge(Resource(ours))
