"""A grown set draws what the small one drew: old words, old channels, and zero for what is new."""

from __future__ import annotations

import copy

import pytest
import torch
import typer
from mooring_server.dinghy import grow, judges, patches, sources, text
from mooring_server.dinghy.preset import GROWN, LARGE, SMALL
from mooring_server.dinghy.recipe import Recipe
from mooring_server.dinghy.t2i import build_unet
from torch import nn


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An exported base of half the side and fewer words, untrained."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    build_unet(SMALL).save_pretrained(folder / "unet")
    encoder = text.build_text_encoder(text.build_tokenizer(SMALL))
    encoder.save_pretrained(folder / "text_encoder")
    pca = patches.fit_pca(_pictures(SMALL.px), 2, patches.COARSE)
    patches.build_vae(pca).save_pretrained(folder / "vae")
    return folder


def _pictures(px: int) -> torch.Tensor:
    coarse = torch.rand(30, 3, px // 8, px // 8, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, size=px, mode="bicubic").clamp(0, 1)


@torch.no_grad()
def test_the_unet_draws_the_old_channels_and_leaves_the_new_at_zero(small):
    old, new = grow.load_unet(small), grow.unet(small, GROWN)
    latents = torch.randn(2, GROWN.channels, 16, 16, generator=torch.Generator().manual_seed(0))
    words = torch.randn(2, 20, 256, generator=torch.Generator().manual_seed(1))
    found = new(latents, torch.tensor(500), words).sample
    assert torch.equal(
        found[:, : SMALL.channels], old(latents[:, : SMALL.channels], torch.tensor(500), words).sample
    )
    assert not found[:, SMALL.channels :].any()


@torch.no_grad()
def test_old_prompts_read_as_before_and_plurals_as_their_singulars(small):
    old, new = text.load_text_encoder(small), grow.text_encoder(small, GROWN)
    tokenizer = text.build_tokenizer(GROWN)
    ids = text.tokens(tokenizer, ["a photo of a red fox in the snow"])
    assert torch.equal(new(ids)[0], old(ids)[0])
    table = new.get_input_embeddings().weight
    one, many = (tokenizer(w, add_special_tokens=False)["input_ids"] for w in ("penguin", "penguins"))
    assert len(many) == 1
    assert many[0] >= old.config.vocab_size
    assert torch.equal(table[many[0]], table[one].mean(0))


@torch.no_grad()
def test_the_judge_reads_old_captions_as_before_and_plurals_as_their_singulars(tmp_path):
    torch.manual_seed(0)
    old = judges.build_clip(SMALL).eval()
    old.save_pretrained(tmp_path)
    new, tokenizer = grow.clip(tmp_path, GROWN).eval(), text.build_tokenizer(GROWN)
    ids = text.tokens(tokenizer, ["a photo of a red fox in the snow", "a photo of a penguin on the beach"])
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for found, expected in zip(
        judges.clip_features(new, ids, pixels), judges.clip_features(old, ids, pixels), strict=True
    ):
        assert torch.equal(found, expected)
    many = text.tokens(tokenizer, ["a photo of a penguins on the beach"])
    assert not torch.equal(many, ids[1:])
    assert torch.equal(
        judges.clip_features(new, many, pixels)[0], judges.clip_features(new, ids[1:], pixels)[0]
    )


@torch.no_grad()
def test_the_codec_keeps_the_latents_of_the_halved_picture(small):
    pixels = _pictures(GROWN.px)
    old, new = grow.codec.load(small), grow.vae(small, GROWN, pixels)
    latents = new.encode(pixels * 2 - 1).latents
    assert latents.shape == (30, GROWN.channels, 16, 16)
    halved = nn.functional.avg_pool2d(pixels, 2)
    expected = old.encode(halved * 2 - 1).latents
    torch.testing.assert_close(latents[:, : SMALL.channels], expected, atol=1e-4, rtol=1e-4)
    # the new channels do not reach the decoder yet
    changed = latents.clone()
    changed[:, SMALL.channels :] = 0
    assert torch.equal(new.decode(latents).sample, new.decode(changed).sample)
    assert new.decode(latents).sample.shape == pixels.shape


def test_what_does_not_fit_is_refused():
    model = nn.Linear(3, 2)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="weight"):
        grow.widen({"weight": torch.zeros(2, 4), "bias": state["bias"]}, model)
    with pytest.raises(ValueError, match="bias: nothing"):
        grow.widen({"weight": state["weight"]}, model)
    assert torch.equal(model.weight, state["weight"])


@pytest.mark.parametrize(
    ("preset", "small"), [(GROWN, "dinghy-2"), (GROWN, "dinghy-9"), (SMALL, "dinghy-1"), (LARGE, "dinghy-1")]
)
def test_only_what_fits_grows(sprites, monkeypatch, preset, small):
    monkeypatch.setattr(sources, "load_sprites", lambda: sprites)
    with pytest.raises(typer.BadParameter, match="does not grow from"):
        Recipe(preset, "cpu").grow(small)


def test_only_a_committed_codec_of_patches_trains_its_decoder_alone(sprites, monkeypatch):
    monkeypatch.setattr(sources, "load_sprites", lambda: sprites)
    with pytest.raises(typer.BadParameter, match="dinghy-2 has no committed codec"):
        Recipe(LARGE, "cpu").decoder()
