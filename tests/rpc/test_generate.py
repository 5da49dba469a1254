"""Generate and GenerateBatch on a real server."""

from __future__ import annotations

import hashlib
import io
import threading
import time

import grpc
import numpy as np
import pytest
from mooring.v1 import media_pb2
from mooring.v1 import personalization_pb2 as pb
from mooring_server.engine.policy import TaskClass
from mooring_server.errors import MooringError, Reason
from mooring_server.provenance.marks import Marker, Origin
from mooring_server.rpc import personalization
from mooring_server.rpc.images import CHUNK_BYTES, image_chunks
from PIL import Image
from rpc_calls import DEADLINE, failure_of, publish, read_status

PROMPT = "a photo of a dog"


def generate(stubs, **values) -> list[pb.GenerateResponse]:
    request = pb.GenerateRequest(**{"prompt": PROMPT, "steps": 3, **values})
    return list(stubs.personalization.Generate(request, timeout=DEADLINE))


def pictures(chunks: list[media_pb2.ImageChunk]) -> dict[int, np.ndarray]:
    """Images by index, put together and checked against what their chunks say."""
    data: dict[int, bytearray] = {}
    found = {}
    for chunk in chunks:
        buffer = data.setdefault(chunk.index, bytearray())
        assert chunk.offset == len(buffer)
        buffer += chunk.data
        if chunk.last:
            assert len(buffer) == chunk.size_bytes
            assert hashlib.sha256(buffer).hexdigest() == chunk.sha256
            image = Image.open(io.BytesIO(bytes(buffer)))
            assert image.format == "PNG"
            assert image.size == (chunk.width, chunk.height)
            found[chunk.index] = np.asarray(image)
    assert found.keys() == data.keys()
    return found


def drawn(responses) -> dict[int, np.ndarray]:
    return pictures([response.image for response in responses if response.HasField("image")])


def test_events_come_in_order_and_tell_what_was_done(stubs, runtime):
    responses = generate(stubs, count=2, seed=7, preview_interval=1)
    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds == sorted(kinds, key=["queued", "progress", "image", "done"].index)
    assert {"queued", "progress", "image", "done"} == set(kinds)
    steps = [response.progress.step for response in responses if response.HasField("progress")]
    assert steps == sorted(steps)
    assert steps[-1] == 3
    previews = [preview for r in responses if r.HasField("progress") for preview in r.progress.previews]
    assert previews
    assert Image.open(io.BytesIO(previews[0].data)).size == (32, 32)
    images = [response.image for response in responses if response.HasField("image")]
    assert [(image.index, image.seed) for image in images] == [(0, 7), (1, 8)]
    done = responses[-1].done
    assert (done.images, done.adapter, done.base_digest) == (2, "", runtime.base.digest)
    assert 0 < done.queue_time.ToTimedelta().total_seconds() <= done.total_time.ToTimedelta().total_seconds()


def test_the_same_request_gives_the_same_images_and_image_i_has_seed_plus_i(stubs):
    first, again = drawn(generate(stubs, count=2, seed=3)), drawn(generate(stubs, count=2, seed=3))
    alone = drawn(generate(stubs, seed=4))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert np.array_equal(first[1], alone[0])
    assert not np.array_equal(first[0], first[1])


def test_defaults_are_those_of_server_info(stubs):
    info = stubs.personalization.GetServerInfo(pb.GetServerInfoRequest(), timeout=DEADLINE)
    defaults = info.generation_defaults
    assert (defaults.width, defaults.steps, defaults.guidance_scale, defaults.seed) == (32, 25, 4.0, 0)
    bare = list(stubs.personalization.Generate(pb.GenerateRequest(prompt=PROMPT), timeout=DEADLINE))
    defaults.prompt = PROMPT
    explicit = list(stubs.personalization.Generate(defaults, timeout=DEADLINE))
    assert np.array_equal(drawn(bare)[0], drawn(explicit)[0])


def test_every_setting_changes_the_image(stubs):
    plain = drawn(generate(stubs))[0]
    for change in (
        {"prompt": "a red car"},
        {"negative_prompt": "a red car"},
        {"steps": 4},
        {"guidance_scale": 1.0},
        {"seed": 1},
        {"sampler": pb.SAMPLER_EULER_ANCESTRAL},
    ):
        assert not np.array_equal(plain, drawn(generate(stubs, **change))[0]), change
    assert drawn(generate(stubs, width=40, height=24))[0].shape == (24, 40, 3)


@pytest.mark.parametrize(
    ("request_", "unknown"),
    [
        ({"prompt": "a red duck on the beach"}, []),
        ({"prompt": "a Zebra on grass"}, ["zebra"]),
        ({"prompt": "a red-blue duck", "negative_prompt": "ugly snow"}, ["ugly"]),
        ({"prompt": "an odd duck", "negative_prompt": "Odd"}, ["odd"]),
    ],
)
def test_words_that_mean_nothing_to_the_base_are_named_in_the_answer(stubs, request_, unknown):
    assert list(generate(stubs, **request_)[-1].done.unknown_words) == unknown


def test_a_learned_placeholder_is_no_unknown_word(stubs, runtime):
    publish(runtime, "speaker", placeholder="<zebra>")
    done = generate(stubs, prompt="a <zebra> duck", adapter="tenants/local/adapters/speaker")[-1].done
    assert not done.unknown_words


def test_an_adapter_changes_the_image_by_its_scale_and_the_base_stays(stubs, runtime):
    publish(runtime, "painter")
    base = drawn(generate(stubs))[0]
    responses = generate(stubs, adapter="tenants/local/adapters/painter")
    adapted = drawn(responses)[0]
    assert responses[-1].done.adapter == "tenants/local/adapters/painter@1"
    assert responses[-1].done.adapter_digest.startswith("sha256:")
    assert not np.array_equal(base, adapted)
    half = drawn(generate(stubs, adapter="tenants/-/adapters/painter@1", adapter_scale=0.5))[0]
    assert not np.array_equal(half, adapted)
    assert np.array_equal(
        base, drawn(generate(stubs, adapter="tenants/-/adapters/painter", adapter_scale=0.0))[0]
    )
    assert np.array_equal(base, drawn(generate(stubs))[0])


def test_a_name_without_version_is_the_newest_version(stubs, runtime):
    publish(runtime, "sculptor", seed=1)
    publish(runtime, "sculptor", seed=2)
    newest = generate(stubs, adapter="tenants/local/adapters/sculptor")
    assert newest[-1].done.adapter == "tenants/local/adapters/sculptor@2"
    assert generate(stubs, adapter="tenants/local/adapters/sculptor@1")[-1].done.adapter.endswith("@1")


# -------------------------------------------------------------------------------------- several adapters


@pytest.fixture(scope="module")
def pair(runtime):
    """Two adapters with a placeholder each."""
    publish(runtime, "duo-rex", seed=11, placeholder="<rex>")
    publish(runtime, "duo-cup", seed=12, placeholder="<cup>")
    return "tenants/-/adapters/duo-rex", "tenants/-/adapters/duo-cup"


def test_two_adapters_act_on_one_request_each_by_its_scale(stubs, pair):
    first, second = pair
    values = {"prompt": "a <rex> dog and a <cup>", "adapter": first}

    def both(scale):
        return generate(stubs, **values, more_adapters=[pb.AdapterUse(adapter=second, scale=scale)])

    responses = both(0.7)
    done = responses[-1].done
    assert done.adapter == "tenants/local/adapters/duo-rex@1"
    assert [use.adapter for use in done.more_adapters] == ["tenants/local/adapters/duo-cup@1"]
    assert done.more_adapters[0].digest.startswith("sha256:")
    assert done.more_adapters[0].digest != done.adapter_digest
    image = drawn(responses)[0]
    assert np.array_equal(image, drawn(both(0.7))[0])
    assert not np.array_equal(image, drawn(both(1.4))[0])
    unscaled = generate(stubs, **values, more_adapters=[pb.AdapterUse(adapter=second)])
    assert np.array_equal(drawn(unscaled)[0], drawn(both(1.0))[0])
    only = {"prompt": "a dog", "seed": 4}
    alone = drawn(generate(stubs, **only, adapter=first))[0]
    silent = [pb.AdapterUse(adapter=second, scale=0.0)]
    assert np.array_equal(alone, drawn(generate(stubs, **only, adapter=first, more_adapters=silent))[0])


def test_a_batch_takes_several_adapters_too(stubs, pair):
    first, second = pair
    values = {"adapter": first, "more_adapters": [pb.AdapterUse(adapter=second)], "seed": 9}
    responses = list(batch(stubs, [item("both", **values)]))
    chunks = [response.image for response in responses if response.HasField("image")]
    assert np.array_equal(pictures(chunks)[0], drawn(generate(stubs, steps=2, **values))[0])
    assert len(responses[-1].done.more_adapters) == 1


def use(name, **scale):
    return pb.AdapterUse(adapter=name, **scale)


@pytest.mark.parametrize(
    ("change", "reason", "field", "says"),
    [
        ({"adapter": ""}, "INVALID_FIELD", "more_adapters", "for the first one"),
        ({"adapter_scale": 2.1}, "INVALID_FIELD", "adapter_scale", "0 to 2"),
        ({"second": {"scale": -0.1}}, "INVALID_FIELD", "more_adapters[0].scale", "0 to 2"),
        ({"second": {"scale": float("nan")}}, "INVALID_FIELD", "more_adapters[0].scale", "not nan"),
        ({"third": "cup"}, "BAD_RESOURCE_NAME", "more_adapters[1].adapter", ""),
        ({"third": "tenants/-/adapters/duo-cup"}, "INVALID_FIELD", "more_adapters[1].adapter", "twice"),
        ({"third": "tenants/-/adapters/duo-REX"}, "INVALID_FIELD", "more_adapters[1].adapter", "own <rex>"),
        ({"prompt": "a <max> dog"}, "UNKNOWN_PLACEHOLDER", "prompt", "it knows <cup>, <rex>"),
        ({"many": 4}, "INVALID_FIELD", "more_adapters", "up to 3"),
    ],
)
def test_what_is_wrong_with_several_adapters_is_said_at_its_field(
    stubs, runtime, pair, change, reason, field, says
):
    first, second = pair
    change = dict(change)
    if "REX" in change.get("third", ""):
        publish(runtime, "duo-other", seed=13, placeholder="<rex>")
        change["third"] = "tenants/-/adapters/duo-other"
    more = [use(second, **change.pop("second", {}))] * change.pop("many", 1)
    if third := change.pop("third", ""):
        more.append(use(third))
    failure = failure_of(lambda: generate(stubs, **{"adapter": first, "more_adapters": more, **change}))
    assert (failure.code.name, failure.reason) == ("INVALID_ARGUMENT", reason)
    assert list(failure.fields) == [field]
    assert says in failure.message


def test_more_adapters_than_the_server_has_slots_are_refused_rather_than_waited_for(stubs, runtime):
    assert runtime.bank.slots == 4
    names = []
    for index in range(4):
        made = publish(runtime, f"crowd-{index}", seed=20 + index, placeholder=f"<crowd{index}>")
        names.append(f"tenants/-/adapters/{made.adapter_id}")
    values = {"prompt": "a photo of a dog", "adapter": names[0], "steps": 1}
    assert generate(stubs, **values, more_adapters=[use(name) for name in names[1:3]])
    failure = failure_of(lambda: generate(stubs, **values, more_adapters=[use(name) for name in names[1:]]))
    assert (failure.code.name, failure.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert list(failure.fields) == ["more_adapters"]
    assert "3 slots" in failure.message


def test_another_tenants_adapter_is_absent_as_a_further_one_too(stubs, runtime, pair):
    publish(runtime, "duo-theirs", tenant="rival")
    found = []
    for name in ("tenants/rival/adapters/duo-theirs", "tenants/local/adapters/duo-theirs"):
        failure = failure_of(
            lambda name=name: generate(stubs, adapter=pair[0], more_adapters=[pb.AdapterUse(adapter=name)])
        )
        found.append((failure.code.name, failure.reason, failure.message))
    assert found[0] == found[1]
    assert found[0][:2] == ("NOT_FOUND", "ADAPTER_NOT_FOUND")


LONG = "a photo of a dog " * 5


@pytest.mark.parametrize(
    ("change", "code", "reason", "field"),
    [
        ({"prompt": ""}, "INVALID_ARGUMENT", "EMPTY_PROMPT", "prompt"),
        ({"prompt": " \n"}, "INVALID_ARGUMENT", "EMPTY_PROMPT", "prompt"),
        ({"prompt": LONG}, "INVALID_ARGUMENT", "PROMPT_TOO_LONG", "prompt"),
        ({"prompt": "dog " * 100_000}, "INVALID_ARGUMENT", "PROMPT_TOO_LONG", "prompt"),
        ({"negative_prompt": LONG}, "INVALID_ARGUMENT", "PROMPT_TOO_LONG", "negative_prompt"),
        ({"prompt": "a photo of a <max> dog"}, "INVALID_ARGUMENT", "UNKNOWN_PLACEHOLDER", "prompt"),
        ({"steps": 0}, "OUT_OF_RANGE", "STEPS_OUT_OF_RANGE", "steps"),
        ({"steps": 151}, "OUT_OF_RANGE", "STEPS_OUT_OF_RANGE", "steps"),
        ({"guidance_scale": float("nan")}, "INVALID_ARGUMENT", "INVALID_FIELD", "guidance_scale"),
        ({"adapter_scale": 2.5}, "INVALID_ARGUMENT", "INVALID_FIELD", "adapter_scale"),
        ({"width": 33}, "INVALID_ARGUMENT", "SIZE_NOT_SUPPORTED", "width"),
        ({"height": 4096}, "INVALID_ARGUMENT", "SIZE_NOT_SUPPORTED", "height"),
        ({"count": 17}, "INVALID_ARGUMENT", "INVALID_FIELD", "count"),
        ({"count": 0}, "INVALID_ARGUMENT", "INVALID_FIELD", "count"),
        ({"seed": 2**63}, "INVALID_ARGUMENT", "INVALID_FIELD", "seed"),
        ({"sampler": 99}, "INVALID_ARGUMENT", "INVALID_FIELD", "sampler"),
        ({"preview_interval": -1}, "INVALID_ARGUMENT", "INVALID_FIELD", "preview_interval"),
        ({"adapter": "painter"}, "INVALID_ARGUMENT", "BAD_RESOURCE_NAME", "adapter"),
        ({"adapter": "tenants/local/adapters/nobody"}, "NOT_FOUND", "ADAPTER_NOT_FOUND", None),
        ({"adapter": "tenants/local/adapters/nobody@3"}, "NOT_FOUND", "ADAPTER_NOT_FOUND", None),
    ],
)
def test_what_is_wrong_is_said(stubs, change, code, reason, field):
    failure = failure_of(lambda: generate(stubs, **change))
    assert (failure.code.name, failure.reason) == (code, reason)
    assert len(failure.message) < 700
    assert list(failure.fields) == ([field] if field else [])
    assert ({"minimum", "maximum"} <= set(failure.metadata)) == (reason == "STEPS_OUT_OF_RANGE")


def test_a_long_prompt_says_what_would_be_cut(stubs):
    prompt = "a photo of a dog and a cat and a car in the snow"
    failure = failure_of(lambda: generate(stubs, prompt=f"{prompt} big toy"))
    assert failure.metadata["limit"] == "14"
    assert failure.metadata["cut"]
    assert f"{prompt} big toy".endswith(failure.metadata["cut"])
    assert failure.metadata["cut"] in failure.message


def test_an_adapter_of_another_base_is_refused_with_both_digests(stubs, runtime):
    publish(runtime, "stranger", base_digest="sha256:" + "0" * 64)
    failure = failure_of(lambda: generate(stubs, adapter="tenants/local/adapters/stranger"))
    assert (failure.code.name, failure.reason) == ("FAILED_PRECONDITION", "BASE_DIGEST_MISMATCH")
    assert failure.metadata["expected"] == runtime.base.digest
    assert failure.metadata["found"] == "sha256:" + "0" * 64


def test_another_tenants_adapter_looks_exactly_like_an_absent_one(stubs, runtime):
    publish(runtime, "theirs", tenant="rival")
    answers = []
    for tenant in ("rival", "local", "void"):
        name = f"tenants/{tenant}/adapters/theirs@1"
        failure = failure_of(lambda name=name: generate(stubs, adapter=name))
        failure.metadata.pop("request_id")
        answers.append((failure.code, failure.message, failure.reason, failure.metadata, failure.fields))
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][2] == "ADAPTER_NOT_FOUND"


def test_a_large_image_is_cut_into_chunks_below_the_limit():
    noise = np.random.default_rng(0).integers(0, 255, (900, 900, 3), dtype=np.uint8)
    chunks = image_chunks(5, 9, noise, Marker(), Origin("sha256:" + "0" * 64))
    assert len(chunks) > 2
    assert all(len(chunk.data) <= CHUNK_BYTES for chunk in chunks)
    assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert np.array_equal(pictures(chunks)[5], noise)


def busy(runtime, klass=TaskClass.INTERACTIVE) -> bool:
    stats = runtime.engine.stats()
    return bool(stats.waiting[klass] + stats.running[klass])


def wait_until(condition):
    until = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.005)


def cancelled_calls(runtime) -> float:
    labels = {"grpc_service": "mooring.v1.PersonalizationService", "grpc_method": "Generate"}
    labels |= {"grpc_type": "server_stream", "grpc_code": "CANCELLED"}
    return runtime.metrics.registry.get_sample_value("grpc_server_handled_total", labels) or 0.0


def test_cancelling_the_call_stops_the_engine_at_its_next_step(stubs, runtime):
    call = stubs.personalization.Generate(
        pb.GenerateRequest(prompt=PROMPT, steps=150, count=16), timeout=DEADLINE
    )
    next(response for response in call if response.HasField("progress"))
    held, release = threading.Event(), threading.Event()

    def hold():
        held.set()
        assert release.wait(DEADLINE)
        yield

    # The engine stands still while the cancellation is on its way, which takes as long as it takes.
    holding = runtime.engine.submit(hold(), TaskClass.INTERACTIVE, "hold")
    assert held.wait(DEADLINE)
    before, ticks = cancelled_calls(runtime), runtime.engine.stats().ticks[TaskClass.INTERACTIVE]
    call.cancel()
    wait_until(lambda: cancelled_calls(runtime) == before + 1)
    release.set()
    holding.result(DEADLINE)
    wait_until(lambda: not busy(runtime))
    assert runtime.engine.stats().ticks[TaskClass.INTERACTIVE] - ticks <= 2, "the holder's own"
    assert runtime.bank._pins == [0] * len(runtime.bank._pins)


def test_a_caller_that_leaves_while_the_engine_takes_its_request_leaves_no_work_behind(
    stubs, runtime, monkeypatch
):
    entered, left, handles, plain = threading.Event(), threading.Event(), [], runtime.engine.generate

    def slow(*args, **rest):
        entered.set()
        assert left.wait(DEADLINE)
        handles.append(plain(*args, **rest))
        return handles[-1]

    monkeypatch.setattr(runtime.engine, "generate", slow)
    before = cancelled_calls(runtime)
    call = stubs.personalization.Generate(
        pb.GenerateRequest(prompt=PROMPT, steps=150, count=16), timeout=DEADLINE
    )
    assert entered.wait(DEADLINE)
    call.cancel()
    wait_until(lambda: cancelled_calls(runtime) == before + 1)
    left.set()
    wait_until(lambda: handles and handles[0].done())
    with pytest.raises(MooringError) as caught:
        handles[0].result(0)
    assert caught.value.reason is Reason.CANCELLED


def test_a_deadline_stops_the_engine_too(stubs, runtime):
    with pytest.raises(grpc.RpcError) as caught:
        list(
            stubs.personalization.Generate(
                pb.GenerateRequest(prompt=PROMPT, steps=150, count=16), timeout=0.3
            )
        )
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: not busy(runtime))


def test_a_request_that_cannot_end_in_time_is_refused_long_before(stubs, runtime):
    generate(stubs, steps=5, count=4)  # now it is known what a step of four images costs
    hopeless = pb.GenerateRequest(prompt=PROMPT, steps=150, count=16)
    failure = failure_of(lambda: list(stubs.personalization.Generate(hopeless, timeout=1.2)))
    assert (failure.code.name, failure.reason) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
    assert float(failure.metadata["needed_seconds"]) > float(failure.metadata["left_seconds"]) > 0
    assert not busy(runtime)


def test_tenant_and_deadline_reach_the_engine(stubs, runtime, monkeypatch):
    seen, plain = [], runtime.engine.generate
    monkeypatch.setattr(
        runtime.engine, "generate", lambda *args, **rest: seen.append(rest) or plain(*args, **rest)
    )
    generate(stubs, steps=1)
    list(batch(stubs, [item("a", steps=1), item("b", steps=1)]))
    single, *several = seen
    assert {rest["tenant"] for rest in seen} == {"local"}
    left = [rest["deadline"] - time.monotonic() for rest in seen]
    assert all(DEADLINE - 20 < seconds < DEADLINE + 1 for seconds in left), left  # gRPC rounds up
    assert several[0]["deadline"] == several[1]["deadline"] != single["deadline"]


# ---------------------------------------------------------------------------------------------- batch


def batch(stubs, requests):
    return stubs.personalization.GenerateBatch(iter(requests), timeout=DEADLINE)


def item(name: str, **values) -> pb.GenerateBatchRequest:
    return pb.GenerateBatchRequest(id=name, request={"prompt": PROMPT, "steps": 2, **values})


def test_a_batch_answers_every_request_under_its_id_and_failures_alone(stubs):
    requests = [item(f"r{i}", seed=i) for i in range(6)]
    requests += [item("blank", prompt=" "), item("gone", adapter="tenants/-/adapters/nobody")]
    chunks, done, errors = {}, set(), {}
    for response in batch(stubs, requests):
        match response.WhichOneof("result"):
            case "image":
                chunks.setdefault(response.id, []).append(response.image)
            case "done":
                assert response.id in chunks, "an image comes before the end of its request"
                done.add(response.id)
            case "error":
                errors[response.id] = read_status(response.error).reason
    assert done == {f"r{i}" for i in range(6)}
    assert errors == {"blank": "EMPTY_PROMPT", "gone": "ADAPTER_NOT_FOUND"}
    for i in range(6):
        assert np.array_equal(pictures(chunks[f"r{i}"])[0], drawn(generate(stubs, steps=2, seed=i))[0])


def test_quick_requests_overtake_slow_ones(stubs, runtime, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runtime.engine, "max_running", 0)  # neither begins before both are there
        call = batch(stubs, [item("slow", steps=60), item("quick", steps=1)])
        wait_until(lambda: runtime.engine.stats().waiting[TaskClass.BATCH] == 2)
    ends = [response.id for response in call if response.HasField("done")]
    assert ends == ["quick", "slow"]


def test_no_more_requests_are_read_than_are_worked_on(stubs, server, monkeypatch):
    """Flow control: what is not read stays with the transport, which slows the caller down."""
    read = []
    check = personalization._check_batch_id
    monkeypatch.setattr(personalization, "_check_batch_id", lambda *args: read.append(args) or check(*args))
    runtime, limit = server.server.runtime, server.settings.max_batch_in_flight
    with monkeypatch.context() as patch:
        patch.setattr(runtime.engine, "max_running", 0)  # nothing starts: nothing can finish
        call = batch(stubs, [item(f"r{i}", steps=1) for i in range(20)])
        wait_until(lambda: runtime.engine.stats().waiting[TaskClass.BATCH] == limit)
        time.sleep(0.3)
        assert len(read) == limit
    ends = [response.id for response in call if response.HasField("done")]
    assert sorted(ends) == sorted(f"r{i}" for i in range(20))


@pytest.mark.parametrize("bad", ["", "x" * 129, "twin"])
def test_an_id_that_cannot_be_answered_under_ends_the_call(stubs, runtime, monkeypatch, bad):
    first = "twin" if bad == "twin" else "fine"
    with monkeypatch.context() as patch:
        patch.setattr(runtime.engine, "max_running", 0)  # the first is unfinished when the second is read
        failure = failure_of(lambda: batch(stubs, [item(first), item(bad)]))
    assert (failure.code.name, failure.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert list(failure.fields) == ["id"]
    wait_until(lambda: not busy(runtime, TaskClass.BATCH))


def test_a_call_that_ends_badly_while_it_is_written_to_ends_all_the_same(stubs, monkeypatch):
    """gRPC refuses a status beside an unfinished write; the caller would wait until its deadline."""
    written = threading.Event()

    async def large(*_):
        written.set()  # more bytes than may be on their way to one who does not read
        return [media_pb2.ImageChunk(data=bytes(3 * 2**20)) for _ in range(4)]

    def requests():
        yield item("large")
        assert written.wait(DEADLINE)
        time.sleep(0.2)  # so that the write has begun; had it not, nothing would be shown
        yield item("")

    monkeypatch.setattr(personalization, "_chunks", large)
    call = stubs.personalization.GenerateBatch(requests(), timeout=DEADLINE)
    assert written.wait(DEADLINE)
    time.sleep(0.4)
    failure = failure_of(lambda: call)
    assert (failure.code.name, failure.reason, list(failure.fields)) == (
        "INVALID_ARGUMENT", "INVALID_FIELD", ["id"],
    )  # fmt: skip


def test_an_empty_batch_ends_at_once(stubs):
    assert list(batch(stubs, [])) == []


def test_a_batch_waits_while_the_queue_is_full(stubs, runtime, monkeypatch):
    monkeypatch.setattr(runtime.engine, "max_queue", 1)
    monkeypatch.setattr(runtime.engine, "max_running", 1)
    ends = {
        response.id
        for response in batch(stubs, [item(f"r{i}") for i in range(6)])
        if response.HasField("done")
    }
    assert ends == {f"r{i}" for i in range(6)}


def test_interactive_calls_are_refused_with_a_pause_when_the_queue_is_full(stubs, runtime, monkeypatch):
    monkeypatch.setattr(runtime.engine, "max_queue", 0)
    failure = failure_of(lambda: generate(stubs))
    assert (failure.code.name, failure.reason, failure.retry) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", True)
