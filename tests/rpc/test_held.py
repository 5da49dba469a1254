"""What the files of calls take: of memory, and of the threads that everybody needs."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from contextvars import ContextVar

import pytest
from mooring.v1 import adapter_pb2, personalization_pb2, subject_pb2
from mooring_server.errors import MooringError, Reason
from mooring_server.rpc import batches
from mooring_server.rpc.held import HeldFiles
from mooring_server.rpc.threads import CALL_THREADS, LongWork
from rpc_calls import DEADLINE, Failure, failure_of, file_messages, make_subject, png, publish, upload

WORD: ContextVar[str] = ContextVar("word", default="")


# ------------------------------------------------------------------------------------------------ threads


async def test_long_work_of_one_tenant_leaves_half_of_the_threads_and_knows_its_call() -> None:
    work, go_on = LongWork(4), threading.Event()
    begun: list[str] = []

    def slow(name: str) -> str:
        begun.append(name)
        assert go_on.wait(DEADLINE)
        return WORD.get()

    WORD.set("said by the call")
    mine = [asyncio.create_task(work.run("acme", slow, f"acme {number}")) for number in range(6)]
    others = [asyncio.create_task(work.run("other", slow, "other")) for _ in range(2)]
    async with asyncio.timeout(DEADLINE):
        while len(begun) < 4:  # noqa: ASYNC110 - threads do it
            await asyncio.sleep(0.01)
    assert sorted(begun) == ["acme 0", "acme 1", "other", "other"]
    go_on.set()
    async with asyncio.timeout(DEADLINE):
        assert set(await asyncio.gather(*mine, *others)) == {"said by the call"}
    work.close()


async def test_a_turn_is_given_back_by_work_that_fails_or_is_not_waited_for() -> None:
    work = LongWork(2)

    def fail() -> None:
        raise KeyError("here")

    for _ in range(3):
        with pytest.raises(KeyError):
            await work.run("acme", fail)
    go_on = threading.Event()
    waiting = asyncio.create_task(work.run("acme", go_on.wait, DEADLINE))
    await asyncio.sleep(0)
    waiting.cancel()
    async with asyncio.timeout(DEADLINE):
        assert await work.run("acme", lambda: "next") == "next"
    go_on.set()
    work.close()


def test_pictures_that_are_slow_to_decode_hold_up_no_other_call(stubs, runtime, monkeypatch) -> None:
    name = make_subject(stubs, "slow", photos=1)
    go_on, decode = threading.Event(), runtime.decoders.decode

    def slow(data, filename):
        assert go_on.wait(DEADLINE)
        return decode(data, filename)

    monkeypatch.setattr(runtime.decoders, "decode", slow)

    def messages(number: int):
        yield subject_pb2.UploadPhotosRequest(subject=name)
        yield from file_messages("x.png", png(number))

    try:
        uploads = [
            stubs.subjects.UploadPhotos.future(messages(number), timeout=2 * DEADLINE)
            for number in range(CALL_THREADS + 8)
        ]
        for _ in range(3):
            assert stubs.subjects.ListSubjects(
                subject_pb2.ListSubjectsRequest(), timeout=DEADLINE / 2
            ).subjects
        assert not any(call.done() for call in uploads)
    finally:
        go_on.set()
    assert all(call.result().added_count <= 1 for call in uploads)


# ------------------------------------------------------------------------------------------------- memory


def test_one_tenant_may_hold_half_of_the_memory_and_gives_it_back() -> None:
    held = HeldFiles(100)
    with held.call("acme") as one, held.call("acme") as two, held.call("other") as three:
        one(60)
        one(40)
        two(60)
        with pytest.raises(MooringError) as caught:
            one(41)
        assert caught.value.reason is Reason.QUEUE_FULL
        assert caught.value.metadata["scope"] == "tenant"
        three(100)
        with held.call("third") as four, pytest.raises(MooringError) as caught:
            four(1)
        assert caught.value.metadata["scope"] == "server"
        assert caught.value.retry_after
    with held.call("third") as four:
        four(100)


def parts(filename: str, data: bytes):
    """A file in the fields of another stream's messages."""
    for message in file_messages(filename, data):
        kind = message.WhichOneof("content")
        yield {kind: getattr(message, kind)}


def test_files_that_would_take_too_much_memory_are_refused_with_a_pause(stubs, runtime, monkeypatch) -> None:
    name = make_subject(stubs, "held", photos=1)
    adapter = publish(runtime, "held")
    monkeypatch.setattr(runtime.held, "_share", 500)
    rows = b'{"prompt": "a dog", "steps": 1}\n' * 40

    def import_():
        rights = subject_pb2.RightsDeclaration(basis=subject_pb2.RightsDeclaration.BASIS_OWNED)
        yield adapter_pb2.ImportAdapterRequest(
            adapter=adapter_pb2.AdapterImport(adapter_id="held-import", rights=rights)
        )
        yield from (adapter_pb2.ImportAdapterRequest(**part) for part in parts("x.safetensors", rows))

    def batch():
        yield personalization_pb2.RunBatchRequest(settings=personalization_pb2.BatchSettings())
        yield from (personalization_pb2.RunBatchRequest(**part) for part in parts("x.jsonl", rows))

    def export():
        request = adapter_pb2.ExportAdapterRequest(
            name=f"tenants/-/adapters/{adapter.name}", format=adapter_pb2.ADAPTER_FORMAT_NATIVE
        )
        return stubs.adapters.ExportAdapter(request, timeout=DEADLINE)

    def refused() -> list[Failure]:
        return [
            failure_of(lambda: upload(stubs, name, {"x.png": png(7)})),
            failure_of(lambda: stubs.adapters.ImportAdapter(import_(), timeout=DEADLINE)),
            failure_of(lambda: stubs.personalization.RunBatch(batch(), timeout=DEADLINE)),
            failure_of(export),
        ]

    for failure in refused():
        assert (failure.reason, failure.metadata["cause"]) == ("QUEUE_FULL", "file_bytes"), failure
        assert failure.retry
    assert not runtime.held._held
    monkeypatch.undo()
    assert upload(stubs, name, {"x.png": png(7)}).added_count == 1


def test_a_file_of_short_lines_takes_little_more_than_its_size(runtime) -> None:
    data = b"{}\n" * 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(MooringError) as caught:
            batches._Checker(runtime, "local").check(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.reason is Reason.BATCH_TOO_LARGE
    assert peak < 30_000_000  # cut at once, its lines alone would take 60 MB
