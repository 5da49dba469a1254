"""Traces: OpenTelemetry spans of calls, of what is done for them, and of jobs.

Off unless OpenTelemetry's own variables name a collector (docs/operations.md): else no span is made, and the
SDK is not even imported. Spans are made by hand with the API: only the outermost interceptor knows how a call
ended, and only the engine knows when its work was really done.

What goes out is bounded: names are those of methods, stages and phases; attributes are what the canonical log
line carries, a prompt as its hash and a tenant as a short hash. No exception's text: it may quote a prompt.

Left out: baggage, which nothing here reads, and a global tracer provider: several servers fit into a process.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Token

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mooring_server.errors import MooringError, Reason

Value = str | int | float | bool
Attributes = Mapping[str, Value]

_W3C = TraceContextTextMapPropagator()
_SERVER_FAULTS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""Codes that are errors of a server's span by OpenTelemetry's conventions; others are the caller's affair."""
_MAX_TEXT = 1024


class CallSpan:
    """The span of one call; `end` it once.

    Args:
        span: current from here on in this context.
    """

    def __init__(self, span: Span | None) -> None:
        self._span = trace.INVALID_SPAN if span is None else span
        self._token: Token[Context] | None = None
        if span is not None:
            self._token = contexts.attach(trace.set_span_in_context(span))

    @property
    def ids(self) -> dict[str, str]:
        """`trace_id` and `span_id` for log lines; empty when there is no trace."""
        found = self._span.get_span_context()
        if not found.is_valid:
            return {}
        return {
            "trace_id": trace.format_trace_id(found.trace_id),
            "span_id": trace.format_span_id(found.span_id),
        }

    def caller(self, tenant: str) -> None:
        """Say whose call it is, once that is known."""
        if self._span.is_recording():
            self._span.set_attribute("mooring.tenant_hash", tenant_hash(tenant))

    def end(self, code: tuple[int, str], reason: str, facts: Attributes) -> None:
        """The call has ended.

        Args:
            code: of gRPC, number and name.
            reason: of ErrorInfo; empty when there is none.
            facts: what the canonical log line tells of the call.
        """
        number, name = code
        if self._span.is_recording():
            self._span.set_attributes(_named(facts))
            self._span.set_attribute("rpc.grpc.status_code", number)
            if number:
                self._span.set_attribute("error.type", name)
            if reason:
                self._span.set_attribute("mooring.reason", reason)
            if name in _SERVER_FAULTS:
                self._span.set_status(Status(StatusCode.ERROR, reason or name))
        self._span.end()
        if self._token is not None:
            contexts.detach(self._token)
            self._token = None


UNTRACED = CallSpan(None)
"""Of a call that has no span."""


class RequestSpans:
    """What is done for one request, as children of its span; the engine's `RequestTrace`. On any thread."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer, self._span = tracer, span
        self._parent = trace.set_span_in_context(span, Context())

    def stage(self, name: str, began: int, ended: int, attributes: Attributes | None = None) -> None:
        """A stage, in nanoseconds since the epoch."""
        span = self._tracer.start_span(
            name, self._parent, attributes=_named(attributes or {}), start_time=began
        )
        span.end(ended)

    def tick(self, others: Sequence[RequestSpans], began: int, ended: int, attributes: Attributes) -> None:
        """A pass that served this request and others: it belongs to none of them, so it links to them all."""
        members = [member._span for member in (self, *others)]  # noqa: SLF001 - of one class
        links = [Link(member.get_span_context()) for member in members]
        span = self._tracer.start_span(
            "tick", Context(), attributes=_named(attributes), links=links, start_time=began
        )
        span.end(ended)


class WorkSpan:
    """A span around a piece of work, as `Tracing.work` hands it out."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def failed(self, reason: str) -> None:
        """The work failed."""
        self._span.set_attribute("mooring.reason", reason)
        self._span.set_status(Status(StatusCode.ERROR, reason))


class RowSpan:
    """One row of a batch job, from its begin to its record; `end` it once.

    Args:
        tracer: makes its children.
        span: its own; None: the row is not traced.
    """

    def __init__(self, tracer: Tracer | None = None, span: Span | None = None) -> None:
        self._span = span
        self.trace = RequestSpans(tracer, span) if tracer is not None and span is not None else None

    def stage(self, name: str, began: int) -> None:
        """A stage that began then, in nanoseconds since the epoch, and ended now."""
        if self.trace is not None:
            self.trace.stage(name, began, time.time_ns())

    def end(self, outcome: str, reason: str = "") -> None:
        """What came of it: "drawn", "failed" for that reason, or "put back" to be drawn again."""
        if self._span is None:
            return
        self._span.set_attribute("mooring.row.outcome", outcome)
        if reason:
            self._span.set_attribute("mooring.reason", reason)
        if outcome == "failed":
            self._span.set_status(Status(StatusCode.ERROR, reason))
        self._span.end()


UNTRACED_ROW = RowSpan()
"""Of a row that has no span."""


class JobSpan:
    """One runner's work on a job, with a child for each phase. Safe on the threads that a job has."""

    def __init__(self, tracer: Tracer | None, span: Span, job_id: str = "") -> None:
        self._tracer, self._span, self._job_id = tracer, span, job_id
        self._lock = threading.Lock()
        self._phase = ""
        self._child: Span | None = None
        self._reason = ""

    def phase(self, name: str) -> None:
        """The job is in this phase from here on; nothing when it was already."""
        if self._tracer is None:
            return
        with self._lock:
            if name == self._phase:
                return
            self._phase = name
            if self._child is not None:
                self._child.end()
            self._child = self._tracer.start_span(name, trace.set_span_in_context(self._span, Context()))

    def row(self, number: int, began: int) -> RowSpan:
        """A row of a batch job, which began then, in nanoseconds since the epoch.

        A trace of its own that links to the job: a trace of a hundred thousand rows could be neither stored
        nor shown. Recorded if the job is.
        """
        if self._tracer is None or not self._span.is_recording():
            return UNTRACED_ROW
        attributes: dict[str, Value] = {"mooring.job.id": self._job_id, "mooring.row": number}
        links = [Link(self._span.get_span_context())]
        span = self._tracer.start_span(
            "batch row", Context(), attributes=attributes, links=links, start_time=began
        )
        return RowSpan(self._tracer, span)

    def failed(self, reason: str) -> None:
        """Why the job fails; told before `end`."""
        self._reason = reason

    def end(self, outcome: str) -> None:
        """The runner is done with the job: a final state's name, "DRAINING" or "LEASE_LOST"."""
        with self._lock:
            if self._child is not None:
                self._child.end()
                self._child = None
            self._span.set_attribute("mooring.job.outcome", outcome)
            if self._reason:
                self._span.set_attribute("mooring.reason", self._reason)
                self._span.set_status(Status(StatusCode.ERROR, self._reason))
            self._span.end()


class Tracing:
    """Spans of one server.

    Args:
        tracer: makes them; None: tracing is off and nothing is made.
        close: sends what is left, within so many seconds, and ends.
    """

    def __init__(
        self, tracer: Tracer | None = None, close: Callable[[float], None] = lambda _seconds: None
    ) -> None:
        self._tracer, self._close = tracer, close

    @property
    def on(self) -> bool:
        """Whether spans are made."""
        return self._tracer is not None

    def call(
        self, service: str, method: str, request_id: str, metadata: Iterable[tuple[str, str | bytes]]
    ) -> CallSpan:
        """The span of a call that begins, in the caller's trace where its metadata name one (W3C)."""
        if self._tracer is None:
            return UNTRACED
        attributes = {
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": method,
            "mooring.request_id": request_id,
        }
        return CallSpan(
            self._tracer.start_span(
                f"{service}/{method}", _incoming(metadata), SpanKind.SERVER, attributes=attributes
            )
        )

    def current(self) -> RequestSpans | None:
        """Where the stages of the request at hand go; None when it is not recorded."""
        if self._tracer is None:
            return None
        span = trace.get_current_span()
        return RequestSpans(self._tracer, span) if span.is_recording() else None

    @contextmanager
    def work(self, name: str) -> Iterator[WorkSpan]:
        """A child of the current span for the time of a block; without a current span there is none."""
        if self._tracer is None or not trace.get_current_span().is_recording():
            yield WorkSpan(trace.INVALID_SPAN)
            return
        with self._tracer.start_as_current_span(
            name, record_exception=False, set_status_on_exception=False
        ) as span:
            yield WorkSpan(span)

    def traceparent(self) -> str | None:
        """The current span in W3C form, to be kept with what is done later; None when there is none."""
        if self._tracer is None:
            return None
        carrier: dict[str, str] = {}
        _W3C.inject(carrier)
        return carrier.get("traceparent")

    def job(self, kind: str, job_id: str, attempt: int, traceparent: str | None) -> JobSpan:
        """A runner begins with a job.

        A trace of its own, since it may run hours after the call, on another machine and several times; it
        links to the call that made the job, and is recorded if that was.
        """
        if self._tracer is None:
            return JobSpan(None, trace.INVALID_SPAN)
        attributes: dict[str, Value] = {
            "mooring.job.kind": kind,
            "mooring.job.id": job_id,
            "mooring.job.attempt": attempt,
        }
        made_by = trace.get_current_span(_incoming([("traceparent", traceparent or "")])).get_span_context()
        links = [Link(made_by)] if made_by.is_valid else []
        span = self._tracer.start_span(
            f"job {kind}", Context(), SpanKind.CONSUMER, attributes=attributes, links=links
        )
        return JobSpan(self._tracer, span, job_id)

    def close(self, seconds: float) -> None:
        """Send what is left, for at most so long; what a collector does not take until then is dropped."""
        self._close(seconds)


def from_environment(version: str) -> Tracing:
    """Tracing as OpenTelemetry's variables say; off when they name no collector.

    Raises:
        MooringError: INVALID_FIELD for a protocol that is not gRPC.
    """
    named = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    off = _variable("OTEL_SDK_DISABLED") == "true" or _variable("OTEL_TRACES_EXPORTER") == "none"
    if off or not any(_variable(name) for name in named):
        return Tracing()
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = _variable(name)
        if protocol == "grpc":
            break
        if protocol:
            raise MooringError(
                Reason.INVALID_FIELD,
                f"{name} is {protocol!r}, and spans are sent by gRPC only.",
                remedy="Set it to grpc and name the collector's gRPC port (4317), or unset both.",
            )
    from mooring_server.telemetry import trace_export

    tracer, close = trace_export.open_tracer(version)
    return Tracing(tracer, close)


def tenant_hash(tenant: str) -> str:
    """A tenant as traces show it: stable, so that its calls are found; the log line has the name."""
    return hashlib.sha256(tenant.encode()).hexdigest()[:16]


def _variable(name: str) -> str:
    return os.environ.get(name, "").strip().lower()


def _incoming(metadata: Iterable[tuple[str, str | bytes]]) -> Context:
    carrier = {
        key: value
        for key, value in metadata
        if key in {"traceparent", "tracestate"} and isinstance(value, str)
    }
    return _W3C.extract(carrier, Context())


def _named(attributes: Attributes) -> dict[str, Value]:
    """With the prefix of our own attributes, texts cut to a bound."""
    return {
        f"mooring.{name}": value[:_MAX_TEXT] if isinstance(value, str) else value
        for name, value in attributes.items()
    }
