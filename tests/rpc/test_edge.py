"""The interceptor on every shape of call and every way in which a call can end, over real connections."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from urllib.parse import quote

import grpc
import grpc.aio
import pytest
import structlog
from mooring_server.config import Quota
from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.rpc.edge import Access, EdgeInterceptor, Gate
from mooring_server.rpc.identity import Authenticator
from mooring_server.rpc.permissions import Permission, Rule
from mooring_server.rpc.quotas import Quotas
from mooring_server.telemetry.metrics import Metrics
from mooring_server.telemetry.traces import Tracing
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_span_id, format_trace_id
from rpc_calls import DEADLINE, read_failure

SHAPES = ("unary", "client_stream", "server_stream", "bidi_stream")


class Endings:
    """One method per shape; the request says how it shall end. `ended` fills as handlers leave."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.left: list[str] = []

    async def end(self, how: str, context) -> None:
        self.entered.set()
        try:
            match how:
                case "typed":
                    raise MooringError(Reason.QUEUE_FULL, "No room.", remedy="Wait.")
                case "abort":
                    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not now")
                case "exception":
                    raise ZeroDivisionError("a secret of the inside")
                case "cancel" | "deadline":
                    await asyncio.sleep(DEADLINE)
        finally:
            self.left.append(how)

    async def unary(self, request, context):
        await self.end(request.decode(), context)
        return b"done"

    async def client_stream(self, requests, context):
        async for request in requests:
            await self.end(request.decode(), context)
        return b"done"

    async def server_stream(self, request, context):
        yield b"one"
        await self.end(request.decode(), context)
        yield b"two"

    async def bidi_stream(self, requests, context):
        # the other kind of streaming handler: it writes by itself
        async for request in requests:
            await context.write(b"one")
            await self.end(request.decode(), context)
            await context.write(b"two")


@pytest.fixture
async def edge():
    endings, metrics, gate = Endings(), Metrics("0"), Gate(ready=True)
    authenticator = Authenticator((), find_key=lambda _key: pytest.fail("nobody shows a key"))
    access = Access(
        authenticator, Quotas(lambda _tenant: Quota(), time.monotonic), lambda _: Rule(Permission.READ)
    )
    provider, spans = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    tracing = Tracing(provider.get_tracer("test"))
    server = grpc.aio.server(interceptors=[EdgeInterceptor(metrics, gate, access, tracing)])
    make = {
        "unary": grpc.unary_unary_rpc_method_handler,
        "client_stream": grpc.stream_unary_rpc_method_handler,
        "server_stream": grpc.unary_stream_rpc_method_handler,
        "bidi_stream": grpc.stream_stream_rpc_method_handler,
    }
    handlers = {shape: make[shape](getattr(endings, shape)) for shape in SHAPES}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Endings", handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await channel.channel_ready()  # no deadline shall run out on the way to the handler
        yield SimpleNamespace(channel=channel, endings=endings, metrics=metrics, gate=gate, spans=spans)
    await server.stop(None)


def start(edge, shape: str, how: str, **options):
    channel, path, request = edge.channel, f"/test.Endings/{shape}", how.encode()

    async def requests():
        yield request

    match shape:
        case "unary":
            return channel.unary_unary(path)(request, **options)
        case "client_stream":
            return channel.stream_unary(path)(requests(), **options)
        case "server_stream":
            return channel.unary_stream(path)(request, **options)
        case _:
            return channel.stream_stream(path)(requests(), **options)


async def finish(shape: str, call) -> list[bytes]:
    return (
        [message async for message in call]
        if shape.endswith(("server_stream", "bidi_stream"))
        else [await call]
    )


def sample(edge, name: str, shape: str, **labels: str) -> float:
    values = {"grpc_type": shape, "grpc_service": "test.Endings", "grpc_method": shape, **labels}
    return edge.metrics.registry.get_sample_value(name, values) or 0.0


@pytest.mark.parametrize("how", ["ok", "typed", "abort", "exception", "cancel", "deadline"])
@pytest.mark.parametrize("shape", SHAPES)
async def test_every_end_of_every_shape_is_counted_once_with_its_code(edge, shape, how):
    expected = {
        "ok": grpc.StatusCode.OK,
        "typed": grpc.StatusCode.RESOURCE_EXHAUSTED,
        "abort": grpc.StatusCode.FAILED_PRECONDITION,
        "exception": grpc.StatusCode.INTERNAL,
        "cancel": grpc.StatusCode.CANCELLED,
        "deadline": grpc.StatusCode.DEADLINE_EXCEEDED,
    }[how]
    call = start(edge, shape, how, **({"timeout": 1.5} if how == "deadline" else {}))
    if how == "ok":
        messages = await finish(shape, call)
        assert messages == ([b"done"] if shape in {"unary", "client_stream"} else [b"one", b"two"])
    elif how == "cancel":
        running = asyncio.ensure_future(finish(shape, call))
        await asyncio.wait_for(edge.endings.entered.wait(), DEADLINE)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    else:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await finish(shape, call)
        assert caught.value.code() == expected

    await asyncio.wait_for(edge.gate.idle.wait(), DEADLINE)
    assert edge.endings.left == [how], "the handler did not end with its call"
    assert sample(edge, "grpc_server_started_total", shape) == 1
    counted = {
        code.name: sample(edge, "grpc_server_handled_total", shape, grpc_code=code.name)
        for code in grpc.StatusCode
    }
    assert {name: count for name, count in counted.items() if count} == {expected.name: 1}
    assert sample(edge, "grpc_server_handling_seconds_count", shape) == 1
    assert edge.metrics.registry.get_sample_value("mooring_rpcs_in_flight") == 0
    (span,) = edge.spans.get_finished_spans()
    assert span.name == f"test.Endings/{shape}"
    assert span.attributes["rpc.grpc.status_code"] == expected.value[0]
    reason = {"typed": "QUEUE_FULL", "exception": "INTERNAL"}.get(how)
    assert span.attributes.get("mooring.reason") == reason
    assert span.status.is_ok == (how not in {"exception", "deadline"})
    assert "secret" not in span.to_json()


async def test_a_typed_error_carries_reason_remedy_and_pause(edge):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await start(edge, "unary", "typed", metadata=[("x-request-id", "abc-1")])
    error = caught.value
    failure = read_failure(error.code(), error.details(), error.trailing_metadata())
    assert failure.reason == "QUEUE_FULL"
    assert failure.message == "No room. Wait."
    assert failure.metadata == {"remedy": "Wait.", "request_id": "abc-1", "scope": "server"}
    assert failure.retry
    assert int(failure.trailers["grpc-retry-pushback-ms"]) > 0
    assert failure.trailers["x-request-id"] == "abc-1"


async def test_an_unexpected_error_tells_its_request_id_and_nothing_of_the_inside(edge):
    with structlog.testing.capture_logs() as logs, pytest.raises(grpc.aio.AioRpcError) as caught:
        await start(edge, "unary", "exception")
    error = caught.value
    failure = read_failure(error.code(), error.details(), error.trailing_metadata())
    assert failure.reason == "INTERNAL"
    assert failure.metadata["request_id"] in failure.message
    assert "secret" not in str(failure)
    assert [line["error_type"] for line in logs if line["event"] == "unexpected error"] == [
        "ZeroDivisionError"
    ]


@pytest.mark.parametrize("how", ["ok", "typed", "exception"])
async def test_each_call_writes_one_canonical_line(edge, how):
    merge = structlog.contextvars.merge_contextvars
    with structlog.testing.capture_logs(processors=[merge]) as logs:
        try:
            await start(edge, "unary", how, metadata=[("x-request-id", "abc-2")])
        except grpc.aio.AioRpcError:
            assert how != "ok"
        await asyncio.wait_for(edge.gate.idle.wait(), DEADLINE)  # the line is written as the call ends
    lines = [line for line in logs if line["event"] == "rpc"]
    assert len(lines) == 1
    assert lines[0]["method"] == "test.Endings/unary"
    assert lines[0]["tenant"] == "local"
    assert lines[0]["request_id"] == "abc-2"
    assert lines[0]["code"] == {"ok": "OK", "typed": "RESOURCE_EXHAUSTED", "exception": "INTERNAL"}[how]
    assert lines[0]["seconds"] >= 0
    (span,) = edge.spans.get_finished_spans()
    assert lines[0]["trace_id"] == format_trace_id(span.context.trace_id)
    assert lines[0]["span_id"] == format_span_id(span.context.span_id)
    assert span.attributes["mooring.request_id"] == "abc-2"


async def test_a_bad_request_id_is_replaced(edge):
    call = start(edge, "unary", "ok", metadata=[("x-request-id", "two words \x7e" + "x" * 100)])
    await call
    assert len(dict(await call.trailing_metadata())["x-request-id"]) == 32


@pytest.mark.parametrize("moment", ["loading", "draining"])
async def test_calls_are_refused_as_retryable_before_and_after_service(edge, moment):
    if moment == "loading":
        edge.gate.ready = False
    else:
        edge.gate.draining.set()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await start(edge, "unary", "ok")
    error = caught.value
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    failure = read_failure(error.code(), error.details(), error.trailing_metadata())
    assert failure.reason == "DRAINING"
    assert failure.retry


async def test_details_fit_into_a_header_however_much_is_wrong(edge, monkeypatch):
    async def much(how, context):
        fields = [FieldViolation(f"files[{i}]", "damaged " * 100) for i in range(100)]
        raise MooringError(Reason.BAD_IMAGE, "ü" * 5000, metadata={"cut": "x" * 9000}, fields=fields)

    monkeypatch.setattr(edge.endings, "end", much)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await start(edge, "unary", "ok")
    error = caught.value
    failure = read_failure(error.code(), error.details(), error.trailing_metadata())
    assert failure.reason == "BAD_IMAGE"
    assert "files[0]" in failure.fields
    assert "more" in failure.fields["…"]
    assert len(failure.trailers["grpc-status-details-bin"]) < 5000


async def test_details_fit_into_a_header_in_any_script(edge, monkeypatch):
    """A character has up to four bytes, and twelve where a status message is percent-encoded."""

    async def much(how, context):
        fields = [FieldViolation("\U0001f600" * 400, "\U0001f600" * 400)]
        metadata = {"cut": "\U0001f600" * 3000}
        raise MooringError(
            Reason.BAD_IMAGE, "\U0001f600" * 5000, remedy="漢" * 900, metadata=metadata, fields=fields
        )

    monkeypatch.setattr(edge.endings, "end", much)
    for _ in range(20):  # beyond 8 KiB gRPC refuses some headers and lets others pass
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await start(edge, "unary", "ok")
        error = caught.value
        failure = read_failure(error.code(), error.details(), error.trailing_metadata())
        assert failure.reason == "BAD_IMAGE"
        on_the_wire = len(quote(failure.message)) + len(failure.trailers["grpc-status-details-bin"]) * 4 / 3
        assert on_the_wire < 7000


async def test_what_is_no_text_is_told_all_the_same(edge, monkeypatch):
    async def lone_surrogate(how, context):
        raise MooringError(Reason.BATCH_NOT_VALID, "a\ud800", fields=[FieldViolation("\ud800", "\udfff")])

    monkeypatch.setattr(edge.endings, "end", lone_surrogate)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await start(edge, "unary", "ok")
    error = caught.value
    failure = read_failure(error.code(), error.details(), error.trailing_metadata())
    assert (failure.reason, failure.message, failure.fields) == ("BATCH_NOT_VALID", "a?", {"?": "?"})
