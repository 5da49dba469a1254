"""The probe on a base whose predictions are known in closed form."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from mooring_server.engine.adapters import LearnedEmbeddings
from mooring_server.engine.base import PromptEmbeds
from mooring_server.errors import MooringError, Reason
from mooring_server.evaluation.base_samples import SampleCache, Sampling
from mooring_server.evaluation.design import counter_generator
from mooring_server.evaluation.probe import DriftFigure, DriftProbe
from running_ticks import finish

GENERIC = [f"a thing number {i}" for i in range(6)]
CLASS = ["a fox", "a fox in the snow"]


class KnownBase:
    """eps = 0.3·x + mean(embedding) and, with an adapter on, + push·scale (or v of the same eps)."""

    native_size, vae_scale_factor, latent_channels, num_train_timesteps = 32, 4, 3, 1000
    digest = "sha256:known"
    prediction_type = "epsilon"

    def __init__(self, *, reacts=True):
        self.alphas_cumprod = torch.linspace(0.999, 0.005, 1000)
        self.push = None
        self.reacts = reacts
        self.calls = []

    def encode_prompt(self, prompts, embeddings=None):
        level = [float(self.reacts) * (1 + len(p) / 10) if p else 0.0 for p in prompts]
        if embeddings is not None:
            level = [9.0 if "<it>" in p else x for p, x in zip(prompts, level, strict=True)]
        return PromptEmbeds(torch.tensor(level).reshape(-1, 1, 1))

    encode_negative = encode_prompt

    def new_scheduler(self, name):
        from diffusers import DDIMScheduler

        return DDIMScheduler(clip_sample=False)

    def add_noise(self, x0, noise, t):
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return a.sqrt() * x0 + (1 - a).sqrt() * noise

    def predict(self, x, t, embeds):
        assert not torch.is_grad_enabled()
        assert t.shape == (len(x),)
        self.calls.append(len(x))
        eps = 0.3 * x + embeds.hidden.mean((1, 2)).view(-1, 1, 1, 1)
        return eps if self.push is None else eps + self.push.view(-1, 1, 1, 1)

    def to_eps(self, prediction, x, t):
        return prediction


class KnownBank:
    """Slot k pushes by k·scale; with text layers, it also moves the encoding of every prompt by as much."""

    def __init__(self, base, *, text=False):
        self.base = base
        self.has_text_layers = text

    @contextmanager
    def mixed(self, mixes, *, counted):
        assert not counted
        plain = self.base.encode_prompt
        ((slot, scale),) = mixes[0]
        assert len(set(map(tuple, mixes))) == 1

        def moved(prompts, embeddings=None):
            assert len(prompts) == len(mixes)
            return PromptEmbeds(plain(prompts, embeddings).hidden + slot * scale)

        if self.has_text_layers:
            self.base.encode_prompt = moved
        try:
            yield
        finally:
            self.base.encode_prompt = plain

    @contextmanager
    def rows(self, slots, scales):
        self.base.push = torch.tensor(
            [s * c for s, c in zip(slots, scales, strict=True)], dtype=torch.float32
        )
        try:
            yield
        finally:
            self.base.push = None


class KnownTrainingSlot:
    def __init__(self, base, push):
        self.base, self.push = base, push

    @contextmanager
    def active(self, scale=1.0):
        self.base.push = torch.tensor(self.push * scale)
        try:
            yield
        finally:
            self.base.push = None


def build(base=None, **options):
    base = base or KnownBase()
    options = {"generic_prompts": GENERIC, "class_prompts": CLASS, "points": 24, "sample_steps": 3} | options
    return finish(DriftProbe.build(base, KnownBank(base), **options))[0]


def test_energy_and_drift_equal_their_formulas():
    probe = build()
    level = torch.tensor([1 + len(p) / 10 for p in probe.prompts])
    assert probe.points == 24
    generic = torch.tensor([p in GENERIC for p in probe.prompts])
    energy = 7 / 8 * level[generic].square().mean() + 1 / 8 * level[~generic].square().mean()
    assert probe.guidance_energy == pytest.approx(float(energy), rel=1e-5)
    result, _ = finish(probe.measure(2, scale=0.5))
    assert result.drift == pytest.approx(1.0 / probe.guidance_energy, rel=1e-5)
    assert result.low < result.drift < result.high
    assert result.figure.generic == pytest.approx(float(1 / level[generic].square().mean()), rel=1e-5)
    assert result.figure.class_ == pytest.approx(float(1 / level[~generic].square().mean()), rel=1e-5)


def test_layers_of_the_text_encoder_count_as_drift():
    base = KnownBase()
    options = {"generic_prompts": GENERIC, "class_prompts": CLASS, "points": 24, "sample_steps": 3}
    probe = finish(DriftProbe.build(base, KnownBank(base, text=True), **options))[0]
    without = finish(build().measure(2, scale=0.5))[0]
    result = finish(probe.measure(2, scale=0.5))[0]
    assert result.drift == pytest.approx(4 * without.drift, rel=1e-5)  # moved twice as far
    assert finish(probe.measure(0))[0].drift == 0.0


def test_class_prompts_count_the_same_however_many_there_are():
    """Prompts of equal length react equally here, so only the mix could tell the two probes apart."""
    few = build(generic_prompts=[f"thing {i:02}" for i in range(24)], class_prompts=CLASS[:1])
    many = build(
        generic_prompts=[f"other {i:02}" for i in range(9)], class_prompts=["a fax", "a fix", "a fex"]
    )
    assert few.guidance_energy == pytest.approx(many.guidance_energy, rel=1e-6)
    drifts = [finish(probe.measure(1))[0] for probe in (few, many)]
    assert drifts[0].drift == pytest.approx(drifts[1].drift, rel=1e-6)
    assert drifts[0].figure.class_ == pytest.approx(drifts[1].figure.class_, rel=1e-6)


def test_a_part_of_the_points_is_weighted_like_the_whole():
    probe = build()
    whole, _ = finish(probe.measure(1))
    for window in (slice(0, 8), slice(8, 24)):
        part, _ = finish(probe.measure(1, subset=window))
        assert whole.over(window) == pytest.approx(part.drift, rel=1e-6)
    generic_only = next(i for i in range(7) if not any(probe.is_class[i : i + 2]))
    part, _ = finish(probe.measure(1, subset=slice(generic_only, generic_only + 2)))
    assert part.drift == pytest.approx(part.figure.generic, rel=1e-6)


def test_kept_samples_save_ticks_and_change_no_bit():
    base, samples = KnownBase(), SampleCache()
    options = {"generic_prompts": GENERIC, "points": 16, "sample_steps": 3, "samples": samples}

    def made(classes):
        return finish(DriftProbe.build(base, KnownBank(base), class_prompts=classes, **options))

    first, all_ticks = made(CLASS)
    again, few_ticks = made(CLASS)
    assert few_ticks < all_ticks
    assert torch.equal(first.noised, again.noised)
    assert first.digest == again.digest
    other, _ = made(["a cat"])
    generic = [i for i, prompt in enumerate(other.prompts) if prompt in GENERIC]
    assert len(generic) == len(GENERIC)
    assert len(samples.kept) == 3, "the generic list was drawn once"
    fresh = finish(
        DriftProbe.build(base, KnownBank(base), class_prompts=["a cat"], **{**options, "samples": None})
    )[0]
    assert torch.equal(other.noised, fresh.noised)


def test_only_the_newest_lists_are_kept():
    base, samples = KnownBase(), SampleCache(largest=2)
    how = Sampling(seed=0, steps=1, guidance=2.0, rows=4)
    for word in ("one", "two", "one", "three"):
        finish(samples.samples(base, KnownBank(base), [word], how, lambda: None))
    assert [key[1] for key in samples.kept] == [("one",), ("three",)]


def test_the_base_itself_has_exactly_no_drift():
    result, _ = finish(build().measure(0))
    assert (result.drift, result.low, result.high) == (0.0, 0.0, 0.0)


def test_a_training_slot_is_measured_like_a_slot():
    base = KnownBase()
    probe = build(base)
    from_bank, _ = finish(probe.measure(3, scale=0.5))
    from_training, _ = finish(probe.measure(KnownTrainingSlot(base, 3.0), scale=0.5))
    assert torch.equal(from_bank.per_point, from_training.per_point)


def test_points_are_noised_samples_of_the_base_by_counter():
    base = KnownBase()
    few, many = build(base, points=8), build(base, points=24)
    assert torch.equal(few.noised[0], build(base, points=8).noised[0])
    assert not torch.equal(few.timesteps, many.timesteps[:8]), "bands follow the number of rounds"
    # the noise of point i and the sample of prompt i stay; only the timestep moves: solve for the sample
    a_few, a_many = (base.alphas_cumprod[p.timesteps[0]] for p in (few, many))
    noise = torch.randn(few.noised.shape[1:], generator=counter_generator(0, "noise", 0))
    x0_few = (few.noised[0] - (1 - a_few).sqrt() * noise) / a_few.sqrt()
    x0_many = (many.noised[0] - (1 - a_many).sqrt() * noise) / a_many.sqrt()
    assert torch.allclose(x0_few, x0_many, atol=1e-3)


def test_windows_cover_all_points_once_and_repeat():
    probe = build()
    windows = [probe.window(k, 8) for k in range(3)]
    assert sorted(i for w in windows for i in range(24)[w]) == list(range(24))
    assert probe.window(3, 8) == windows[0]
    for window in windows:
        assert len(set(probe.prompt_index[window].tolist())) == 8, "every prompt once"
        assert len({int(t) * 3 // 1000 for t in probe.timesteps[window]}) == 3, "every band of time"
    assert range(24)[probe.window(5, 1000)] == range(24)
    whole, _ = finish(probe.measure(1))
    parts = [finish(probe.measure(1, subset=w))[0] for w in windows]
    assert torch.allclose(torch.cat([p.per_point for p in parts]), whole.per_point)


def test_rows_per_tick_bound_the_work_between_yields():
    base = KnownBase()
    progress = []
    _, ticks = finish(
        DriftProbe.build(
            base,
            KnownBank(base),
            generic_prompts=GENERIC,
            class_prompts=CLASS,
            points=24,
            sample_steps=3,
            rows_per_tick=5,
            on_progress=lambda done, total: progress.append((done, total)),
        )
    )
    assert max(base.calls) <= 5
    assert len(base.calls) == ticks
    assert progress[-1] == (ticks, ticks)


def test_the_digest_names_everything_that_decides_the_points():
    digests = [
        build().digest,
        build(seed=1).digest,
        build(points=16).digest,
        build(class_prompts=["a cat"]).digest,
        build(sample_steps=4).digest,
        build(sample_guidance=3.0).digest,
    ]
    other = KnownBase()
    other.digest = "sha256:other"
    digests.append(build(other).digest)
    assert len(set(digests)) == len(digests)
    assert build().digest == digests[0]


def test_prompts_with_a_placeholder_are_measured_with_the_learned_embedding():
    probe = build(class_prompts=["a <it> fox"])
    level = 1 + len("a <it> fox") / 10
    result, _ = finish(probe.measure(0, embeddings=LearnedEmbeddings({"<it>": ()})))
    touched = torch.tensor(["<it>" in p for p in probe.prompts])[result.prompt_index]
    assert torch.allclose(result.per_point[touched], torch.tensor((9.0 - level) ** 2), rtol=1e-4)
    assert not result.per_point[~touched].any()


def test_figure_round_trips_through_json():
    figure = finish(build().measure(1))[0].figure
    assert DriftFigure.from_json(figure.to_json()) == figure


def test_too_few_prompts_a_deaf_base_and_broken_weights_are_refused():
    with pytest.raises(MooringError) as one:
        build(generic_prompts=["a"], class_prompts=["a"])
    assert one.value.reason is Reason.INVALID_FIELD
    with pytest.raises(MooringError) as deaf:
        build(KnownBase(reacts=False))
    assert deaf.value.reason is Reason.BASE_NOT_USABLE
    with pytest.raises(MooringError) as broken:
        finish(build().measure(1, scale=float("nan")))
    assert broken.value.reason is Reason.ADAPTER_NOT_FINITE
