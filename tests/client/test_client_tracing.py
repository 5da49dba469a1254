"""Spans of the client's calls, and that a program without OpenTelemetry has none."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import grpc
import mooring
import mooring.aio
import pytest
from mooring import _tracing
from mooring.v1 import job_pb2, personalization_pb2, subject_pb2
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

SHAPES = {
    "GetServerInfo": "mooring.v1.PersonalizationService",
    "Generate": "mooring.v1.PersonalizationService",
    "GenerateBatch": "mooring.v1.PersonalizationService",
    "UploadPhotos": "mooring.v1.SubjectService",
}


@pytest.fixture
def spans(monkeypatch) -> Iterator[InMemorySpanExporter]:
    """What a program's tracer provider is given; the process has one, and other tests shall not see it."""
    provider, exporter = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter


def answers(server, *, code: grpc.StatusCode | None = None) -> dict[str, str]:
    """Let the server answer a method of each shape; what it was sent as `traceparent`, by method."""
    sent: dict[str, str] = {}

    def noted(name, respond):
        def answer(request, context):
            sent[name] = dict(context.invocation_metadata()).get("traceparent", "")
            if hasattr(request, "__next__"):
                list(request)
            if code is not None:
                context.abort(code, "no")
            return respond()

        return answer

    done = personalization_pb2.GenerateDone(images=1)
    responses = {
        "GetServerInfo": lambda: personalization_pb2.GetServerInfoResponse(tenant="tenants/acme"),
        "Generate": lambda: iter([personalization_pb2.GenerateResponse(done=done)]),
        "GenerateBatch": lambda: iter([personalization_pb2.GenerateBatchResponse(id="a", done=done)]),
        "UploadPhotos": subject_pb2.UploadPhotosResponse,
    }
    server.answers |= {name: noted(name, respond) for name, respond in responses.items()}
    return sent


def call_all(client: mooring.Client) -> None:
    for work in (
        client.server_info,
        lambda: list(client.generate("a dog")),
        lambda: list(client.generate_batch([("a", {"prompt": "a dog"})])),
        lambda: client.upload_photos("rex", [("a.png", b"png")]),
    ):
        try:
            work()
        except mooring.errors.NotFoundError:
            continue


async def call_all_aio(client: mooring.aio.Client) -> None:
    async def drained(events):
        async for _event in events:
            pass

    for work in (
        client.server_info,
        lambda: drained(client.generate("a dog")),
        lambda: drained(client.generate_batch([("a", {"prompt": "a dog"})])),
        lambda: client.upload_photos("rex", [("a.png", b"png")]),
    ):
        try:
            await work()
        except mooring.errors.NotFoundError:
            continue


def finished(spans: InMemorySpanExporter, count: int = len(SHAPES)) -> tuple[ReadableSpan, ...]:
    """Once they are there: those of streams end on a thread of gRPC's."""
    end = time.monotonic() + 60
    while len(spans.get_finished_spans()) < count and time.monotonic() < end:
        time.sleep(0.01)
    return spans.get_finished_spans()


def check(ended: tuple[ReadableSpan, ...], sent: dict[str, str], code: grpc.StatusCode) -> None:
    assert {span.name for span in ended} == {f"{service}/{name}" for name, service in SHAPES.items()}
    assert len(ended) == len(SHAPES)
    for span in ended:
        name = span.attributes["rpc.method"]
        assert span.kind is SpanKind.CLIENT
        assert span.attributes["rpc.system"] == "grpc"
        assert span.attributes["rpc.service"] == SHAPES[name]
        assert span.attributes["rpc.grpc.status_code"] == code.value[0]
        failed = code is not grpc.StatusCode.OK
        assert (span.status.status_code is StatusCode.ERROR) == failed
        ids = trace.format_trace_id(span.context.trace_id), trace.format_span_id(span.context.span_id)
        told, _, flags = sent[name].rpartition("-")
        assert told == f"00-{ids[0]}-{ids[1]}"
        assert int(flags, 16) & trace.TraceFlags.SAMPLED


CODES = [None, grpc.StatusCode.NOT_FOUND]


@pytest.mark.parametrize("code", CODES)
def test_each_shape_of_call_has_one_span_that_the_server_is_told(server, spans, code):
    sent = answers(server, code=code)
    with mooring.Client(server.target) as client:
        call_all(client)
    check(finished(spans), sent, code or grpc.StatusCode.OK)


@pytest.mark.parametrize("code", CODES)
async def test_so_it_is_with_asyncio(server, spans, code):
    sent = answers(server, code=code)
    async with mooring.aio.Client(server.target) as client:
        await call_all_aio(client)
    check(finished(spans), sent, code or grpc.StatusCode.OK)


def test_a_program_without_a_provider_passes_its_context_on_and_records_nothing(server):
    sent = answers(server)
    with mooring.Client(server.target) as client:
        client.server_info()
        assert sent["GetServerInfo"] == ""
        outer = trace.SpanContext(1, 2, is_remote=True, trace_flags=trace.TraceFlags(1))
        with trace.use_span(trace.NonRecordingSpan(outer)):
            client.server_info()
    assert sent["GetServerInfo"] == f"00-{1:032x}-{2:016x}-01"


def test_without_opentelemetry_channels_are_grpc_s_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    channel = grpc.insecure_channel("127.0.0.1:1")
    assert _tracing.traced(channel) is channel
    assert _tracing.traced_aio(channel) is channel
    channel.close()


def test_a_watch_that_goes_on_has_a_span_for_each_connection(server, spans):
    seen: list[int] = []

    def watch(request, context):
        seen.append(request.after_sequence)
        if len(seen) == 1:
            yield job_pb2.WatchJobResponse(sequence=1, job=job_pb2.Job(state=job_pb2.JOB_STATE_RUNNING))
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        yield job_pb2.WatchJobResponse(sequence=2, job=job_pb2.Job(state=job_pb2.JOB_STATE_SUCCEEDED))

    server.answers["WatchJob"] = watch
    with mooring.Client(server.target) as client:
        list(client.watch("job"))
    assert seen == [0, 1]
    codes = [span.attributes["rpc.grpc.status_code"] for span in finished(spans, 2)]
    assert codes == [grpc.StatusCode.UNAVAILABLE.value[0], 0]
