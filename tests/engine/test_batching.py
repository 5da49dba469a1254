"""Requests batched step by step: each gets the bits it has alone, and fails alone."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, replace

import pytest
import torch
from engine_helpers import random_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mooring_server.engine.engine import Engine
from mooring_server.engine.model import SAMPLERS
from mooring_server.engine.policy import TaskClass
from mooring_server.engine.prompt_cache import PromptCache
from mooring_server.engine.requests import AdapterUse, GenerationRequest, ImageReady, Progress
from mooring_server.engine.sampling import SampleRow, draw
from mooring_server.engine.ticks import answer
from mooring_server.errors import MooringError, Reason

WAIT = 240
ADAPTERS = 3


@dataclass(frozen=True)
class Spec:
    """A request; `adapters` are (slot, scale)."""

    adapters: tuple[tuple[int, float], ...]
    guidance: float
    steps: int
    sampler: str
    seed: int
    count: int
    small: bool

    def draw(self, base, bank):
        rows = [SampleRow("a duck on grass", "blue", self.adapters, self.seed + i) for i in range(self.count)]
        side = 16 if self.small else 32
        return draw(
            base,
            bank,
            rows,
            steps=self.steps,
            guidance_scale=self.guidance,
            sampler=self.sampler,
            height=side,
            width=side,
        )


SPECS = st.builds(
    Spec,
    adapters=st.lists(
        st.tuples(st.integers(1, ADAPTERS), st.sampled_from([1.0, 0.5])),
        max_size=2,
        unique_by=lambda use: use[0],
    ).map(tuple),
    guidance=st.sampled_from([1.0, 3.0]),
    steps=st.integers(1, 3),
    sampler=st.sampled_from(SAMPLERS),
    seed=st.integers(0, 2),
    count=st.integers(1, 2),
    small=st.booleans(),
)


class Running:
    """A request under way, with every prediction it was given."""

    def __init__(self, base, bank, spec):
        self.steps = spec.draw(base, bank)
        self.given = []
        self.images = None
        self.call = None
        self.send(None)

    def send(self, prediction):
        """Go on to the next call, through the ticks that need no UNet."""
        if prediction is not None:
            self.given.append(prediction.clone())
        try:
            self.call = self.steps.send(prediction)
            while self.call is None:
                self.call = self.steps.send(None)
        except StopIteration as stop:
            self.images, self.call = stop.value, None


@pytest.fixture(scope="module")
def served(base):
    """A base with adapters in slots 1 to 3, and the isolated runs that were already made."""
    from mooring_server.engine.bank import AdapterBank

    bank = AdapterBank(base, slots=ADAPTERS + 1, rank=8)
    for slot in range(1, ADAPTERS + 1):
        bank.load(slot, random_adapter(base, slot, rank=2 * slot, targets="attention"))
    yield base, bank, {}
    bank.close()


def alone(served, spec):
    base, bank, known = served
    if spec not in known:
        running = Running(base, bank, spec)
        while running.call is not None:
            running.send(answer(base, bank, [running.call], row_wise=True)[0])
        known[spec] = running
    return known[spec]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(specs=st.lists(SPECS, min_size=2, max_size=4), data=st.data())
def test_any_schedule_gives_every_request_the_bits_it_has_alone(served, specs, data):
    base, bank, _ = served
    tasks = [Running(base, bank, spec) for spec in specs]
    while any(task.call for task in tasks):
        waiting = [task for task in tasks if task.call]
        leader = data.draw(st.sampled_from(waiting), label="leader")
        together = [
            task
            for task in waiting
            if task is leader or (task.call.shape == leader.call.shape and data.draw(st.booleans()))
        ]
        together = data.draw(st.permutations(together), label="order")
        for task, found in zip(
            together, answer(base, bank, [task.call for task in together], row_wise=True), strict=True
        ):
            task.send(found)
    for task, spec in zip(tasks, specs, strict=True):
        expected = alone(served, spec)
        assert all(torch.equal(a, b) for a, b in zip(task.given, expected.given, strict=True))
        assert torch.equal(task.images, expected.images)
        if spec.adapters:  # and it is its own adapters' image: nobody else's, and not the base's
            unadapted = alone(served, replace(spec, adapters=()))
            assert not torch.equal(task.images, unadapted.images)
    for one, other in itertools.combinations(range(len(specs)), 2):
        # in another order the same adapters add up to the same image
        if set(specs[one].adapters) != set(specs[other].adapters) and specs[other] == replace(
            specs[one], adapters=specs[other].adapters
        ):
            assert not torch.equal(tasks[one].images, tasks[other].images)


def test_every_adapter_changes_its_own_image_and_no_other(served):
    base, bank, _ = served
    specs = [Spec(use, 3.0, 2, "ddim", 1, 1, False) for use in ((), ((1, 1.0),), ((2, 1.0),), ((3, 1.0),))]
    tasks = [Running(base, bank, spec) for spec in specs]
    while tasks[0].call:
        for task, found in zip(
            tasks, answer(base, bank, [t.call for t in tasks], row_wise=True), strict=True
        ):
            task.send(found)
    for index, task in enumerate(tasks):
        assert torch.equal(task.images, alone(served, specs[index]).images)
        assert all(not torch.equal(task.images, other.images) for other in tasks[:index])


def test_row_by_row_is_the_plain_batch_to_rounding_and_leaves_it_as_it_was(base):
    generator = torch.Generator().manual_seed(0)
    point = (
        torch.randn(5, 4, 8, 8, generator=generator),
        torch.tensor([900, 500, 20, 3, 7]),
        base.encode_prompt(["a duck", "a red car", "a toy robot", "", "grass"]),
    )
    with torch.no_grad():
        plain = base.predict(*point)
        rows = base.predict(*point, row_wise=True)
        again = base.predict(*point)
    assert torch.equal(plain, again)
    assert (plain - rows).abs().max() < 1e-5


# ---------------------------------------------------------------------- in the engine


class Batches:
    """An observer of batches only."""

    def __init__(self):
        self.seen = []

    def batch(self, size, adapters):
        self.seen.append((size, adapters))

    def __getattr__(self, name):
        return lambda *values: None


@pytest.fixture
def start(base, make_bank):
    engines = []

    def make(**options):
        engines.append(Engine(base, make_bank(base, slots=5, rank=8), threads=1, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
    base.on_stage = None


class Held:
    """Holds an engine's thread until all requests are submitted."""

    def __init__(self, engine):
        self.engine, self.reached, self.opened = engine, threading.Event(), threading.Event()

    def __enter__(self):
        def hold():
            self.reached.set()
            assert self.opened.wait(WAIT)
            yield

        self.engine.submit(hold(), TaskClass.INTERACTIVE, "held")
        assert self.reached.wait(WAIT)

    def __exit__(self, *_):
        self.opened.set()


def submit(engine, request, **options):
    events = []
    return engine.generate(request, events.append, **options), events


def pictures(events):
    return [event.image for event in events if isinstance(event, ImageReady)]


def request_for(base, index, **changes):
    uses = () if index == 0 else (AdapterUse(random_adapter(base, index), 1.0),)
    return GenerationRequest(
        **{"prompt": "a duck", "steps": 3, "guidance_scale": 3.0, "seed": index, "adapters": uses, **changes}
    )


def test_requests_share_passes_and_get_the_images_they_get_alone(start, base):
    engine, batches = start(), Batches()
    requests = [
        request_for(base, 0),
        request_for(base, 1, sampler="euler_ancestral", steps=5),
        request_for(base, 2, guidance_scale=1.0),
        request_for(base, 3, count=2),
    ]
    expected = []
    for request in requests:
        handle, events = submit(engine, request)
        handle.result(WAIT)
        expected.append(pictures(events))
    engine.add_observer(batches)
    with Held(engine):
        running = [submit(engine, request) for request in requests]
    for handle, _ in running:
        handle.result(WAIT)
    for (_, events), images in zip(running, expected, strict=True):
        assert all((a == b).all() for a, b in zip(pictures(events), images, strict=True))
    assert (2 + 2 + 1 + 4, 3) in batches.seen  # all of them in one pass
    assert batches.seen[-1] == (2, 1)  # the longest ends by itself
    assert sum(size for size, _ in batches.seen) == 3 * 2 + 5 * 2 + 3 + 3 * 4


def test_a_request_joins_while_another_is_under_way(start, base):
    engine, batches = start(), Batches()
    engine.add_observer(batches)
    joined = []

    def join(event):
        if isinstance(event, Progress) and event.step == 2:
            joined.append(submit(engine, request_for(base, 2, steps=2)))

    handle = engine.generate(request_for(base, 1, steps=8), join)
    handle.result(WAIT)
    joined[0][0].result(WAIT)
    assert [size for size, _ in batches.seen].count(4) == 2
    assert len(batches.seen) == 8


def test_a_pass_takes_no_more_rows_than_the_table_says(start, base):
    class Four:
        def limit(self, shape):
            return 4

        def seconds(self, shape, rows):
            return 0.01

        def observe(self, shape, rows, seconds):
            pass

    engine, batches = start(costs=Four(), max_running=8), Batches()
    engine.add_observer(batches)
    with Held(engine):
        running = [submit(engine, request_for(base, index)) for index in range(4)]
        large = submit(engine, request_for(base, 1, count=4))  # 8 rows: more than the limit, and still run
    for handle, _ in [*running, large]:
        handle.result(WAIT)
    sizes = {size for size, _ in batches.seen}
    assert sizes == {4, 8}


def test_a_pass_that_fails_is_repeated_one_by_one(start, base, monkeypatch):
    engine = start()
    predict = base.predict

    def limited(latents, *args, **options):
        if latents.shape[0] > 4:
            raise torch.OutOfMemoryError("out of memory")
        return predict(latents, *args, **options)

    with Held(engine):
        monkeypatch.setattr(base, "predict", limited)
        good = [submit(engine, request_for(base, index)) for index in range(3)]
        bad = submit(engine, request_for(base, 1, count=4))
    for handle, events in good:
        handle.result(WAIT)
        assert len(pictures(events)) == 1
    with pytest.raises(MooringError) as caught:
        bad[0].result(WAIT)
    assert caught.value.reason is Reason.OUT_OF_MEMORY


def test_several_adapters_act_on_one_request(start, base):
    engine = start()
    both = (AdapterUse(random_adapter(base, 1), 0.7), AdapterUse(random_adapter(base, 2, placeholder="<it>")))
    found = []
    for uses in (both, both[:1], both[1:], both):
        prompt = "a <it>" if both[1] in uses else "a duck"
        handle, events = submit(engine, request_for(base, 0, adapters=uses, prompt=prompt))
        handle.result(WAIT)
        found.append(pictures(events)[0])
    assert (found[0] == found[3]).all()
    assert all((found[0] != other).any() for other in found[1:3])
    for wrong, says in (
        (both[:1] * 2, "named twice"),
        ((both[1], AdapterUse(random_adapter(base, 3, placeholder="<IT>"))), "their own <it>"),
        (tuple(AdapterUse(random_adapter(base, seed)) for seed in range(5)), "up to 4 adapters"),
        ((AdapterUse(random_adapter(base, 1), -0.1),), "0 to 2"),
    ):
        with pytest.raises(MooringError, match=says) as caught:
            submit(engine, request_for(base, 0, adapters=wrong))
        assert caught.value.reason is Reason.INVALID_FIELD


def test_requests_that_want_each_others_slots_do_not_wait_for_ever(base, start):
    engine = start()
    adapters = [random_adapter(base, seed) for seed in range(1, 7)]
    with Held(engine):
        running = [
            submit(
                engine,
                request_for(base, 0, adapters=tuple(AdapterUse(adapters[i]) for i in wanted)),
            )
            for wanted in ((0, 1, 2), (3, 4, 5), (5, 4, 3, 2), (1, 0))
        ]
    for handle, events in running:
        handle.result(WAIT)
        assert len(pictures(events)) == 1


def test_prompts_are_encoded_once_and_never_for_another_adapters_words(start, base):
    class Lookups(Batches):
        def __init__(self):
            super().__init__()
            self.encodes = 0

        def stage(self, name, seconds):
            self.encodes += name == "text_encode"

    engine, lookups = start(), Lookups()
    engine.add_observer(lookups)
    words = [random_adapter(base, seed, placeholder="<it>") for seed in (1, 2)]

    def run(adapter, prompt="a <it>"):
        handle, events = submit(engine, request_for(base, 0, adapters=(AdapterUse(adapter),), prompt=prompt))
        handle.result(WAIT)
        return pictures(events)[0]

    first = run(words[0])
    assert lookups.encodes == 2
    assert (run(words[0]) == first).all()
    assert lookups.encodes == 2
    other = run(words[1])
    assert lookups.encodes == 4  # the same text, other vectors behind it
    assert (other != first).any()
    assert (run(words[0]) == first).all()
    assert lookups.encodes == 4


@settings(max_examples=50, deadline=None)
@given(keys=st.lists(st.integers(0, 6), max_size=40), room=st.integers(0, 5))
def test_the_prompt_cache_keeps_the_latest_within_its_bytes(keys, room):
    from mooring_server.engine.model import PromptEmbeds

    size = torch.zeros(1, 2, 4).nbytes
    cache, order = PromptCache(room * size), []
    for key in keys:
        found = cache.find(key)
        assert (found is not None) == (key in order)
        if found is None:
            cache.put(key, PromptEmbeds(torch.full((1, 2, 4), float(key))))
        else:
            assert (found.hidden == key).all()
            order.remove(key)
        order = ([*order, key])[-room:] if room else []
        assert cache.bytes == len(order) * size
    assert cache.queries == len(keys)
