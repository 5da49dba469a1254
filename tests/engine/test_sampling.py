"""Images are those of the diffusers pipelines, and depend on their own request only."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from engine_helpers import drain, random_adapter
from mooring_server.engine.base import SAMPLERS
from mooring_server.engine.sampling import SampleRow, draw, sample
from mooring_server.engine.ticks import by_itself

PROMPTS = ["a photo of a duck on the beach", "a red car in snow"]
SEEDS = [3, 4]
TOLERANCE = 1e-5
"""On latents; measured 0 but for a last-bit difference where the pipeline decodes two images at once."""


def pipeline_latents(kind, base, root, sampler, guidance, negative):
    options = {} if kind is StableDiffusionXLPipeline else {"safety_checker": None}
    pipeline = kind.from_pretrained(root, **options)
    pipeline.scheduler = base.new_scheduler(sampler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        negative_prompt=negative,
        num_inference_steps=6,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
    ).images


def our_latents(base, bank, monkeypatch, sampler, guidance, negative):
    seen = []
    decode = base.decode
    monkeypatch.setattr(base, "decode", lambda latents: (seen.append(latents), decode(latents))[1])
    rows = [
        SampleRow(prompt, "" if negative is None else negative[index], seed=SEEDS[index])
        for index, prompt in enumerate(PROMPTS)
    ]
    drain(sample(base, bank, rows, steps=6, guidance_scale=guidance, sampler=sampler))
    return torch.cat(seen)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("which", "root", "kind"),
    [
        ("base", "tiny_sd15", StableDiffusionPipeline),
        ("base_v", "tiny_sd_v", StableDiffusionPipeline),
        ("base_sdxl", "tiny_sdxl", StableDiffusionXLPipeline),
    ],
)
def test_latents_equal_the_pipelines(which, root, kind, sampler, request, make_bank, monkeypatch):
    base, root = request.getfixturevalue(which), request.getfixturevalue(root)
    bank = make_bank(base)
    for guidance, negative in ((4.0, None), (4.0, ["blue", "grass"]), (1.0, None)):
        expected = pipeline_latents(kind, base, root, sampler, guidance, negative)
        found = our_latents(base, bank, monkeypatch, sampler, guidance, negative)
        monkeypatch.undo()
        assert (found - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max()))


def test_images_equal_the_pipelines(base, tiny_sd15, bank):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    for index, prompt in enumerate(PROMPTS):
        expected = pipeline(
            prompt,
            num_inference_steps=6,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(index),
            output_type="np",
        ).images
        found = drain(sample(base, bank, [SampleRow(prompt, seed=index)], steps=6, guidance_scale=4.0))
        assert (found - torch.from_numpy(expected * 255).round()).abs().max() == 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_request_gives_the_same_bits(base, bank, sampler):
    rows = [SampleRow("a duck", mix=[(bank.acquire(random_adapter(base, 1)), 1.0)], seed=7)]
    first = drain(sample(base, bank, rows, steps=4, guidance_scale=3.0, sampler=sampler))
    again = drain(sample(base, bank, rows, steps=4, guidance_scale=3.0, sampler=sampler))
    assert torch.equal(first, again)


def test_interleaved_requests_give_the_bits_of_undisturbed_ones(base, bank):
    def request(seed, slot):
        rows = [SampleRow("a red duck", mix=[(slot, 1.0)], seed=seed)]
        return sample(base, bank, rows, steps=4, guidance_scale=3.0)

    slots = [0, *(bank.acquire(random_adapter(base, seed)) for seed in (1, 2))]
    alone = [drain(request(seed, slot)) for seed, slot in enumerate(slots)]
    running = {seed: request(seed, slot) for seed, slot in enumerate(slots)}
    found = {}
    while running:
        for seed, generator in list(running.items()):
            try:
                next(generator)
            except StopIteration as stop:
                found[seed] = stop.value
                del running[seed]
    assert all(torch.equal(found[seed], image) for seed, image in enumerate(alone))
    assert not torch.equal(alone[0], alone[1])


def test_noise_depends_on_the_seed_only(base, bank):
    rows = [SampleRow("a duck", seed=5), SampleRow("a duck", seed=6), SampleRow("a duck", seed=5)]
    images = drain(sample(base, bank, rows, steps=3, guidance_scale=3.0))
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])
    alone = drain(sample(base, bank, rows[1:2], steps=3, guidance_scale=3.0))
    assert (alone[0].int() - images[1].int()).abs().max() <= 1  # other batch size, other summation order


def test_steps_are_reported_with_previews_that_converge(base_v, make_bank):
    seen = []
    rows = [SampleRow("a duck", seed=index) for index in range(3)]
    bank = make_bank(base_v)

    def on_step(step, clean):
        seen.append((step, clean))
        yield from ()

    steps = draw(base_v, bank, rows, steps=4, guidance_scale=3.0, batch=2, on_step=on_step)
    images = drain(by_itself(base_v, bank, steps))
    assert [step for step, _ in seen] == list(range(1, 9))
    assert [clean.shape[0] for _, clean in seen] == [2] * 4 + [1] * 4
    final = base_v.decode(seen[3][1])
    assert (final.int() - images[:2].int()).abs().float().mean() < 2.0
    assert images.shape == (3, 32, 32, 3)


def test_sizes_other_than_the_native_one(base, bank):
    image = drain(sample(base, bank, [SampleRow("a duck")], steps=2, guidance_scale=3.0, height=24, width=40))
    assert image.shape == (1, 24, 40, 3)


def test_no_tick_leaves_grad_mode_or_an_adapter_behind(base, bank):
    slot = bank.acquire(random_adapter(base, 1))
    embeds = base.encode_prompt(["a duck"])
    latents = torch.ones(1, 4, 8, 8)
    untouched = base.predict(latents, torch.tensor(10), embeds)
    for _ in sample(base, bank, [SampleRow("a duck", mix=[(slot, 1.0)])], steps=3, guidance_scale=3.0):
        assert torch.is_grad_enabled()
        assert torch.equal(base.predict(latents, torch.tensor(10), embeds), untouched)
