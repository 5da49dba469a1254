"""Photos of held-out subjects, and the plain LoRA that the base is tried with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mooring_server import dinghy
from mooring_server.dinghy import personalise, subjects
from mooring_server.dinghy.classifier import Classifier
from mooring_server.dinghy.device import choose
from mooring_server.dinghy.figures import Bench, load_base
from mooring_server.dinghy.preset import SHIPPED
from mooring_server.dinghy.render import Renderer
from mooring_server.dinghy.sources import Sprites
from mooring_server.dinghy.world import World


@pytest.fixture(scope="module")
def renderer(sprites):
    return Renderer(sprites, 32)


@pytest.fixture(scope="module")
def bench(sprites):
    return Bench(World(SHIPPED, 6, sprites), Renderer(sprites, SHIPPED.px), Classifier(), choose("cpu"))


def _in_noto_too(sprites: Sprites) -> Sprites:
    """The stand-in artwork with a second drawing of every held-out subject, all black."""
    held = sprites.where("held")
    pixels = sprites.pixels[held].copy()
    pixels[..., :3] = 0
    columns = {
        name: [*getattr(sprites, name), *(getattr(sprites, name)[i] for i in held)]
        for name in ("noun", "hyper", "style", "code", "role")
    }
    columns["style"][-len(held) :] = ["noto"] * len(held)
    return Sprites(np.concatenate([sprites.pixels, pixels]), **columns)


def test_every_style_has_the_same_poses_and_scenes(sprites):
    both = _in_noto_too(sprites)
    renderer = Renderer(both, 32)
    plain = subjects.photos("duck", both, renderer)
    black = subjects.photos("duck", both, renderer, "noto")
    assert plain.shape == black.shape == (subjects.PHOTOS, 32, 32, 3)
    corner = np.s_[:, :3, :3]
    assert np.array_equal(plain[corner], black[corner])
    assert (black[:, 14:18, 14:18] < 40).all()
    assert not np.array_equal(plain, black)


def test_a_style_without_the_subject_is_refused(sprites, renderer):
    with pytest.raises(ValueError, match="no duck in the style 'noto'"):
        subjects.photos("duck", sprites, renderer, "noto")


def test_a_lora_learns_and_leaves_the_shipped_base_alone(bench):
    before = load_base(bench.compute, SHIPPED)
    duck = personalise.subject("duck")
    photos = personalise.photos_of(duck, bench)
    assert photos.shape == (subjects.PHOTOS, SHIPPED.px, SHIPPED.px, 3)
    (_, adapted), *_ = list(personalise.train_lora(duck, photos, bench, moments=[2]))
    trained = dict(adapted.unet.named_parameters())
    factors = [value for name, value in trained.items() if ".lora_B." in name]
    assert factors
    assert all(bool(value.any()) for value in factors)
    for name, value in before.unet.named_parameters():
        kept = trained.get(name)
        if kept is None:
            kept = trained[name.rsplit(".", 1)[0] + ".base_layer." + name.rsplit(".", 1)[1]]
        assert torch.equal(value, kept), name
    assert duck.placeholder in adapted.tokenizer.get_vocab()
    assert duck in dinghy.held_out_subjects()
