"""What the engine tells of a request that is traced, whatever becomes of it."""

from __future__ import annotations

import threading

import pytest
from engine_helpers import random_adapter
from mooring_server.engine.engine import Engine
from mooring_server.engine.policy import TaskClass
from mooring_server.engine.requests import AdapterUse, GenerationRequest
from mooring_server.errors import MooringError

WAIT = 240


class Recorded:
    """A trace that keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, dict]] = []
        self.times: list[tuple[int, int]] = []
        self.ticks: list[dict] = []
        self.shared: list[list[Recorded]] = []

    def stage(self, name, began, ended, attributes):
        self.stages.append((name, dict(attributes)))
        self.times.append((began, ended))

    def tick(self, others, began, ended, attributes):
        self.ticks.append(dict(attributes))
        self.shared.append(list(others))

    def names(self) -> list[str]:
        return [name for name, _ in self.stages]

    def of(self, name: str) -> list[dict]:
        return [attributes for found, attributes in self.stages if found == name]


class Broken:
    """A trace that fails whenever it is told something."""

    def stage(self, *_):
        raise ZeroDivisionError

    tick = stage


@pytest.fixture
def engine(base, make_bank):
    made = Engine(base, make_bank(base, slots=3, rank=8), threads=1)
    yield made
    made.close()
    base.on_stage = None


def request(**values) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "a duck on grass", "steps": 3, "guidance_scale": 3.0, **values})


def run(engine, trace, **values) -> None:
    engine.generate(request(**values), lambda _event: None, trace=trace).result(WAIT)


def test_the_stages_of_a_request_in_their_order(engine, base):
    trace = Recorded()
    run(engine, trace, adapters=(AdapterUse(random_adapter(base, 1)),), count=5, sampler="euler")
    assert trace.names() == [
        "adapter_load",
        "queue",
        *["text_encode"] * 2,
        "denoise",
        *["decode"] * 4,
        "denoise",
        "decode",
    ]
    assert trace.of("adapter_load") == [{"tier": "device"}]
    assert trace.of("queue") == [{"class": "interactive"}]
    for stage, rows in zip(trace.of("denoise"), (8.0, 2.0), strict=True):  # four images, then one, guided
        assert stage.pop("pass_seconds") > 0
        assert stage == {
            "class": "interactive",
            "steps": 3,
            "scheduler": "euler",
            "guidance_scale": 3.0,
            "mean_batch_rows": rows,
            "mean_batch_requests": 1.0,
        }
    assert all(began <= ended for began, ended in trace.times)
    assert len(trace.ticks) == 6
    assert trace.ticks[0] == {"class": "interactive", "rows": 8, "requests": 1, "adapters": 1}
    again = Recorded()
    run(engine, again, adapters=(AdapterUse(random_adapter(base, 1)),))
    assert again.names() == ["queue", "denoise", "decode"], "resident, and the prompt is known"


def test_a_pass_names_the_traced_requests_and_counts_the_others(engine, monkeypatch):
    monkeypatch.setattr(engine.costs, "limit", lambda _shape: 16)
    held, release = threading.Event(), threading.Event()

    def hold():
        held.set()
        assert release.wait(WAIT)
        yield

    engine.submit(hold(), TaskClass.INTERACTIVE, "hold")
    assert held.wait(WAIT)
    traces = [Recorded(), Recorded(), None]
    handles = [engine.generate(request(guidance_scale=1.0), lambda _event: None, trace=t) for t in traces]
    release.set()
    for handle in handles:
        handle.result(WAIT)
    first, second, _ = traces
    ticks = first.ticks + second.ticks
    assert {"class": "interactive", "rows": 3, "requests": 3, "adapters": 0} in ticks
    assert all(others in ([first], [second], []) for trace in (first, second) for others in trace.shared)
    assert first.of("denoise")[0]["mean_batch_requests"] > 2


def test_requests_that_are_not_batched_tell_their_own_passes(engine):
    engine._row_wise = False  # as on a GPU that keeps bits
    trace = Recorded()
    run(engine, trace)
    assert trace.names() == ["queue", "text_encode", "text_encode", "denoise", "decode"]
    assert trace.of("denoise")[0]["mean_batch_rows"] == 2.0
    assert trace.ticks == [{"rows": 2, "requests": 1}] * 3


@pytest.mark.parametrize("moment", ["waiting", "drawing"])
def test_a_cancelled_request_tells_what_it_had_begun(engine, moment):
    trace, drawing, go_on = Recorded(), threading.Event(), threading.Event()

    def on_event(event):
        if type(event).__name__ == "Progress":
            drawing.set()
            assert go_on.wait(WAIT)

    def hold():
        drawing.set()
        assert go_on.wait(WAIT)
        yield

    if moment == "waiting":
        engine.submit(hold(), TaskClass.INTERACTIVE, "hold")
        assert drawing.wait(WAIT)
    handle = engine.generate(request(), on_event, trace=trace)
    assert drawing.wait(WAIT)
    handle.cancel()
    go_on.set()
    with pytest.raises(MooringError):
        handle.result(WAIT)
    if moment == "waiting":
        assert trace.names() == ["queue"]
    else:
        assert trace.names() == ["queue", "text_encode", "text_encode", "denoise"]
        assert trace.of("denoise")[0]["steps"] == 1


def test_a_trace_that_fails_stops_nothing(engine):
    run(engine, Broken())
    run(engine, None)
