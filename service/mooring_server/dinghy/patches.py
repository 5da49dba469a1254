"""The codec: an AutoencoderTiny whose encoder is exactly a PCA of pixel patches.

Its encoder's convolutions can express a linear map exactly (pixels in [0, 1] pass through
unharmed where nothing bends them; each stride-2 convolution moves a 2x2 block into
channels; the last convolution applies the PCA), so the latent space is fixed before any
training and the decoder can be trained beside the text-to-image model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .device import Compute
from .loop import Batch, Loop, Optimisers, Plan, batches
from .render import Renderer, lay_out
from .world import World, world_samples

DECODER_BLOCKS = (3, 2, 1, 0)
"""Residual blocks at each size of the decoder: one at full size would cost as much as all others."""
VAE_STD = 0.2
"""Root mean square of the VAE's latents: AutoencoderTiny bends its decoder's input by tanh(z/3)*3,
which is straight only for small z. ``scaling_factor`` = 1 / VAE_STD brings the UNet's latents to 1."""
FLATTEN = 0.4
"""Each principal channel is divided by its standard deviation to this power. 0 leaves fine detail
so quiet that the last sampling steps hardly reach it, 1 makes noise as loud as the picture."""
PLAN = Plan(steps=3000, batch=64, cpu_batch=8, muon_lr=0.01, adam_lr=1e-3, average=0.998)
Redraw = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""What a text-to-image model makes of latents ``[B, k, h, w]`` of token ids ``[B, 20]``: the same shape."""


@dataclass
class Pca:
    """Mean ``[d]``, basis ``[k, d]`` (orthonormal rows) and gain ``[k]`` over patch features.

    ``latent = gain * (basis @ (features - mean))``; d = 3·f·f for down-sampling f.
    """

    mean: NDArray[np.float64]
    basis: NDArray[np.float64]
    gain: NDArray[np.float64]

    @property
    def stages(self) -> int:
        """Halvings between pixels and latents."""
        return round(math.log(self.basis.shape[1] / 3, 4))

    def encode(self, features: Tensor) -> Tensor:
        """``[B, d, h, w] -> [B, k, h, w]``."""
        like: dict[str, Any] = {"dtype": features.dtype, "device": features.device}
        weight = torch.as_tensor(self.basis * self.gain[:, None], **like)
        centred = features - torch.as_tensor(self.mean, **like)[None, :, None, None]
        return torch.einsum("kd,bdhw->bkhw", weight, centred)

    def decode(self, latents: Tensor) -> Tensor:
        """The linear inverse: ``[B, k, h, w] -> [B, d, h, w]``."""
        weight = torch.as_tensor(self.basis / self.gain[:, None], dtype=latents.dtype)
        features = torch.einsum("kd,bkhw->bdhw", weight, latents)
        return features + torch.as_tensor(self.mean, dtype=latents.dtype)[None, :, None, None]


def _depth_kernel(channels_in: int, width: int) -> Tensor:
    """Weights ``[width, width, 3, 3]`` of a stride-2 convolution that moves 2x2 pixels into channels."""
    weight = torch.zeros(width, width, 3, 3)
    for c in range(channels_in):
        for dy in range(2):
            for dx in range(2):
                # padding 1: the kernel's centre lies on pixel (2i, 2j)
                weight[c * 4 + dy * 2 + dx, c, 1 + dy, 1 + dx] = 1
    return weight


def to_features(pixels: Tensor, stages: int) -> Tensor:
    """Pixels in [0, 1], ``[B, 3, H, W] -> [B, 3·4^s, H/2^s, W/2^s]``, in the encoder's channel order."""
    for _ in range(stages):
        pixels = nn.functional.pixel_unshuffle(pixels, 2)
    return pixels


def from_features(features: Tensor, stages: int) -> Tensor:
    """Inverse of :func:`to_features`."""
    for _ in range(stages):
        features = nn.functional.pixel_shuffle(features, 2)
    return features


def fit_pca(pixels: Tensor, stages: int, channels: int) -> Pca:
    """Fit on pictures ``[N, 3, H, W]`` in [0, 1]."""
    features = to_features(pixels.double(), stages).permute(0, 2, 3, 1).flatten(0, 2)
    mean = features.mean(0)
    centred = features - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(centred) - 1))
    order = values.argsort(descending=True)[:channels]
    basis = vectors[:, order].T
    basis = basis * torch.sign(basis.sum(1, keepdim=True))  # eigenvectors have no sign of their own
    std = (centred @ basis.T).std(0).clamp_min(1e-6)
    gain = std**-FLATTEN
    gain = gain * (VAE_STD / (std * gain).square().mean().sqrt())
    return Pca(mean.numpy(), basis.numpy(), gain.numpy())


def read_pca(vae: Any) -> Pca:
    """The PCA in the encoder of ``vae``; its mean is known in the span of the basis only."""
    last = [m for m in vae.encoder.modules() if isinstance(m, nn.Conv2d)][-1]
    matrix = last.weight.detach()[:, :, 1, 1].double().cpu()
    gain = matrix.norm(dim=1)
    basis = matrix / gain[:, None]
    assert last.bias is not None
    mean = -(basis.T @ (last.bias.detach().double().cpu() / gain))
    return Pca(mean.numpy(), basis.numpy(), gain.numpy())


def build_vae(pca: Pca, decoder_blocks: tuple[int, ...] = DECODER_BLOCKS, decoder_width: int = 64) -> Any:
    """An AutoencoderTiny with the PCA in its encoder and an untrained decoder.

    ``decoder_blocks`` are its residual blocks at each size, of which it has one more than the PCA has stages.
    """
    from diffusers import AutoencoderTiny

    stages = pca.stages
    decoder_blocks = decoder_blocks[: stages + 1]
    width = 3 * 4**stages
    kind: Any = AutoencoderTiny  # diffusers ships no types
    vae = kind(
        encoder_block_out_channels=(width,) * (stages + 1),
        decoder_block_out_channels=(decoder_width,) * (stages + 1),
        latent_channels=pca.basis.shape[0],
        num_encoder_blocks=(0,) * (stages + 1),
        num_decoder_blocks=decoder_blocks,
        scaling_factor=1 / VAE_STD,
        force_upcast=False,
    )
    convolutions = [m for m in vae.encoder.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        for conv in convolutions:
            conv.weight.zero_()
            if conv.bias is not None:
                conv.bias.zero_()
        for c in range(3):
            convolutions[0].weight[c, c, 1, 1] = 1
        for stage in range(stages):
            convolutions[1 + stage].weight.copy_(_depth_kernel(3 * 4**stage, width))
        matrix = torch.as_tensor(pca.basis * pca.gain[:, None])
        convolutions[-1].weight[:, :, 1, 1] = matrix.float()
        bias = convolutions[-1].bias
        assert bias is not None
        bias.copy_(-(matrix @ torch.as_tensor(pca.mean)).float())
    vae.encoder.requires_grad_(requires_grad=False)
    return vae


def channel_weights(vae: Any) -> Tensor:
    """Squared error in pixels per squared error in each channel of the latents, ``[k]``, mean one.

    The PCA's basis is orthonormal: a channel's error counts by the square of what ``FLATTEN`` divided it by.
    """
    gain = torch.as_tensor(read_pca(vae).gain, dtype=torch.float32, device=vae.device)
    weights = gain.square().reciprocal()
    return weights / weights.mean()


# -- training the decoder ----------------------------------------------------------------------


def distance(out: Tensor, pixels: Tensor) -> Tensor:
    """L1 + L1 of both gradients + 2·MSE between a decoding in -1..1 and ``pixels`` in [0, 1]."""
    difference = (out.float() + 1) / 2 - pixels
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return difference.abs().mean() + edges + 2 * difference.square().mean()


def decoder_loss(vae: Any, latents: Tensor, pixels: Tensor, compute: Compute) -> Tensor:
    """The distance between ``pixels`` ``[B, 3, H, W]`` in [0, 1] and the decoding of ``[B, k, h, w]``."""
    with compute.autocast():
        out: Tensor = vae.decoder(latents)
    return distance(out, pixels)


def fitting_pictures(world: World, renderer: Renderer, count: int = 3000) -> Tensor:
    """Pictures ``[count, 3, px, px]`` in [0, 1] that the PCA is fitted on."""
    first = [
        renderer.draw(lay_out([world.sample(10_000_000 + 50 * k + i) for i in range(50)])).cpu()
        for k in range(count // 50)
    ]
    return torch.cat(first)


def fit_codec(world: World, renderer: Renderer) -> Any:
    """The codec of the world's preset, its decoder untrained."""
    torch.manual_seed(2)
    preset = world.preset
    return build_vae(fit_pca(fitting_pictures(world, renderer), preset.halvings, preset.channels))


def train_decoder(
    folder: Path, vae: Any, world: World, renderer: Renderer, compute: Compute, plan: Plan, redraw: Redraw
) -> tuple[Any, Loop]:
    """Train (or go on training) the decoder of ``vae`` in ``folder``; returns the codec, averaged, and loop.

    Half of the pictures are decoded from latents that went through ``redraw``: the text-to-image model's own
    latents miss where an outline runs within a cell, and a decoder that has only seen perfect ones draws
    every miss as a notch.
    """
    vae.encoder.requires_grad_(requires_grad=False)
    pca = read_pca(vae)  # as the encoder's convolutions hold it
    vae.to(compute.device).train()
    optimisers = Optimisers([vae.decoder], [], plan.muon_lr, plan.adam_lr)
    loop = Loop(folder, {"vae": vae}, optimisers, plan)
    size = plan.batch

    def loss(step: int, batch: Batch) -> Tensor:
        pixels = renderer.draw(batch.layout)
        rng = torch.Generator(compute.device).manual_seed(step)
        latents = pca.encode(to_features(pixels, pca.stages))
        # Half of the other latents get noise of up to a tenth of their size.
        level = (torch.rand(size, 1, 1, 1, generator=rng, device=compute.device) * 2 - 1).clamp_min(0)
        noise = torch.randn(latents.shape, generator=rng, device=compute.device)
        noisy = latents + 0.1 * VAE_STD * level * noise
        half = (size + 1) // 2
        ids = batch.ids[:half].to(compute.device)
        noisy[:half] = VAE_STD * redraw(latents[:half] / VAE_STD, ids, rng)
        return decoder_loss(vae, noisy, pixels, compute)

    samples = world_samples(world, size)
    loop.run(batches(samples, loop.step, compute.workers, preset=world.preset), loss)
    loop.use_average()
    return vae.eval(), loop
