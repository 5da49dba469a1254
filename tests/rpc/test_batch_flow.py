"""GenerateBatch under flow control: memory of what is in flight, and no work for a reader that stops.

Memory is the peak of a server process of its own (`VmHWM`, which Linux lets us set back), so that the bound
can be tight: what 2,500 more requests may add is what `max_batch_in_flight` of them hold, and that is less
than a tenth of what their answers would take if they were kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from chaos.processes import Replica
from mooring.v1 import personalization_pb2 as pb
from mooring.v1 import personalization_pb2_grpc
from mooring_server.engine.policy import TaskClass
from mooring_server.rpc import personalization
from rpc_calls import DEADLINE, Stubs, read_status

FEW, MANY = 500, 3000
EVERY_BAD = 100
IN_FLIGHT = 4
SIDE = 64
ONE = 2**19
"""Bytes that one unfinished request may hold at most: latents, decoded image, PNG, messages. Its answer is a
PNG of noise, more than 8 KiB."""


ENDLESS = 1000
WINDOW = 2**18
"""Bytes of answers that lie between the server and a reader that has stopped, at most: HTTP/2's window of a
stream, 64 KiB where the client does not let it grow, and the buffers of both transports."""


def request(number: int) -> pb.GenerateBatchRequest:
    prompt = "" if number % EVERY_BAD == 0 else "a photo of a dog"
    size = {"width": SIDE, "height": SIDE}
    wanted = pb.GenerateRequest(prompt=prompt, steps=1 + number % 2, guidance_scale=1, seed=number, **size)
    return pb.GenerateBatchRequest(id=f"r{number}", request=wanted)


def answered(stubs: Stubs, count: int) -> int:
    """Send them all as one call; every one is answered once. Bytes of the answers."""
    images, done, failed, order, size = set(), set(), {}, [], 0
    for response in stubs.personalization.GenerateBatch(map(request, range(count)), timeout=1200):
        size += response.ByteSize()
        kind = response.WhichOneof("result")
        if kind == "image":
            assert response.image.last
            images.add(response.id)
        elif kind == "done":
            assert response.id not in done
            done.add(response.id)
            order.append(int(response.id[1:]))
        else:
            failed[response.id] = read_status(response.error).reason
    bad = {f"r{number}" for number in range(0, count, EVERY_BAD)}
    assert failed == dict.fromkeys(bad, "EMPTY_PROMPT")
    assert images == done == {f"r{number}" for number in range(count)} - bad
    assert order != sorted(order)
    return size


def peak(pid: int) -> int:
    """Bytes of memory that a process has held at most since `reset_peak`."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def reset_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


@pytest.mark.slow
def test_thousands_of_requests_take_the_memory_of_those_in_flight(tiny_sd15, tmp_path):
    variables = {"MOORING_MAX_BATCH_IN_FLIGHT": str(IN_FLIGHT), "MOORING_RANK": "8", "MOORING_SLOTS": "4"}
    with Replica(tmp_path / "state", tiny_sd15, variables) as server:
        stubs = Stubs(server.target)
        answered(stubs, FEW)  # allocators and caches have what they need
        peaks = {}
        for count in (FEW, MANY):
            reset_peak(server.pid)
            size = answered(stubs, count)
            peaks[count] = peak(server.pid)
        grown, bound = peaks[MANY] - peaks[FEW], IN_FLIGHT * ONE
        assert bound < size * (MANY - FEW) / MANY / 10, "the bound would not find answers that are kept"
        assert grown <= bound, f"{grown / 2**20:.1f} MiB more for {MANY - FEW} more requests"
        assert server.stop() == 0


@pytest.fixture
def unfinished(monkeypatch) -> list[int]:
    """How many requests of the call were unfinished whenever one more was read."""
    seen: list[int] = []
    check = personalization._check_batch_id

    def counted(value: str, others: set[str]) -> None:
        seen.append(len(others) + 1)
        check(value, others)

    monkeypatch.setattr(personalization, "_check_batch_id", counted)
    return seen


@pytest.fixture
def narrow(server) -> Iterator[personalization_pb2_grpc.PersonalizationServiceStub]:
    """A client whose windows stay as small as they are at first: they are full after a few answers."""
    options = [
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 2**16),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    with grpc.insecure_channel(server.target, options) as channel:
        yield personalization_pb2_grpc.PersonalizationServiceStub(channel)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_reader_that_stops_stops_the_work_and_leaving_frees_it(narrow, runtime, server, unfinished):
    limit = server.settings.max_batch_in_flight

    def idle() -> bool:
        stats = runtime.engine.stats()
        return not (stats.waiting[TaskClass.BATCH] or stats.running[TaskClass.BATCH])

    def until_still() -> int:
        """Until nothing more is read or drawn for two seconds; how many requests were read."""
        still, before = time.monotonic(), -1
        while time.monotonic() < still + 2.0:
            if len(unfinished) != before or not idle():
                still, before = time.monotonic(), len(unfinished)
            time.sleep(0.05)
        return before

    under_way = runtime.gate.in_flight
    call = narrow.GenerateBatch(map(request, range(1, ENDLESS)), timeout=1200)
    answer = next(call).ByteSize()
    until(lambda: len(unfinished) > limit)
    read = until_still()
    # the answers that nobody reads hold the requests back
    assert limit < read <= limit + WINDOW // answer
    assert max(unfinished) == limit
    for _ in range(
        2 * read
    ):  # an image and a word that it is done: more than there can be of those read so far
        next(call)
    assert len(unfinished) > read
    assert until_still() <= 2 * read + limit + WINDOW // answer
    assert runtime.gate.in_flight == under_way + 1
    call.cancel()
    until(lambda: runtime.gate.in_flight == under_way)
    left = until_still()
    until(idle)
    assert len(unfinished) == left < ENDLESS - 1
