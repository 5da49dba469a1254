"""The picture codec: an AutoencoderTiny whose encoder is exactly a PCA of pixel patches.

Its encoder's convolutions can express a linear map exactly (pixels in [0, 1] pass through
unharmed where nothing bends them; each stride-2 convolution moves a 2x2 block into
channels; the last convolution applies the PCA), so the latent space is fixed before any
training and the decoder can be trained beside the text-to-image model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from .loop import Loop
    from .world import World

LATENT_CHANNELS = 12
VAE_STD = 0.2
"""Root mean square of the VAE's latents: AutoencoderTiny bends its decoder's input by tanh(z/3)*3,
which is straight only for small z. ``scaling_factor`` = 1 / VAE_STD brings the UNet's latents to 1."""
FLATTEN = 0.4
"""Each principal channel is divided by its standard deviation to this power. 0 leaves fine detail
so quiet that the last sampling steps hardly reach it, 1 makes noise as loud as the picture."""


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


def save_pca(pca: Pca, path: Path) -> None:
    """Write the PCA as ``.npz``, by a temporary name."""
    part = path.with_suffix(".part.npz")
    np.savez(part, mean=pca.mean, basis=pca.basis, gain=pca.gain)
    part.rename(path)


def load_pca(path: Path) -> Pca:
    """Read what :func:`save_pca` wrote."""
    data = np.load(path)
    return Pca(data["mean"], data["basis"], data["gain"])


# -- training the decoder ----------------------------------------------------------------------


def decoder_loss(vae: Any, pixels: Tensor, noise: Tensor) -> Tensor:
    """L1 + L1 of both gradients + 2·MSE between ``pixels`` ``[B, 3, H, W]`` in [0, 1] and their decoding.

    ``noise`` ``[B, k, h, w]`` is added to the latents: the text-to-image model's are not perfect either.
    """
    with torch.no_grad():
        latents = vae.encoder(pixels * 2 - 1) + noise
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out: Tensor = vae.decoder(latents)
    difference = (out.float() + 1) / 2 - pixels
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return difference.abs().mean() + edges + 2 * difference.square().mean()


def _decoder_loop(minutes: float, batch: int, world: World) -> tuple[Any, Loop]:
    from .loop import Loop, Optimisers, Plan
    from .sources import cache_dir
    from .t2i import world_pca

    torch.manual_seed(2)
    vae = build_vae(world_pca(world, cache_dir()))
    plan = Plan(minutes=minutes, muon_lr=0.01, adam_lr=1e-3)
    optimisers = Optimisers([vae.decoder], [], plan.muon_lr, plan.adam_lr)
    return vae, Loop(cache_dir() / "vae", {"vae": vae}, optimisers, plan, batch)


def load_codec() -> Any:
    """The codec of the cache's last checkpoint, averaged weights, in eval mode."""
    from .world import World

    vae, loop = _decoder_loop(1.0, 32, World(seed=2))
    loop.use_average()
    return vae.eval()


def train_decoder(minutes: float, call_minutes: float | None = None, batch: int = 32, px: int = 64) -> Any:
    """Train (or go on training) the decoder in ``<cache>/vae`` and return the codec with averaged weights."""
    from .world import World

    world = World(px=px, seed=2)
    vae, loop = _decoder_loop(minutes, batch, world)

    def loss(step: int) -> Tensor:
        images = np.stack([world.sample(step * batch + i).image for i in range(batch)])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        generator = torch.Generator().manual_seed(step)
        # Half of the pictures get noise of up to a tenth of the latents' size.
        level = (torch.rand(batch, 1, 1, 1, generator=generator) * 2 - 1).clamp_min(0) * 0.1 * VAE_STD
        shape = (batch, LATENT_CHANNELS, pixels.shape[2] // 4, pixels.shape[3] // 4)
        return decoder_loss(vae, pixels, level * torch.randn(shape, generator=generator))

    loop.run(loss, minutes=call_minutes)
    loop.use_average()
    return vae.eval()


@torch.no_grad()
def psnr(vae: Any, pixels: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of decode(encode(pixels)), pixels ``[N, 3, H, W]`` in [0, 1]."""
    out = torch.cat([vae.decode(vae.encode(p * 2 - 1).latents).sample for p in torch.split(pixels, 32)])
    error = ((out.clamp(-1, 1) + 1) / 2 - pixels).square().mean()
    return float(-10 * torch.log10(error))
