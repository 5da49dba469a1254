"""Watching health as strangers may: many at a time, and without reading what they are told."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mooring_server.rpc import health
from mooring_server.rpc.health import HealthServicer

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
DEADLINE = 30.0


class Deaf:
    """The context of a caller who never reads: nothing that is written to it is ever gone."""

    def __init__(self) -> None:
        self.written = asyncio.Event()

    async def write(self, message: health_pb2.HealthCheckResponse) -> None:
        self.written.set()
        await asyncio.Event().wait()


async def test_a_watcher_who_does_not_read_holds_up_neither_the_start_nor_the_drain() -> None:
    servicer, deaf = HealthServicer(), Deaf()
    watching = asyncio.create_task(servicer.Watch(health_pb2.HealthCheckRequest(), deaf))
    await asyncio.wait_for(deaf.written.wait(), DEADLINE)
    await asyncio.wait_for(servicer.set("", NOT_SERVING), DEADLINE)
    await asyncio.wait_for(servicer.set("", SERVING), DEADLINE)
    await asyncio.wait_for(servicer.enter_graceful_shutdown(), DEADLINE)
    answer = await servicer.Check(health_pb2.HealthCheckRequest(), None)
    assert answer.status == NOT_SERVING
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


@pytest.fixture
async def served():
    """A health service, and a stub of it."""
    servicer, server = HealthServicer(), grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield servicer, health_pb2_grpc.HealthStub(channel)
    await server.stop(None)


async def test_every_change_is_told_and_an_unknown_service_is_watched_until_it_is_there(served) -> None:
    servicer, stub = served
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="later"), timeout=DEADLINE)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    for status in (NOT_SERVING, SERVING):
        await servicer.set("later", status)
        assert (await watch.read()).status == status
    await servicer.set("another", NOT_SERVING)  # tells this watcher nothing
    await servicer.enter_graceful_shutdown()
    assert (await watch.read()).status == NOT_SERVING
    watch.cancel()


async def test_watchers_are_bounded_and_one_that_leaves_makes_room(served, monkeypatch) -> None:
    monkeypatch.setattr(health, "MAX_WATCHERS", 2)
    _, stub = served
    watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE) for _ in range(2)]
    assert [(await watch.read()).status for watch in watches] == [SERVING, SERVING]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE).read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    watches.pop().cancel()
    while True:  # the server learns of it a moment later
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE)
        with contextlib.suppress(grpc.aio.AioRpcError):
            assert (await watch.read()).status == SERVING
            break
