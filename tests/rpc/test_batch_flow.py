"""GenerateBatch with thousands of requests holds the memory of those in flight.

Memory is the peak of a server process of its own (`VmHWM`, which Linux lets us set back), so that the bound
can be tight: what 2,500 more requests may add is what `max_batch_in_flight` of them hold, and that is less
than a tenth of what their answers would take if they were kept.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos.processes import Replica
from mooring.v1 import personalization_pb2 as pb
from rpc_calls import Stubs, read_status

FEW, MANY = 500, 3000
EVERY_BAD = 100
IN_FLIGHT = 4
SIDE = 64
ONE = 2**19
"""Bytes that one unfinished request may hold at most: latents, decoded image, PNG, messages. Its answer is a
PNG of noise, more than 8 KiB."""


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
