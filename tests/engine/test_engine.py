"""The engine thread: order, cancellation, failures, limits, drain and what watchers are told."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from engine_helpers import drain, random_adapter
from mooring_server.engine.bank import AdapterBank
from mooring_server.engine.base import load_base
from mooring_server.engine.engine import Engine
from mooring_server.engine.policy import TaskClass
from mooring_server.engine.requests import AdapterUse, GenerationRequest, ImageReady, Progress, Queued
from mooring_server.engine.sampling import SampleRow, sample
from mooring_server.errors import Code, MooringError, Reason

WAIT = 240
REQUEST = {"prompt": "a duck on grass", "steps": 3, "guidance_scale": 3.0}


class Numbers:
    """An observer that remembers."""

    def __init__(self):
        self.ticks, self.stages, self.batches, self.queues = [], [], [], []
        self.tenants, self.lookups = [], []

    def tick(self, klass, seconds):
        self.ticks.append(klass)

    def stage(self, name, seconds):
        self.stages.append(name)

    def batch(self, size, adapters):
        self.batches.append((size, adapters))

    def queue(self, klass, waiting, running):
        self.queues.append((klass, waiting, running))

    def used(self, klass, tenant, seconds):
        self.tenants.append((klass, tenant))

    def prompts(self, queries, hits, kept):
        self.lookups.append((queries, hits))


@pytest.fixture
def start(base, make_bank):
    engines = []

    def make(**options):
        bank = options.pop("bank", None) or make_bank(base, slots=3, rank=8)
        engines.append(Engine(base, bank, threads=1, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
    base.on_stage = None


@pytest.fixture
def gate():
    """A task that holds the engine until it is told to go on."""

    class Gate:
        def __init__(self):
            self.reached, self.opened = threading.Event(), threading.Event()

        def steps(self):
            self.reached.set()
            assert self.opened.wait(WAIT)
            yield

        def hold(self, engine):
            handle = engine.submit(self.steps(), TaskClass.INTERACTIVE, "gate")
            assert self.reached.wait(WAIT)
            return handle

    made = Gate()
    yield made
    made.opened.set()


def counting(log, name, ticks):
    for _ in range(ticks):
        log.append(name)
        yield
    return name


def test_results_come_back_and_callbacks_are_called(start):
    engine = start()
    ended = threading.Event()
    handle = engine.submit(counting([], "value", 3), TaskClass.BATCH, "count")
    handle.add_done_callback(lambda done: ended.set() if done is handle else None)
    assert handle.result(WAIT) == "value"
    assert handle.done()
    assert ended.wait(WAIT)


def test_tasks_run_on_one_thread_with_its_own_thread_count(start):
    engine = start()

    def who():
        yield
        return threading.current_thread().name, torch.get_num_threads()

    assert engine.submit(who(), TaskClass.BATCH, "who").result(WAIT) == ("mooring-engine", 1)


def test_urgent_classes_run_first_and_equals_take_turns(start, gate):
    engine = start(training_share=0.0)
    gate.hold(engine)
    log = []
    handles = [
        engine.submit(counting(log, name, 2), klass, name)
        for name, klass in (
            ("t", TaskClass.TRAINING),
            ("b1", TaskClass.BATCH),
            ("b2", TaskClass.BATCH),
            ("e", TaskClass.EVALUATION),
            ("i", TaskClass.INTERACTIVE),
        )
    ]
    gate.opened.set()
    for handle in handles:
        handle.result(WAIT)
    assert log == ["i", "i", "e", "e", "b1", "b2", "b1", "b2", "t", "t"]


def test_training_keeps_its_share_beside_busy_classes(start):
    engine = start(training_share=0.3)
    stop = threading.Event()
    ticks = []

    def work():
        while not stop.is_set():
            began = time.perf_counter()
            time.sleep(0.002)
            ticks.append(time.perf_counter() - began)
            yield

    handles = [
        engine.submit(work(), klass, klass.name) for klass in (TaskClass.TRAINING, TaskClass.INTERACTIVE)
    ]
    # long beside the longest tick: where the machine takes the thread away for a while, that tick is long
    while sum(ticks) < max(1.0, 40 * max(ticks, default=0.0)):
        time.sleep(0.05)
    stop.set()
    for handle in handles:
        handle.result(WAIT)
    used = engine.stats().busy_seconds
    share = used[TaskClass.TRAINING] / (used[TaskClass.TRAINING] + used[TaskClass.INTERACTIVE])
    assert 0.2 < share < 0.4


def test_cancelling_stops_before_the_next_tick_and_cleans_up(start):
    engine = start()
    ticks, cleaned, first = [], threading.Event(), threading.Event()

    def endless():
        try:
            while True:
                ticks.append(1)
                first.set()
                time.sleep(0.005)
                yield
        finally:
            cleaned.set()

    handle = engine.submit(endless(), TaskClass.TRAINING, "endless")
    assert first.wait(WAIT)
    handle.cancel()
    with pytest.raises(MooringError, match="endless was cancelled") as caught:
        handle.result(WAIT)
    assert caught.value.reason is Reason.CANCELLED
    assert cleaned.is_set()
    seen = len(ticks)
    engine.submit(counting([], "", 3), TaskClass.BATCH, "after").result(WAIT)
    assert len(ticks) == seen
    handle.cancel()  # again, when it is over: nothing


def test_a_waiting_task_can_be_cancelled_unstarted(start, gate):
    engine = start(max_running=1)
    gate.hold(engine)
    log = []
    waiting = engine.submit(counting(log, "never", 1), TaskClass.INTERACTIVE, "never")
    waiting.cancel()
    gate.opened.set()
    with pytest.raises(MooringError) as caught:
        waiting.result(WAIT)
    assert caught.value.reason is Reason.CANCELLED
    assert log == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("broken"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), MooringError),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), MooringError),
    ],
)
def test_a_failing_task_fails_alone(start, error, expected, base):
    engine = start()

    def failing():
        with engine.bank.rows([1], [1.0]):
            yield
            raise error

    log = []
    good = engine.submit(counting(log, "good", 20), TaskClass.BATCH, "good")
    bad = engine.submit(failing(), TaskClass.BATCH, "bad")
    with pytest.raises(expected) as caught:
        bad.result(WAIT)
    if expected is MooringError:
        assert caught.value.reason is Reason.OUT_OF_MEMORY
    assert good.result(WAIT) == "good"
    assert engine.submit(counting([], "next", 1), TaskClass.BATCH, "next").result(WAIT) == "next"


def test_a_full_queue_refuses_one_class_only(start, gate):
    engine = start(max_queue=2, max_running=1)
    gate.hold(engine)
    for _ in range(2):
        engine.submit(counting([], "", 1), TaskClass.INTERACTIVE, "waits")
    with pytest.raises(MooringError, match="2 interactive tasks are waiting") as caught:
        engine.submit(counting([], "", 1), TaskClass.INTERACTIVE, "too many")
    assert caught.value.reason is Reason.QUEUE_FULL
    engine.submit(counting([], "", 1), TaskClass.BATCH, "other class")
    stats = engine.stats()
    assert stats.waiting[TaskClass.INTERACTIVE] == 2
    assert stats.running[TaskClass.INTERACTIVE] == 1


def test_drain_finishes_what_it_can_and_refuses_new_work(start):
    engine = start()
    quick = engine.submit(counting([], "done", 5), TaskClass.BATCH, "quick")
    engine.close(drain_seconds=WAIT)
    assert quick.result(0) == "done"
    with pytest.raises(MooringError) as caught:
        engine.submit(counting([], "", 1), TaskClass.BATCH, "late")
    assert caught.value.reason is Reason.DRAINING
    assert engine.stats().draining


def test_closing_ends_running_and_waiting_tasks(start, gate):
    engine = start(max_running=1)
    running = gate.hold(engine)
    waiting = engine.submit(counting([], "", 1), TaskClass.INTERACTIVE, "waiting")
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.opened.set()
    closing.join(WAIT)
    for handle in (running, waiting):
        with pytest.raises(MooringError, match="shutting down") as caught:
            handle.result(0)
        assert caught.value.reason is Reason.DRAINING


# ---------------------------------------------------------------------- generation


def test_a_request_tells_its_place_its_steps_and_its_images(start, base):
    engine = start()
    events = []
    request = GenerationRequest(**REQUEST, seed=5, count=2, preview_interval=2)
    engine.generate(request, events.append).result(WAIT)
    assert [type(event) for event in events] == [Queued, Progress, Progress, Progress, ImageReady, ImageReady]
    assert [(e.step, e.steps, e.preview is None) for e in events[1:4]] == [
        (1, 3, True),
        (2, 3, False),
        (3, 3, True),
    ]
    assert events[2].preview.shape == (32, 32, 3)
    assert [(e.index, e.seed, e.image.dtype.name) for e in events[4:]] == [(0, 5, "uint8"), (1, 6, "uint8")]
    rows = [SampleRow(request.prompt, seed=seed) for seed in (5, 6)]
    expected = drain(sample(base, engine.bank, rows, steps=3, guidance_scale=3.0))
    assert all((expected[e.index].numpy() == e.image).all() for e in events[4:])


def test_many_images_come_in_groups_with_one_count_of_steps(start):
    engine = start()
    events = []
    engine.generate(GenerationRequest(**REQUEST, count=5), events.append).result(WAIT)
    assert [e.index for e in events if isinstance(e, ImageReady)] == [0, 1, 2, 3, 4]
    assert [(e.step, e.steps) for e in events if isinstance(e, Progress)] == [(k, 6) for k in range(1, 7)]


def images(engine, adapter=None, **changes):
    found = []
    if adapter is not None:
        changes["adapters"] = (AdapterUse(adapter),)
    handle = engine.generate(GenerationRequest(**{**REQUEST, **changes}), found.append)
    handle.result(WAIT)
    return [event.image for event in found if isinstance(event, ImageReady)]


def test_the_same_request_gives_the_same_image_whatever_ran_between(start, base):
    engine = start()
    before = base.fingerprint()
    adapter = random_adapter(base, 1, placeholder="<it>")
    first = [images(engine, adapter=adapter, prompt="a <it>"), images(engine)]

    def training():
        slot = engine.bank.training_slot(seed=1)
        try:
            for _ in range(3):
                with slot.active():
                    loss = base.predict(
                        torch.ones(1, 4, 8, 8), torch.tensor([9]), base.encode_prompt(["a"])
                    ).sum()
                loss.backward()
                slot.flat.sub_(slot.flat_grad, alpha=0.1)
                yield
            raise RuntimeError("fails at the end")
        finally:
            slot.close()

    with pytest.raises(RuntimeError, match="fails at the end"):
        engine.submit(training(), TaskClass.TRAINING, "training").result(WAIT)
    images(engine, adapter=random_adapter(base, 2))
    again = [images(engine, adapter=adapter, prompt="a <it>"), images(engine)]
    assert all((x == y).all() for a, b in zip(first, again, strict=True) for x, y in zip(a, b, strict=True))
    assert (first[0][0] != first[1][0]).any()
    assert base.fingerprint() == before


def test_more_adapters_than_slots_take_turns(start, base):
    engine = start(max_running=4)  # two slots besides the zero slot
    adapters = [random_adapter(base, seed) for seed in range(4)]
    alone = [images(engine, adapter=adapter)[0] for adapter in adapters]
    found = {}
    handles = []
    for index, adapter in enumerate(adapters * 2):

        def keep(event, index=index):
            if isinstance(event, ImageReady):
                found[index] = event.image

        handles.append(engine.generate(GenerationRequest(**REQUEST, adapters=(AdapterUse(adapter),)), keep))
    for handle in handles:
        handle.result(WAIT)
    assert all((found[index] == alone[index % 4]).all() for index in range(8))


def test_slots_come_back_from_cancelled_and_failing_requests(start, base):
    engine = start()
    adapter = random_adapter(base, 1)

    def fail(event):
        if isinstance(event, Progress):
            raise OSError("client is gone")

    with pytest.raises(OSError, match="client is gone"):
        engine.generate(GenerationRequest(**REQUEST, adapters=(AdapterUse(adapter),)), fail).result(WAIT)
    started = threading.Event()
    handle = engine.generate(
        GenerationRequest(**{**REQUEST, "steps": 150}, adapters=(AdapterUse(adapter),)),
        lambda _event: started.set(),
    )
    assert started.wait(WAIT)
    handle.cancel()
    with pytest.raises(MooringError):
        handle.result(WAIT)

    def probe():
        yield
        slots = [engine.bank.reserve() for _ in range(2)]
        for slot in slots:
            engine.bank.release(slot)
        return slots

    assert sorted(engine.submit(probe(), TaskClass.BATCH, "probe").result(WAIT)) == [1, 2]


def test_a_request_waits_for_a_slot_that_someone_else_holds(start, base):
    engine = start()
    reserved = threading.Event()
    free = threading.Event()

    def hog():
        slots = [engine.bank.reserve() for _ in range(2)]
        reserved.set()
        while not free.is_set():
            time.sleep(0.001)
            yield
        for slot in slots:
            engine.bank.release(slot)

    hogging = engine.submit(hog(), TaskClass.TRAINING, "hog")
    assert reserved.wait(WAIT)
    events = []
    handle = engine.generate(
        GenerationRequest(**REQUEST, adapters=(AdapterUse(random_adapter(base, 1)),)), events.append
    )
    while not any(isinstance(event, Queued) for event in events):
        time.sleep(0.001)
    assert not handle.done()
    free.set()
    hogging.result(WAIT)
    handle.result(WAIT)
    assert isinstance(events[-1], ImageReady)


def test_positions_are_told_as_the_queue_moves(start, gate):
    engine = start(max_running=1)
    gate.hold(engine)
    seen = [[], []]
    handles = [engine.generate(GenerationRequest(**REQUEST), log.append) for log in seen]
    gate.opened.set()
    for handle in handles:
        handle.result(WAIT)
    assert [e.position for e in seen[0] if isinstance(e, Queued)] == [0]
    assert [e.position for e in seen[1] if isinstance(e, Queued)] == [1, 0]


# ---------------------------------------------------------------------- tenants and deadlines


def test_a_tenant_that_floods_a_class_does_not_keep_another_out(start):
    engine = start(max_running=2)
    stop = threading.Event()

    def flood():
        while not stop.is_set():
            time.sleep(0.001)
            yield

    handles = [engine.submit(flood(), TaskClass.BATCH, "flood", tenant="flood") for _ in range(6)]
    assert (
        engine.submit(counting([], "one", 20), TaskClass.BATCH, "one", tenant="other").result(WAIT) == "one"
    )
    assert engine.stats().waiting[TaskClass.BATCH] == 4
    stop.set()
    for handle in handles:
        handle.result(WAIT)


def test_weights_divide_a_class_among_tenants(start):
    engine = start(tenant_weights={"big": 3.0})
    stop, took = threading.Event(), {"big": [0.0], "small": [0.0]}

    def work(tenant):
        while not stop.is_set():
            started = time.perf_counter()
            time.sleep(0.002)
            took[tenant].append(time.perf_counter() - started)
            yield

    handles = [engine.submit(work(name), TaskClass.BATCH, name, tenant=name) for name in took]
    time.sleep(1.0)
    stop.set()
    for handle in handles:
        handle.result(WAIT)
    longest = max(max(seconds) for seconds in took.values())  # of a tick, on a busy machine
    assert abs(sum(took["big"]) / 3 - sum(took["small"])) <= 2 * longest + 0.05


def test_earlier_deadlines_are_served_first(start, gate):
    engine = start()
    gate.hold(engine)
    ended = []
    handles = []
    for name, seconds in (("none", None), ("late", 2 * WAIT), ("soon", WAIT)):
        deadline = None if seconds is None else time.monotonic() + seconds
        handle = engine.generate(GenerationRequest(**REQUEST), lambda _event: None, deadline=deadline)
        handle.add_done_callback(lambda _handle, name=name: ended.append(name))
        handles.append(handle)
    gate.opened.set()
    for handle in handles:
        handle.result(WAIT)
    assert ended == ["soon", "late", "none"]


def test_a_deadline_that_passes_in_the_queue_ends_the_request_unstarted(start, gate, base):
    engine = start(max_running=1)
    gate.hold(engine)
    events = []
    request = GenerationRequest(**REQUEST, adapters=(AdapterUse(random_adapter(base, 1)),))
    handle = engine.generate(request, events.append, deadline=time.monotonic() + 0.01)
    time.sleep(0.02)
    gate.opened.set()
    with pytest.raises(MooringError, match="generate cannot be done before its deadline") as caught:
        handle.result(WAIT)
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    assert caught.value.metadata["left_seconds"] == "0.000"
    assert events == []
    assert engine.bank._pins == [0] * len(engine.bank._pins)


def test_a_request_whose_steps_cannot_be_done_in_time_is_refused_before_time_is_spent(start, base):
    engine = start()
    adapter = random_adapter(base, 1)
    images(engine, adapter=adapter, count=4)  # three steps of four images: their cost is known now
    request = GenerationRequest(**{**REQUEST, "steps": 150, "count": 16}, adapters=(AdapterUse(adapter),))
    events = []
    ticks = engine.stats().ticks[TaskClass.INTERACTIVE]
    with pytest.raises(MooringError, match="its steps take") as caught:
        engine.generate(request, events.append, deadline=time.monotonic() + 1.0).result(WAIT)
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    needed, left = (float(caught.value.metadata[f"{name}_seconds"]) for name in ("needed", "left"))
    assert needed > left > 0
    assert engine.stats().ticks[TaskClass.INTERACTIVE] == ticks
    assert images(engine, adapter=adapter)  # others go on


BAD = [
    ({"prompt": "  "}, Reason.EMPTY_PROMPT, "prompt", "empty"),
    ({"prompt": "a duck " * 9}, Reason.PROMPT_TOO_LONG, "prompt", "would be cut: “a duck a duck”"),
    ({"negative_prompt": "a duck " * 9}, Reason.PROMPT_TOO_LONG, "negative_prompt", "would be cut"),
    ({"prompt": "a <it>"}, Reason.UNKNOWN_PLACEHOLDER, "prompt", "<it> is no placeholder of the base model"),
    ({"steps": 0}, Reason.STEPS_OUT_OF_RANGE, "steps", "1 to 150, not 0"),
    ({"steps": 151}, Reason.STEPS_OUT_OF_RANGE, "steps", "not 151"),
    ({"guidance_scale": float("nan")}, Reason.INVALID_FIELD, "guidance_scale", "not nan"),
    ({"guidance_scale": 31}, Reason.INVALID_FIELD, "guidance_scale", "0 to 30"),
    ({"count": 0}, Reason.INVALID_FIELD, "count", "1 to 16"),
    ({"seed": -1}, Reason.INVALID_FIELD, "seed", "not -1"),
    ({"seed": 2**63}, Reason.INVALID_FIELD, "seed", "2\\^63"),
    ({"preview_interval": -1}, Reason.INVALID_FIELD, "preview_interval", "0 or more"),
    ({"sampler": "plms"}, Reason.INVALID_FIELD, "sampler", "ddim, euler"),
]


@pytest.mark.parametrize(("change", "reason", "field", "says"), BAD)
def test_a_bad_request_is_refused_before_it_is_queued(start, change, reason, field, says):
    engine = start()
    events = []
    with pytest.raises(MooringError, match=says) as caught:
        engine.generate(GenerationRequest(**{**REQUEST, **change}), events.append)
    assert caught.value.reason is reason
    assert caught.value.fields[0].field == field
    assert events == []


@pytest.mark.parametrize("which", ["tiny_sd15", "tiny_sd_deep"])
def test_sizes_follow_the_base(which, request):
    model = load_base(request.getfixturevalue(which), threads=1)
    factor, largest = model.vae_scale_factor, 2 * model.native_size
    for name in ("height", "width"):
        for wrong in (model.native_size - 1, largest + factor, factor // 2):
            with pytest.raises(MooringError, match=f"multiple of {factor} up to {largest}") as caught:
                GenerationRequest(**REQUEST, **{name: wrong}).validate(model)
            assert caught.value.reason is Reason.SIZE_NOT_SUPPORTED
            assert [violation.field for violation in caught.value.fields] == [name]
        GenerationRequest(**REQUEST, **{name: largest}).validate(model)


def test_an_adapter_that_does_not_fit_is_refused_before_it_is_queued(start, base, base_v):
    engine = start()
    with pytest.raises(MooringError, match="belongs to base") as caught:
        images(engine, adapter=random_adapter(base_v, 1))
    assert caught.value.reason is Reason.BASE_DIGEST_MISMATCH
    with pytest.raises(MooringError, match="rank 9") as caught:
        images(engine, adapter=random_adapter(base, 1, rank=9))
    assert caught.value.reason is Reason.ADAPTER_RANK_TOO_LARGE
    other = random_adapter(base, 1, placeholder="<that>")
    with pytest.raises(MooringError, match="<it> is no placeholder of this adapter; it knows <that>"):
        images(engine, adapter=other, prompt="a <it>")


def test_observers_receive_numbers_and_their_faults_stay_theirs(start, base):
    class Faulty:
        def __getattr__(self, name):
            raise RuntimeError("no numbers today")

    numbers = Numbers()
    engine = start(observer=Faulty())
    engine.add_observer(numbers)
    images(engine, adapter=random_adapter(base, 1), count=2)
    assert set(numbers.stages) == {"text_encode", "adapter_load", "denoise", "decode"}
    assert numbers.batches == [(4, 1)] * 3
    assert set(numbers.ticks) == {TaskClass.INTERACTIVE}
    assert len(numbers.ticks) == 2 + 3 + 2  # two prompts, three steps, two decodes
    assert set(numbers.tenants) == {(TaskClass.INTERACTIVE, "")}
    assert numbers.lookups == [(2, 0)]
    assert numbers.queues[-1] == (TaskClass.INTERACTIVE, 0, 0)


def test_an_engine_needs_no_adapter_slots_for_the_base(start, make_bank, base):
    bank: AdapterBank = make_bank(base, slots=2, rank=8)
    engine = start(bank=bank)
    assert len(images(engine)) == 1
    assert not bank.arena.any()
