"""For `benchmarks.kernels`: networks as layer shapes, other ways to the same penalty, PEFT's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mooring_kernels.arena import ArenaLayout, LayerShape
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """Adapted layers of a network.

    Args:
        name: as printed.
        layers: (out, in, count, tokens of one image at the network's own size).
    """

    name: str
    layers: tuple[tuple[int, int, int, int], ...]

    def layout(self, rank: int, divide: int = 1) -> ArenaLayout:
        """All layers (or every `divide`-th) in one arena."""
        shapes = [
            LayerShape(f"{out}x{in_}.{i}", out, in_)
            for out, in_, count, _ in self.layers
            for i in range(max(1, count // divide))
        ]
        return ArenaLayout(shapes, rank)


# attention of the transformer blocks: q, k, v, out on the image's tokens; k, v of cross attention on 77
SD15 = Network(
    "SD1.5",
    (
        (320, 320, 30, 4096),
        (320, 768, 10, 77),
        (640, 640, 30, 1024),
        (640, 768, 10, 77),
        (1280, 1280, 36, 256),
        (1280, 768, 12, 77),
    ),
)
SDXL = Network(
    "SDXL",
    ((640, 640, 60, 4096), (640, 2048, 20, 77), (1280, 1280, 360, 1024), (1280, 2048, 120, 77)),
)
FLUX = Network("FLUX", ((3072, 3072, 266, 4608),))


def random_factors(
    layout: ArenaLayout, device: str, *, slots: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`[slots, size]` of random factors with ‖ΔW‖ around 1; slot 0 is zero when there are several."""
    flat = torch.zeros(slots, layout.size, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    for group in layout.groups:
        for factor, width in zip(group.views(flat), (group.in_, group.rank), strict=True):
            noise = torch.randn(factor.shape, generator=generator, device=device)
            factor.copy_(noise / width**0.5)
    if slots > 1:
        flat[0].zero_()
    return flat


# ---------------------------------------------------------------------- the penalty, otherwise


def _leaves(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B as parameters of their own, as PyTorch users hold them: no gradient is padded to the buffer."""
    a, b = pair
    return a.detach().requires_grad_(), b.detach().requires_grad_()


def matrix_norm_loop(layout: ArenaLayout, flat: Tensor) -> Callable[[], Tensor]:
    """σ² by `torch.linalg.matrix_norm(ord=2)` of every dense ΔW, autograd."""

    def run() -> Tensor:
        pairs = [_leaves(pair) for pair in layout.views(flat).values()]
        total = sum(torch.linalg.matrix_norm(b @ a, ord=2) ** 2 for a, b in pairs)
        assert isinstance(total, Tensor)
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach()

    return run


def gram_eigvalsh(layout: ArenaLayout, flat: Tensor) -> Callable[[], Tensor]:
    """λ_max of G_B^½·G_A·G_B^½ (by Cholesky) with batched `eigvalsh`, a batch for each shape, autograd."""

    def run() -> Tensor:
        total = torch.zeros((), device=flat.device)
        for group in layout.groups:
            a, b = _leaves(group.views(flat))
            gram_b = b.mT @ b
            scale = gram_b.detach().diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
            root = torch.linalg.cholesky(gram_b + 1e-6 * scale * torch.eye(group.rank, device=flat.device))
            total = total + torch.linalg.eigvalsh(root.mT @ (a @ a.mT) @ root)[:, -1].sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach()

    return run


def power_iteration(layout: ArenaLayout, flat: Tensor, *, batched: bool) -> Callable[[], Tensor]:
    """One warm-started step v ← ΔWᵀu, u ← ΔWv (SN-GAN), then autograd of (uᵀΔWv)².

    Args:
        layout: of `flat`.
        flat: `[size]`.
        batched: a batch for each shape; else a loop over layers, as the usual spectral norm runs.
    """
    groups = [group.views(flat) for group in layout.groups]
    if not batched:
        groups = [(a[None], b[None]) for a, b in layout.views(flat).values()]
    us = [F.normalize(torch.randn(*b.shape[:2], 1, device=flat.device), dim=1) for _, b in groups]

    def run() -> Tensor:
        total = torch.zeros((), device=flat.device)
        for i, pair in enumerate(groups):
            a, b = _leaves(pair)
            with torch.no_grad():
                v = F.normalize(a.mT @ (b.mT @ us[i]), dim=1)
                us[i] = F.normalize(b @ (a @ v), dim=1)
            total = total + (us[i].mT @ (b @ (a @ v))).square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach()

    return run


# ---------------------------------------------------------------------- layers


class Stack(nn.Module):
    """Layers of one shape that all read the same input; what they give is dropped."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """The last layer's output."""
        out = x
        for layer in self.layers:
            out = layer(x)
        return out


def linears(out: int, in_: int, count: int, device: str, dtype: torch.dtype) -> list[nn.Linear]:
    """Frozen random layers."""
    made = [nn.Linear(in_, out, device=device, dtype=dtype) for _ in range(count)]
    for layer in made:
        layer.requires_grad_(False)
    return made


def peft_stack(layers: Sequence[nn.Linear], rank: int, adapters: int) -> nn.Module:
    """The same layers under PEFT with `adapters` random adapters "a0", "a1" …, in eval mode."""
    import peft

    def config() -> peft.LoraConfig:
        return peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules=[f"layers.{i}" for i in range(len(layers))]
        )

    model = peft.get_peft_model(Stack(layers), config(), adapter_name="a0")
    for index in range(1, adapters):
        model.add_adapter(f"a{index}", config())
    dtype = layers[0].weight.dtype
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=dtype) / rank**0.5
    model.set_adapter("a0")
    model.eval()
    model.requires_grad_(False)
    return model
