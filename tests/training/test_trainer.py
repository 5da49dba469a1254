"""Whole runs on a tiny random base: determinism, resume, cancel, divergence, budgets, methods."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from mooring_server.engine.adapters import from_safetensors, to_safetensors
from mooring_server.engine.bank import AdapterBank
from mooring_server.engine.base import load_base
from mooring_server.errors import MooringError, Reason
from mooring_server.training import Method, TrainConfig, train
from mooring_server.training.checkpoint import Checkpoint
from PIL import Image

GENERIC = ["a cat in the desert", "a car on grass", "a pizza on wood", "a red drum"]
QUICK = TrainConfig(
    steps=24, rank=4, batch_size=2, views=2, probe_every=4, probe_points=16, control_points=8,
    checkpoint_every=8, preview_every=0, prior_images=3, learning_rate=5e-3,
)  # fmt: skip


class Memory:
    """A checkpoint store that remembers everything."""

    def __init__(self, data=None):
        self.data = data
        self.saves = []
        self.now = False

    def load(self):
        return self.data

    def save(self, data):
        self.data = data
        self.saves.append(data)
        self.now = False

    def wanted(self):
        return self.now


@pytest.fixture(scope="module")
def base(tiny_sd15):
    return load_base(tiny_sd15)


@pytest.fixture
def bank(base):
    return AdapterBank(base, slots=3, rank=6)


@pytest.fixture(scope="module")
def photos():
    generator = torch.Generator().manual_seed(5)
    return [
        Image.fromarray((torch.rand(20, 24, 3, generator=generator) * 255).byte().numpy()) for _ in range(3)
    ]


def start(base, bank, photos, config, *, store=None, seen=None, noun="bird"):
    return train(
        base, bank, photos, config, class_noun=noun, placeholder="<duck>", generic_prompts=GENERIC,
        checkpoint=store or Memory(), on_progress=(seen if seen is not None else []).append,
    )  # fmt: skip


def finish(run, ticks=None):
    count = 0
    while True:
        try:
            next(run)
        except StopIteration as stop:
            return stop.value
        count += 1
        if ticks is not None and count == ticks:
            run.close()
            return None


def ticks_of(run):
    return sum(1 for _ in run)


@pytest.mark.parametrize("method", list(Method))
def test_every_method_trains_and_changes_the_prediction(base, bank, photos, method):
    result = finish(start(base, bank, photos, dataclasses.replace(QUICK, method=method, steps=12)))
    assert result.drift.drift > 0
    assert result.weights.metadata["method"] == str(method)
    assert all(torch.isfinite(factors.B).all() for factors in result.weights.layers.values())
    assert any(factors.B.any() for factors in result.weights.layers.values())
    again = from_safetensors(to_safetensors(result.weights), base)
    assert again.digest == result.weights.digest
    assert json.loads(again.metadata["config"])["method"] == str(method)


def test_a_base_of_another_size_and_depth_trains_by_the_same_code(tiny_sd_deep, photos):
    deep = load_base(tiny_sd_deep)
    config = dataclasses.replace(QUICK, steps=12, budget=0.02, preview_every=12)
    seen = []
    result = finish(start(deep, AdapterBank(deep, slots=2, rank=4), photos, config, seen=seen))
    assert 0 < result.drift.drift <= 0.02
    assert [p.shape for report in seen for p in report.previews] == [(64, 64, 3)] * 2


def test_the_base_is_untouched_and_the_slot_comes_back(base, bank, photos):
    before = base.fingerprint()
    finish(start(base, bank, photos, QUICK))
    assert base.fingerprint() == before
    assert not bank.arena.any()
    slots = [bank.reserve() for _ in range(bank.slots - 1)]
    assert len(slots) == bank.slots - 1


def test_the_published_factors_measure_what_they_say(base, bank, photos):
    config = dataclasses.replace(QUICK, budget=0.02)
    result = finish(start(base, bank, photos, config))
    assert 0.02 * 0.97 <= result.drift.drift <= 0.02
    assert result.scale < 1.0
    assert float(json.loads(result.weights.metadata["scaled_down_by"])) == result.scale
    assert json.loads(result.weights.metadata["drift"])["value"] == result.drift.drift


def test_a_budget_that_is_not_reached_leaves_the_update_alone(base, bank, photos):
    free = finish(start(base, bank, photos, dataclasses.replace(QUICK, method=Method.NONE)))
    wide = finish(start(base, bank, photos, dataclasses.replace(QUICK, budget=1e4)))
    assert wide.scale == 1.0
    assert wide.weights.digest == free.weights.digest, "the controller sleeps and costs nothing"


def test_strength_zero_is_no_protection_and_a_huge_one_holds_everything_still(base, bank, photos):
    free = finish(start(base, bank, photos, dataclasses.replace(QUICK, method=Method.NONE)))
    zero = finish(start(base, bank, photos, dataclasses.replace(QUICK, strength=0.0)))
    held = finish(start(base, bank, photos, dataclasses.replace(QUICK, strength=1e3)))
    assert zero.weights.digest == free.weights.digest
    assert held.drift.drift < 0.2 * free.drift.drift


@pytest.mark.parametrize("method", [Method.SPECTRAL, Method.PRIOR_PRESERVATION])
def test_resume_is_bitwise_from_any_tick(base, bank, photos, method):
    config = dataclasses.replace(QUICK, method=method, budget=0.05 if method.penalised else None)
    whole = finish(start(base, bank, photos, config))
    total = ticks_of(start(base, bank, photos, config))
    for cut in range(3, total, max(1, total // 9)):
        store = Memory()
        assert finish(start(base, bank, photos, config, store=store), ticks=cut) is None
        resumed = finish(start(base, bank, photos, config, store=store))
        assert resumed.weights.digest == whole.weights.digest, f"cut after tick {cut} of {total}"
        assert resumed.drift.drift == whole.drift.drift
        assert resumed.history == whole.history


def test_resume_after_a_kill_uses_the_periodic_checkpoint(base, bank, photos):
    store = Memory()
    whole = finish(start(base, bank, photos, QUICK, store=store))
    assert len(store.saves) == 3
    for data in store.saves:  # as if the process had died right after each save
        resumed = finish(start(base, bank, photos, QUICK, store=Memory(data)))
        assert resumed.weights.digest == whole.weights.digest


def test_a_wanted_checkpoint_loses_no_step(base, bank, photos):
    whole = finish(start(base, bank, photos, QUICK))
    store = Memory()
    run = start(base, bank, photos, QUICK, store=store)
    while not store.saves:
        next(run)
    store.now = True
    while store.now:
        next(run)
    run.close()
    assert Checkpoint.from_bytes(store.data).step == QUICK.checkpoint_every + 1
    assert finish(start(base, bank, photos, QUICK, store=store)).weights.digest == whole.weights.digest


def test_another_task_between_ticks_changes_nothing(base, bank, photos):
    alone = finish(start(base, bank, photos, QUICK))
    first = start(base, bank, photos, QUICK)
    second = start(base, bank, photos, dataclasses.replace(QUICK, seed=1))
    results = []
    while len(results) < 2:
        for run in (first, second):
            try:
                next(run)
            except StopIteration as stop:
                if stop.value is not None:
                    results.append(stop.value)
        torch.rand(7)  # global randomness is not ours
    assert results[0].weights.digest == alone.weights.digest
    assert results[1].weights.digest != alone.weights.digest


def test_grad_mode_and_adapters_do_not_leak_over_a_yield(base, bank, photos):
    run = start(base, bank, photos, dataclasses.replace(QUICK, steps=6))
    embeds = base.encode_prompt(["a cat"])
    latents = torch.ones(1, base.latent_channels, 8, 8)
    with torch.no_grad():
        expected = base.predict(latents, torch.tensor([100]), embeds)
    for _ in run:
        assert torch.is_grad_enabled()
        with torch.no_grad():
            assert torch.equal(base.predict(latents, torch.tensor([100]), embeds), expected)


def test_a_foreign_checkpoint_is_refused(base, bank, photos):
    store = Memory()
    run = start(base, bank, photos, QUICK, store=store)
    while not store.saves:
        next(run)
    run.close()
    other = dataclasses.replace(QUICK, learning_rate=1e-4)
    with pytest.raises(MooringError) as caught:
        finish(start(base, bank, photos, other, store=store))
    assert caught.value.reason is Reason.CHECKPOINT_NOT_USABLE
    with pytest.raises(MooringError):
        finish(start(base, bank, photos[:2], QUICK, store=store))
    assert not bank.arena.any(), "a refused run frees its slot"


def test_divergence_is_a_typed_error(base, bank, photos):
    run = start(base, bank, photos, dataclasses.replace(QUICK, method=Method.NONE, steps=400))
    for _ in range(40):
        next(run)
    bank.arena[1].fill_(float("nan"))
    with pytest.raises(MooringError) as caught:
        finish(run)
    assert caught.value.reason is Reason.TRAINING_DIVERGED
    assert "learning rate" in caught.value.remedy
    assert bank.reserve() == 1


def test_progress_tells_phases_and_numbers(base, bank, photos):
    seen = []
    config = dataclasses.replace(QUICK, method=Method.PRIOR_PRESERVATION, preview_every=12)
    finish(start(base, bank, photos, config, seen=seen))
    phases = list(dict.fromkeys(report.phase for report in seen))
    assert phases == ["caching", "prior", "probe", "training", "measuring"]
    training = [report for report in seen if report.phase == "training"]
    assert training[-1].step == config.steps
    assert [report.step for report in training] == list(range(1, config.steps + 1))
    assert all(math.isfinite(report.loss) for report in training)
    measured = [report.drift is not None for report in training]
    assert measured == [report.step >= config.probe_every for report in training]
    steered = finish(start(base, bank, photos, dataclasses.replace(QUICK, probe_every=6)))
    assert [row["step"] for row in steered.history] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 22, 24]
    assert all(report.seconds_left >= 0 for report in training)
    assert training[-1].sigma_max > 0
    assert training[-1].layer_sigma.keys() == set(bank.layout.names)
    assert max(training[-1].layer_sigma.values()) == training[-1].sigma_max
    assert sum(len(report.previews) for report in seen) == 4
    drawn = next(report.previews[0] for report in training if report.previews)
    assert drawn.shape == (base.native_size, base.native_size, 3)


def test_every_step_of_a_penalised_run_tells_the_norm_of_each_layer(base, bank, photos):
    seen = []
    finish(
        start(base, bank, photos, dataclasses.replace(QUICK, method=Method.SPECTRAL, strength=0.1), seen=seen)
    )
    training = [report.layer_sigma for report in seen if report.phase == "training"]
    assert len(training) == QUICK.steps
    assert all(report.keys() == training[0].keys() for report in training)
    # B starts at zero, and the norms are those that the step began with
    assert set(training[0].values()) == {0.0}
    assert all(sigma > 0 for sigma in training[-1].values())


def test_targets_beyond_the_bank_are_refused(base, bank, photos):
    with pytest.raises(MooringError) as caught:
        finish(start(base, bank, photos, dataclasses.replace(QUICK, targets="attention+ff")))
    assert [violation.field for violation in caught.value.fields] == ["targets"]


def test_a_wider_bank_trains_only_the_targets(base, photos):
    wide = AdapterBank(base, slots=2, rank=4, targets="attention+ff")
    result = finish(start(base, wide, photos, dataclasses.replace(QUICK, steps=6)))
    touched = {name for name, factors in result.weights.layers.items() if factors.B.any()}
    assert touched
    assert not any(".ff." in name for name in touched)


def test_without_photos_there_is_nothing_to_learn(base, bank):
    with pytest.raises(MooringError) as caught:
        finish(start(base, bank, [], QUICK))
    assert caught.value.reason is Reason.SUBJECT_HAS_NO_PHOTOS


def test_a_class_noun_that_does_not_fit_is_refused(base, bank, photos):
    with pytest.raises(MooringError) as caught:
        finish(start(base, bank, photos, QUICK, noun=" ".join(["bird"] * 100)))
    assert caught.value.reason is Reason.PROMPT_TOO_LONG


def test_the_embedding_is_learnt_only_when_asked(base, bank, photos):
    noun = base.word_embeddings("bird")[0].mean(0, keepdim=True)
    learnt = finish(start(base, bank, photos, dataclasses.replace(QUICK, steps=8)))
    fixed = finish(start(base, bank, photos, dataclasses.replace(QUICK, steps=8, learn_embedding=False)))
    assert not torch.equal(learnt.weights.embeddings.tokens["<duck>"][0], noun)
    assert torch.equal(fixed.weights.embeddings.tokens["<duck>"][0], noun)
