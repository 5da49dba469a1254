"""Traces from the client through the server to the engine and its jobs, as a collector receives them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import grpc
import mooring
import mooring.aio
import pytest
from collector import Collector, attributes_of
from mooring_server.engine.policy import TaskClass
from mooring_server.errors import MooringError
from mooring_server.jobs.batch_job import queue_batch
from mooring_server.jobs.batch_rows import PinnedAdapter, PinnedRow
from mooring_server.server import EmbeddedServer
from mooring_server.telemetry import trace_export, traces
from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context
from rpc_calls import DEADLINE, png, publish, settings_for

SERVICE = "mooring.v1.PersonalizationService"
GENERATE = f"{SERVICE}/Generate"
PROMPT = "a photo of a dog"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


@pytest.fixture(scope="module")
def traced(worded_base: Path, collector: Collector, tmp_path_factory) -> Iterator[EmbeddedServer]:
    """A server that sends its spans there."""
    settings = settings_for(worded_base, tmp_path_factory.mktemp("traced"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        running = EmbeddedServer(settings).__enter__()
    yield running
    running.__exit__(None, None, None)


@pytest.fixture(scope="module")
def program(collector: Collector) -> Iterator[TracerProvider]:
    """The tracer provider of a program that uses the client."""
    provider = TracerProvider(resource=Resource({"service.name": "program"}), shutdown_on_exit=False)
    provider.add_span_processor(
        BatchSpanProcessor(OTLPSpanExporter(endpoint=collector.endpoint), schedule_delay_millis=50)
    )
    yield provider
    provider.shutdown()


@pytest.fixture
def use(program: TracerProvider, monkeypatch) -> None:
    """As if the program had set its provider; the process has one, and other tests shall not see it."""
    monkeypatch.setattr(trace, "get_tracer", program.get_tracer)


@pytest.fixture
def client(traced: EmbeddedServer, use: None) -> Iterator[mooring.Client]:
    with mooring.Client(traced.target) as made:
        yield made


def under(span: Span) -> Callable[[Span], bool]:
    return lambda other: other.parent_span_id == span.span_id and other.trace_id == span.trace_id


def of_trace(program: TracerProvider, collector: Collector, work: Callable[[], object], enough) -> list[Span]:
    """Do something under a span of the program; its trace, once `enough` says so of the names in it."""
    with program.get_tracer("test").start_as_current_span("program") as span:
        work()
    wanted = span.get_span_context().trace_id.to_bytes(16, "big")

    def found(spans: list[Span]) -> list[Span]:
        mine = [one for one in spans if one.trace_id == wanted]
        names = [one.name for one in mine]
        return mine if "program" in names and enough(names) else []

    return collector.wait_for(found)


def one(spans: list[Span], name: str, kind: int = Span.SPAN_KIND_INTERNAL) -> Span:
    found = [span for span in spans if span.name == name and span.kind == kind]
    assert len(found) == 1, [(span.name, span.kind) for span in spans]
    return found[0]


def test_one_trace_leads_from_the_program_to_the_engine(client, traced, program, collector):
    publish(traced.server.runtime, "followed", placeholder="<secretword>")
    spans = of_trace(
        program,
        collector,
        lambda: client.images("a photo of <secretword>", adapter="followed", steps=3, guidance_scale=2.0),
        lambda names: names.count(GENERATE) == 2 and {"denoise", "decode", "encode"} <= set(names),
    )
    calling = one(spans, GENERATE, Span.SPAN_KIND_CLIENT)
    serving = one(spans, GENERATE, Span.SPAN_KIND_SERVER)
    assert under(one(spans, "program"))(calling)
    assert under(calling)(serving)
    told = attributes_of(serving)
    assert told["rpc.system"] == "grpc"
    assert (told["rpc.service"], told["rpc.method"], told["rpc.grpc.status_code"]) == (SERVICE, "Generate", 0)
    assert told["mooring.prompt_hash"].startswith("sha256:")
    assert told["mooring.images"] == 1
    assert serving.status.code == Status.STATUS_CODE_UNSET

    stages = [span for span in spans if under(serving)(span)]
    names = sorted(span.name for span in stages)
    assert names == ["adapter_load"] * 2 + ["decode", "denoise", "encode", "queue"] + ["text_encode"] * 2
    tiers = {attributes_of(span)["mooring.tier"] for span in stages if span.name == "adapter_load"}
    assert tiers == {"object", "device"}
    denoise = attributes_of(one(stages, "denoise"))
    assert (denoise["mooring.steps"], denoise["mooring.scheduler"]) == (3, "ddim")
    assert denoise["mooring.guidance_scale"] == 2.0
    assert denoise["mooring.mean_batch_rows"] == 2.0
    assert denoise["mooring.mean_batch_requests"] == 1.0
    for span in stages:
        assert serving.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= serving.end_time_unix_nano
    by_time = sorted((one(stages, name) for name in ("queue", "denoise", "decode", "encode")), key=began)
    assert [span.name for span in by_time] == ["queue", "denoise", "decode", "encode"]

    sent = b"".join(span.SerializeToString() for span in spans)
    for text in (b"secretword", b"a photo", b"followed"):
        assert text not in sent, "a trace tells what a tenant wrote"
    assert {"service.name": "mooring"}.items() <= next(
        resource for resource in collector.resources if resource["service.name"] != "program"
    ).items()


def began(span: Span) -> int:
    return span.start_time_unix_nano


def test_a_tick_links_to_every_request_that_it_served(client, traced, program, collector, monkeypatch):
    engine = traced.server.runtime.engine
    monkeypatch.setattr(engine.costs, "limit", lambda _shape: 16)
    held, release = threading.Event(), threading.Event()

    def hold():
        held.set()
        assert release.wait(DEADLINE)
        yield

    def both() -> None:
        holding = engine.submit(hold(), TaskClass.INTERACTIVE, "hold")
        assert held.wait(DEADLINE)
        wanted = {"prompt": PROMPT, "steps": 4, "guidance_scale": 1.0}
        batch = client.generate_batch((name, wanted) for name in ("one", "two"))
        in_span = contexts.get_current()

        def run() -> None:
            contexts.attach(in_span)
            list(batch)

        drawing = threading.Thread(target=run)
        drawing.start()
        wait_until(lambda: engine.stats().waiting[TaskClass.BATCH] == 2)
        release.set()
        holding.result(DEADLINE)
        drawing.join(DEADLINE)

    spans = of_trace(program, collector, both, lambda names: names.count("batch request") == 2)
    requests = {span.span_id for span in spans if span.name == "batch request"}

    def shared(every: list[Span]) -> list[Span]:
        ticks = [span for span in every if span.name == "tick"]
        found = [span for span in ticks if {link.span_id for link in span.links} == requests]
        return found if len(found) == 4 else []

    for tick in collector.wait_for(shared):
        assert not tick.parent_span_id
        assert tick.trace_id not in {span.trace_id for span in spans}
        assert {link.trace_id for link in tick.links} == {spans[0].trace_id}
        told = attributes_of(tick)
        assert (told["mooring.requests"], told["mooring.rows"], told["mooring.class"]) == (2, 2, "batch")
    shares = [attributes_of(span)["mooring.mean_batch_requests"] for span in spans if span.name == "denoise"]
    assert shares == [2.0, 2.0]


def test_a_refused_call_tells_its_reason(client, program, collector):
    def refused() -> None:
        with pytest.raises(mooring.errors.NotFoundError):
            client.get_adapter("nobody")

    name = "mooring.v1.AdapterService/GetAdapter"
    spans = of_trace(program, collector, refused, lambda names: names.count(name) == 2)
    calling = one(spans, name, Span.SPAN_KIND_CLIENT)
    assert calling.status.code == Status.STATUS_CODE_ERROR
    assert attributes_of(calling)["error.type"] == "NOT_FOUND"
    serving = one(spans, name, Span.SPAN_KIND_SERVER)
    told = attributes_of(serving)
    assert told["mooring.reason"] == "ADAPTER_NOT_FOUND"
    assert told["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]
    assert serving.status.code == Status.STATUS_CODE_UNSET, "the caller's mistake is no error of the server"


def test_what_the_server_cannot_do_is_an_error_of_the_server(traced, collector):
    trace_id = "4" * 32
    gate = traced.server._gate
    gate.ready = False
    try:
        channel = grpc.insecure_channel(traced.target, options=[("grpc.enable_retries", 0)])
        call = channel.unary_unary(f"/{SERVICE}/GetServerInfo")
        with pytest.raises(grpc.RpcError):
            call(b"", metadata=[("traceparent", f"00-{trace_id}-{'2' * 16}-01")], timeout=DEADLINE)
    finally:
        gate.ready = True
    (serving,) = collector.wait_for(lambda spans: [one for one in spans if one.trace_id.hex() == trace_id])
    assert serving.parent_span_id.hex() == "2" * 16
    assert (serving.status.code, serving.status.message) == (Status.STATUS_CODE_ERROR, "DRAINING")
    assert attributes_of(serving)["error.type"] == "UNAVAILABLE"


def test_a_cancelled_call_ends_its_spans_once(client, program, collector):
    def cancelled() -> None:
        events = client.generate(PROMPT, steps=150, count=16)
        next(event for event in events if isinstance(event, mooring.types.Progress))
        events.close()

    spans = of_trace(
        program,
        collector,
        cancelled,
        lambda names: names.count(GENERATE) == 2 and "denoise" in names,
    )
    for kind in (Span.SPAN_KIND_CLIENT, Span.SPAN_KIND_SERVER):
        told = attributes_of(one(spans, GENERATE, kind))
        assert told["rpc.grpc.status_code"] == grpc.StatusCode.CANCELLED.value[0]
    assert 1 <= attributes_of(one(spans, "denoise"))["mooring.steps"] < 150


def test_a_job_links_to_its_call_and_shows_its_phases(client, program, collector):
    made: list[str] = []

    def train() -> None:
        client.create_subject("rex", class_noun="dog", rights="owned", photos=[("0.png", png(0))])
        job = client.train(
            "rex", steps=4, rank=2, batch_size=1, checkpoint_every=2, preview_every=0, learn_embedding=False
        )
        made.append(job.name.rpartition("/")[2])

    name = f"{SERVICE}/Train"
    spans = of_trace(program, collector, train, lambda names: names.count(name) == 2)
    call = one(spans, name, Span.SPAN_KIND_SERVER)

    def of_job(every: list[Span]) -> list[Span]:
        jobs = [span for span in every if attributes_of(span).get("mooring.job.id") == made[0]]
        return [span for span in every if jobs and span.trace_id == jobs[0].trace_id]

    spans = collector.wait_for(of_job)
    job = one(spans, "job train", Span.SPAN_KIND_CONSUMER)
    assert job.trace_id != call.trace_id, "it may run days after the call"
    assert [(link.trace_id, link.span_id) for link in job.links] == [(call.trace_id, call.span_id)]
    told = attributes_of(job)
    assert (told["mooring.job.attempt"], told["mooring.job.outcome"]) == (1, "SUCCEEDED")
    phases = sorted(filter(under(job), spans), key=began)
    names = [span.name for span in phases]
    assert names == ["caching", "probe", "training", "measuring", "publishing"]
    for before, after in pairwise(phases):
        assert before.end_time_unix_nano <= after.start_time_unix_nano


def test_every_attempt_links_to_the_call_and_a_failed_one_tells_why(traced, collector):
    store = traced.server.runtime.store
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    spec = {"subject": "nobody", "adapter_id": "x", "config": {"method": "none"}}
    job = store.create_job("local", "train", spec, traceparent=f"00-{trace_id}-{span_id}-01")
    unsampled = store.create_job("local", "train", spec, traceparent=f"00-{trace_id}-{span_id}-00")

    def failed(every: list[Span]) -> list[Span]:
        return [span for span in every if attributes_of(span).get("mooring.job.id") == job.job_id]

    (span,) = collector.wait_for(failed)
    assert [(link.trace_id.hex(), link.span_id.hex()) for link in span.links] == [(trace_id, span_id)]
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert attributes_of(span)["mooring.reason"] == "SUBJECT_NOT_FOUND"
    wait_until(lambda: store.get_job("local", unsampled.job_id).state.final)
    assert not [s for s in collector.spans if attributes_of(s).get("mooring.job.id") == unsampled.job_id]


def test_each_row_of_a_batch_job_is_a_trace_that_links_to_the_job(client, traced, collector):
    runtime = traced.server.runtime
    gone = PinnedAdapter("nobody", 1, "sha256:" + "0" * 64, 1.0)
    rows = [
        PinnedRow(number, "", PROMPT, "", (gone,) if number == 2 else (), 3, 1.0, 32, 32, number, "ddim")
        for number in (1, 2, 3)
    ]
    spec = {
        "base_digest": runtime.base.digest,
        "rows": len(rows),
        "sha256": "",
        "filename": "rows.jsonl",
        "size_bytes": 0,
        "adapters": 0,
    }
    queued = {
        flag: queue_batch(
            runtime.store,
            runtime.objects,
            "local",
            rows,
            spec,
            traceparent=f"00-{'5' * 32}-{'6' * 16}-{flag}",
        )
        for flag in ("00", "01")
    }
    for made in queued.values():
        wait_until(lambda job=made: runtime.store.get_job("local", job.job_id).state.final)
    unrecorded, recorded = queued["00"].job_id, queued["01"].job_id

    def ended(every: list[Span]) -> list[Span]:
        return every if any(span.name == "job batch" for span in of_job(every, recorded)) else []

    def of_job(every: list[Span], job_id: str) -> list[Span]:
        return [span for span in every if attributes_of(span).get("mooring.job.id") == job_id]

    every = collector.wait_for(ended)
    assert of_job(every, unrecorded) == []
    job = one(of_job(every, recorded), "job batch", Span.SPAN_KIND_CONSUMER)
    drawn = {
        attributes_of(span)["mooring.row"]: span
        for span in of_job(every, recorded)
        if span.name == "batch row"
    }
    assert sorted(drawn) == [1, 2, 3]
    assert len({span.trace_id for span in (job, *drawn.values())}) == 4
    for span in drawn.values():
        assert not span.parent_span_id
        assert [(link.trace_id, link.span_id) for link in span.links] == [(job.trace_id, job.span_id)]
        assert job.start_time_unix_nano <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= job.end_time_unix_nano
    for number in (1, 3):
        assert attributes_of(drawn[number])["mooring.row.outcome"] == "drawn"
        stages = {span.name for span in every if under(drawn[number])(span)}
        assert {"queue", "denoise", "decode", "encode", "store"} <= stages
        ticks = [
            span
            for span in every
            if span.name == "tick" and drawn[number].span_id in {link.span_id for link in span.links}
        ]
        assert len(ticks) == 3
    told = attributes_of(drawn[2])
    assert (told["mooring.row.outcome"], told["mooring.reason"]) == ("failed", "ADAPTER_NOT_FOUND")
    assert drawn[2].status.code == Status.STATUS_CODE_ERROR


async def test_the_asyncio_client_is_in_the_trace_too(traced, use, program, collector):
    async with mooring.aio.Client(traced.target) as client:
        with program.get_tracer("test").start_as_current_span("program") as span:
            await client.server_info()
            events = [event async for event in client.generate(PROMPT, steps=2)]
            with pytest.raises(mooring.errors.NotFoundError):
                await client.get_job("nobody")
    assert events
    wanted = span.get_span_context().trace_id.to_bytes(16, "big")

    def found(spans: list[Span]) -> list[Span]:
        mine = [one for one in spans if one.trace_id == wanted and one.kind != Span.SPAN_KIND_INTERNAL]
        return mine if len(mine) == 6 else []

    codes: dict[str, list[int]] = {}
    for made in collector.wait_for(found):
        codes.setdefault(made.name, []).append(attributes_of(made)["rpc.grpc.status_code"])
    not_found = grpc.StatusCode.NOT_FOUND.value[0]
    assert codes == {
        f"{SERVICE}/GetServerInfo": [0, 0],
        GENERATE: [0, 0],
        "mooring.v1.JobService/GetJob": [not_found, not_found],
    }


def test_what_a_caller_does_not_record_is_not_recorded_here(traced, client, collector):
    trace_id = "1" * 32
    channel = grpc.insecure_channel(traced.target)
    call = channel.unary_unary(f"/{SERVICE}/GetServerInfo")
    call(b"", metadata=[("traceparent", f"00-{trace_id}-{'2' * 16}-00")], timeout=DEADLINE)
    call(b"", metadata=[("traceparent", f"00-{'3' * 32}-{'2' * 16}-01")], timeout=DEADLINE)
    collector.wait_for(lambda spans: [span for span in spans if span.trace_id.hex() == "3" * 32])
    assert not [span for span in collector.spans if span.trace_id.hex() == trace_id]


@pytest.mark.parametrize("collector_is", ["hanging", "away"])
def test_a_dead_collector_costs_neither_a_call_nor_the_shutdown(
    worded_base, tmp_path, monkeypatch, collector_is
):
    with ExitStack() as stack:
        if collector_is == "hanging":
            collector = stack.enter_context(Collector())
            collector.hang()
            endpoint = collector.endpoint
        else:
            endpoint = "http://127.0.0.1:9"  # discard: nobody listens
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        settings = settings_for(worded_base, tmp_path, drain_seconds=1.0)
        with EmbeddedServer(settings) as server, mooring.Client(server.target) as client:
            for _ in range(3):
                assert client.images(PROMPT, steps=1)
            if collector_is == "hanging":
                assert collector.asked.wait(DEADLINE)
            assert client.images(PROMPT, steps=1), "while the collector keeps the sender waiting"
            closing: list[float] = []
            close = server.server._tracing.close
            server.server._tracing.close = lambda seconds: closing.append(seconds) or close(seconds)
            ending = time.monotonic()
        assert closing == [pytest.approx(1.0, abs=0.5)]
        assert time.monotonic() - ending < 30, "an export may take OTEL_EXPORTER_OTLP_TIMEOUT, 10 s, each"


def test_what_was_recorded_is_sent_before_the_server_is_gone(worded_base, tmp_path, monkeypatch):
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", collector.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "anchorage")
        with EmbeddedServer(settings_for(worded_base, tmp_path)) as server:
            with mooring.Client(server.target) as client:
                client.server_info()
            assert not collector.spans
        assert [span.name for span in collector.spans] == [f"{SERVICE}/GetServerInfo"]
        assert collector.resources[0]["service.name"] == "anchorage"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_off_means_no_span_and_no_sdk(variables):
    code = (
        "import sys\n"
        "from mooring_server.telemetry import traces\n"
        "tracing = traces.from_environment('0')\n"
        "assert not tracing.on\n"
        "assert tracing.call('s', 'm', 'r', [('traceparent', 'x')]) is traces.UNTRACED\n"
        "assert tracing.current() is None and tracing.traceparent() is None\n"
        "tracing.job('train', 'j', 1, None).phase('training')\n"
        "heavy = ('opentelemetry.sdk', 'opentelemetry.exporter')\n"
        "print([name for name in sys.modules if name.startswith(heavy)])\n"
    )
    environment = {"PATH": "", **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_another_protocol_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with pytest.raises(MooringError, match=r"OTEL_EXPORTER_OTLP_PROTOCOL is 'http/protobuf'.*4317"):
        traces.from_environment("0")


def test_children_follow_their_parent_and_roots_with_links_what_they_link_to():
    def context(*, sampled: bool, remote: bool = False) -> SpanContext:
        return SpanContext(1, 2, is_remote=remote, trace_flags=TraceFlags(int(sampled)))

    def sampled(inner, parent: SpanContext | None = None, *links: SpanContext) -> bool:
        provider = TracerProvider(sampler=trace_export.FollowingSampler(inner), shutdown_on_exit=False)
        around = Context()
        if parent is not None:
            around = set_span_in_context(NonRecordingSpan(parent), around)
        made = [Link(link) for link in links]
        return provider.get_tracer("t").start_span("s", around, links=made).is_recording()

    yes, no = context(sampled=True), context(sampled=False)
    assert sampled(ALWAYS_OFF, yes)
    assert not sampled(ALWAYS_ON, no)
    assert sampled(ALWAYS_OFF, None, no, yes)
    assert not sampled(ALWAYS_ON, None, no, no)
    assert sampled(ALWAYS_ON, context(sampled=False, remote=True)), "the operator decides on callers"
    assert not sampled(ALWAYS_OFF)


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
