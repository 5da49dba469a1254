"""The codec of dinghy-1: an AutoencoderTiny whose encoder is exactly a PCA of pixel patches.

Its encoder's convolutions can express a linear map exactly (pixels in [0, 1] pass through
unharmed where nothing bends them; each stride-2 convolution moves a 2x2 block into
channels; the last convolution applies the PCA), so the latent space is fixed before any
training and the decoder can be trained beside the text-to-image model.
"""

from __future__ import annotations

import math
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
from .vae import distance
from .world import World, world_samples

LATENT_CHANNELS = 12
STAGES = 2
"""Halvings between pixels and latents."""
VAE_STD = 0.2
"""Root mean square of the VAE's latents: AutoencoderTiny bends its decoder's input by tanh(z/3)*3,
which is straight only for small z. ``scaling_factor`` = 1 / VAE_STD brings the UNet's latents to 1."""
FLATTEN = 0.4
"""Each principal channel is divided by its standard deviation to this power. 0 leaves fine detail
so quiet that the last sampling steps hardly reach it, 1 makes noise as loud as the picture."""
PLAN = Plan(steps=3000, batch=32, muon_lr=0.01, adam_lr=1e-3, average=0.998)


@dataclass
class Pca:
    """Mean ``[d]``, basis ``[k, d]`` (orthonormal rows) and gain ``[k]`` over patch features.

    ``latent = gain * (basis @ (features - mean))``; d = 3·f·f for down-sampling f.
    """

    mean: NDArray[np.float64]
    basis: NDArray[np.float64]
    gain: NDArray[np.float64]

    def encode(self, features: Tensor) -> Tensor:
        """``[B, d, h, w] -> [B, k, h, w]``."""
        weight = torch.as_tensor(self.basis * self.gain[:, None], dtype=features.dtype)
        centred = features - torch.as_tensor(self.mean, dtype=features.dtype)[None, :, None, None]
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


def fit_pca(pixels: Tensor, stages: int, channels: int = LATENT_CHANNELS) -> Pca:
    """Fit on pictures ``[N, 3, H, W]`` in [0, 1]."""
    features = to_features(pixels.double(), stages).permute(0, 2, 3, 1).flatten(0, 2)
    mean = features.mean(0)
    covariance = (features - mean).T @ (features - mean) / (len(features) - 1)
    values, vectors = torch.linalg.eigh(covariance)
    order = values.argsort(descending=True)[:channels]
    basis, std = vectors[:, order].T, values[order].clamp_min(1e-12).sqrt()
    basis = basis * torch.sign(basis.sum(1, keepdim=True))  # eigenvectors have no sign of their own
    gain = std**-FLATTEN
    rms = float(((std * gain) ** 2).mean().sqrt())
    return Pca(mean.numpy(), basis.numpy(), (gain * (VAE_STD / rms)).numpy())


def build_vae(pca: Pca, decoder_blocks: tuple[int, ...] = (3, 2, 1), decoder_width: int = 64) -> Any:
    """An AutoencoderTiny with the PCA in its encoder and an untrained decoder."""
    from diffusers import AutoencoderTiny

    stages = round(math.log(pca.basis.shape[1] / 3, 4))
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
    last = [m for m in vae.encoder.modules() if isinstance(m, nn.Conv2d)][-1]
    weights = last.weight.detach()[:, :, 1, 1].square().sum(1).reciprocal()
    return weights / weights.mean()


# -- training the decoder ----------------------------------------------------------------------


def decoder_loss(vae: Any, pixels: Tensor, noise: Tensor, compute: Compute) -> Tensor:
    """The distance between ``pixels`` ``[B, 3, H, W]`` in [0, 1] and their decoding.

    ``noise`` ``[B, k, h, w]`` is added to the latents: the text-to-image model's are not perfect either.
    """
    with torch.no_grad():
        latents = vae.encoder(pixels * 2 - 1) + noise
    with compute.autocast():
        out: Tensor = vae.decoder(latents)
    return distance(out, pixels)


def train_codec(folder: Path, world: World, renderer: Renderer, compute: Compute, plan: Plan = PLAN) -> Any:
    """Fit the PCA and train (or go on training) the decoder in ``folder``; returns the codec, averaged."""
    torch.manual_seed(2)
    first = [
        renderer.draw(lay_out([world.sample(10_000_000 + 50 * k + i) for i in range(50)])) for k in range(60)
    ]
    vae = build_vae(fit_pca(torch.cat(first).cpu(), STAGES)).to(compute.device)
    optimisers = Optimisers([vae.decoder], [], plan.muon_lr, plan.adam_lr)
    loop = Loop(folder, {"vae": vae}, optimisers, plan)
    size = plan.batch

    def loss(step: int, batch: Batch) -> Tensor:
        pixels = renderer.draw(batch.layout)
        rng = torch.Generator(compute.device).manual_seed(step)
        # Half of the pictures get noise of up to a tenth of the latents' size.
        level = (torch.rand(size, 1, 1, 1, generator=rng, device=compute.device) * 2 - 1).clamp_min(0)
        shape = (size, LATENT_CHANNELS, pixels.shape[2] // 2**STAGES, pixels.shape[3] // 2**STAGES)
        noise = torch.randn(shape, generator=rng, device=compute.device)
        return decoder_loss(vae, pixels, 0.1 * VAE_STD * level * noise, compute)

    loop.run(batches(world_samples(world, size), loop.step, compute.workers), loss)
    loop.use_average()
    return vae.eval()
