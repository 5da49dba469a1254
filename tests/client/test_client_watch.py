"""Watching a job: typed progress, resuming by sequence over disconnects and restarts, failed jobs."""

from __future__ import annotations

import threading
import time
from typing import Any

import grpc
import mooring
import pytest
from mooring import errors
from mooring.v1 import job_pb2
from scripted_server import ScriptedServer, abort_with

JOB = "tenants/local/jobs/1"


def progress(sequence: int, **figures: float) -> job_pb2.WatchJobResponse:
    message = job_pb2.WatchJobResponse(sequence=sequence)
    message.progress.phase = "training"
    message.progress.step = sequence
    message.progress.steps = 10
    for name, value in figures.items():
        setattr(message.progress.training, name, value)
    return message


def ended(sequence: int, state: int = job_pb2.JOB_STATE_SUCCEEDED) -> job_pb2.WatchJobResponse:
    return job_pb2.WatchJobResponse(
        sequence=sequence, job=job_pb2.Job(name=JOB, state=state, adapter="rex@1")
    )


def test_progress_is_typed_and_absent_figures_are_none(server: ScriptedServer) -> None:
    def answer(_: Any, __: Any) -> Any:
        first = progress(1, loss=0.5)
        first.progress.time_left.FromSeconds(90)
        yield first
        yield progress(2, loss=0.0, drift=0.04, drift_budget=0.05, strength=0.3, sigma_max=1.5)
        yield ended(2)

    server.answers["WatchJob"] = answer
    with mooring.Client(server.target) as client:
        events = list(client.watch("1"))
    assert (events[0].loss, events[0].drift, events[0].seconds_left) == (0.5, None, 90.0)
    assert (events[1].loss, events[1].drift, events[1].strength) == (0.0, 0.04, 0.3)
    assert events[1].seconds_left is None
    assert [event.terminal for event in events] == [False, False, True]


def broken_watch(server: ScriptedServer) -> list[int]:
    """Answers that break after every second event; returns the list of resume points as they come."""
    resumed: list[int] = []

    def answer(request: job_pb2.WatchJobRequest, context: Any) -> Any:
        resumed.append(request.after_sequence)
        for sequence in range(request.after_sequence + 1, 7):
            yield progress(sequence)
            if sequence % 2 == 0 and sequence < 6:
                abort_with(context, grpc.StatusCode.UNAVAILABLE, "Gone.", reason="DRAINING")
        yield ended(6)

    server.answers["WatchJob"] = answer
    return resumed


def test_watch_resumes_without_gap_or_repeat(server: ScriptedServer) -> None:
    resumed = broken_watch(server)
    with mooring.Client(server.target) as client:
        events = list(client.watch("1"))
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5, 6, 6]
    assert resumed == [0, 2, 4]


async def test_asyncio_watch_resumes_without_gap_or_repeat(server: ScriptedServer) -> None:
    resumed = broken_watch(server)
    async with mooring.aio.Client(server.target) as client:
        events = [event async for event in client.watch("1")]
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5, 6, 6]
    assert resumed == [0, 2, 4]


def test_watch_outlives_a_restart_of_the_server(server: ScriptedServer) -> None:
    started = threading.Event()

    def before(_: Any, context: Any) -> Any:
        yield progress(1)
        started.set()
        while context.is_active():
            time.sleep(0.01)

    def after(request: job_pb2.WatchJobRequest, _: Any) -> Any:
        assert request.after_sequence == 1
        yield progress(2)
        yield ended(2)

    server.answers["WatchJob"] = before

    def restart() -> None:
        assert started.wait(240)
        server.stop()
        time.sleep(0.5)
        server.answers["WatchJob"] = after
        server.start()

    thread = threading.Thread(target=restart)
    thread.start()
    with mooring.Client(server.target) as client:
        events = list(client.watch("1", patience=240))
    thread.join()
    assert [event.sequence for event in events] == [1, 2, 2]


def test_watch_of_a_server_that_never_was_fails_soon() -> None:
    start = time.monotonic()
    with mooring.Client("127.0.0.1:1") as client, pytest.raises(errors.UnavailableError):
        list(client.watch("1"))
    assert time.monotonic() - start < 120, "patience is for servers that were there"


def test_watch_gives_up_after_its_patience(server: ScriptedServer) -> None:
    def answer(request: job_pb2.WatchJobRequest, context: Any) -> Any:
        if request.after_sequence == 0:
            yield progress(1)
        abort_with(context, grpc.StatusCode.UNAVAILABLE, "Gone.", reason="DRAINING")

    server.answers["WatchJob"] = answer
    with mooring.Client(server.target) as client, pytest.raises(errors.UnavailableError):
        list(client.watch("1", patience=1.0))


def test_a_stream_that_ends_before_its_job_is_resumed(server: ScriptedServer) -> None:
    parts = {0: [progress(1)], 1: [progress(2), ended(2)]}
    server.answers["WatchJob"] = lambda request, _: iter(parts[request.after_sequence])
    with mooring.Client(server.target) as client:
        assert [event.sequence for event in client.watch("1")] == [1, 2, 2]


def test_a_watch_to_the_end_is_not_cancelled(server: ScriptedServer) -> None:
    outcomes: list[bool] = []

    def answer(_: Any, context: Any) -> Any:
        yield ended(1)
        time.sleep(0.2)  # a client that hangs up after the last event does so now
        outcomes.append(context.is_active())

    server.answers["WatchJob"] = answer
    with mooring.Client(server.target) as client:
        list(client.watch("1"))
        client.wait("1")
    assert outcomes == [True, True]


def test_other_errors_are_not_resumed(server: ScriptedServer) -> None:
    def answer(_: Any, context: Any) -> Any:
        yield progress(1)
        abort_with(context, grpc.StatusCode.INTERNAL, "Broken.", reason="INTERNAL")

    server.answers["WatchJob"] = answer
    with mooring.Client(server.target) as client, pytest.raises(errors.InternalError):
        list(client.watch("1"))
    assert server.calls["WatchJob"] == 1


def test_leaving_the_iterator_cancels_the_call(server: ScriptedServer) -> None:
    gone = threading.Event()

    def answer(_: Any, context: Any) -> Any:
        context.add_callback(gone.set)
        sequence = 0
        while context.is_active():
            sequence += 1
            yield progress(sequence)
            time.sleep(0.01)

    server.answers["WatchJob"] = answer
    with mooring.Client(server.target) as client:
        watch = client.watch("1")
        assert next(watch).sequence == 1
        watch.close()
        assert gone.wait(240)


def test_wait_returns_the_succeeded_job_and_raises_for_a_failed_one(server: ScriptedServer) -> None:
    def failed(_: Any, __: Any) -> Any:
        message = ended(1, job_pb2.JOB_STATE_FAILED)
        message.job.error.code = grpc.StatusCode.FAILED_PRECONDITION.value[0]
        message.job.error.message = "The loss became NaN."
        yield message

    def cancelled(_: Any, __: Any) -> Any:
        yield ended(1, job_pb2.JOB_STATE_CANCELLED)

    heard: list[mooring.JobEvent] = []
    with mooring.Client(server.target) as client:
        server.answers["WatchJob"] = lambda _, __: iter([progress(1), ended(1)])
        assert client.wait("1", on_event=heard.append).adapter == "rex@1"
        assert len(heard) == 2
        server.answers["WatchJob"] = failed
        with pytest.raises(errors.JobFailedError, match="NaN") as caught:
            client.wait("1")
        assert caught.value.job == JOB
        server.answers["WatchJob"] = cancelled
        with pytest.raises(errors.JobFailedError, match="cancelled"):
            client.wait("1")
