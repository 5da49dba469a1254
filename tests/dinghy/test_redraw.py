"""A decoder is trained on what the model itself gets wrong: true pictures whose end is drawn again."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from mooring_server.dinghy import patches, text
from mooring_server.dinghy.device import choose
from mooring_server.dinghy.loop import Plan
from mooring_server.dinghy.preset import SMALL
from mooring_server.dinghy.render import Renderer
from mooring_server.dinghy.sampling import redrawing
from mooring_server.dinghy.t2i import build_scheduler
from mooring_server.dinghy.world import World
from torch import nn


class _Knows(nn.Module):
    """A model that predicts the velocity towards ``target`` exactly."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target, self.alphas, self.asked = target, build_scheduler().alphas_cumprod, []

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, words: torch.Tensor) -> SimpleNamespace:
        self.asked.append((int(t), len(words)))
        a, s = self.alphas[t].sqrt(), (1 - self.alphas[t]).sqrt()
        target = torch.cat([self.target, self.target])
        return SimpleNamespace(sample=a * (noisy - a * target) / s - s * target)


def _pipeline(target: torch.Tensor) -> SimpleNamespace:
    tokenizer = text.build_tokenizer(SMALL)
    return SimpleNamespace(
        unet=_Knows(target), tokenizer=tokenizer, text_encoder=lambda ids: (torch.zeros(len(ids), 20, 256),)
    )


def test_the_end_of_a_picture_is_the_models_own():
    given, wanted = torch.randn(2, 3, 12, 16, 16, generator=torch.Generator().manual_seed(0))
    pipeline = _pipeline(wanted)
    ids = text.tokens(pipeline.tokenizer, ["a photo of a fox"] * 3)
    found = redrawing(pipeline, choose("cpu"))(given, ids, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    times = [t for t, _ in pipeline.unet.asked]
    assert times == sorted(times, reverse=True)
    assert times[0] < 300  # only the end: what is shown stays
    assert {n for _, n in pipeline.unet.asked} == {6}  # with and without the words


def test_a_decoder_sees_half_of_its_pictures_as_the_model_draws_them(sprites, tmp_path, monkeypatch):
    world, renderer = World(SMALL, 2, sprites), Renderer(sprites, 32)
    miss = 3 * torch.randn(12, generator=torch.Generator().manual_seed(3))[None, :, None, None]
    asked, noises = [], []

    def redraw(latents: torch.Tensor, ids: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        asked.append((tuple(latents.shape), tuple(ids.shape)))
        return latents + miss

    def loss(vae, latents, pixels, compute) -> torch.Tensor:
        pca = patches.read_pca(vae)
        noises.append(latents - pca.encode(patches.to_features(pixels, pca.stages)))
        return patches.distance(vae.decoder(latents), pixels)

    monkeypatch.setattr(patches, "decoder_loss", loss)
    codec, plan = patches.fit_codec(world, renderer), Plan(steps=2, batch=4, warmup_steps=1)
    patches.train_decoder(tmp_path, codec, world, renderer, choose("cpu"), plan, redraw)
    assert asked == [((2, 12, 8, 8), (2, 20))] * 2  # with their own captions
    for noise in noises:
        expected = (patches.VAE_STD * miss).expand(2, -1, 8, 8)
        torch.testing.assert_close(noise[:2], expected, atol=1e-4, rtol=1e-4)
        assert float(noise[2:].abs().max()) < 0.5 * patches.VAE_STD
