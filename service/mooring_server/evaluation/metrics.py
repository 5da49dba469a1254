"""Scores as pure functions of judge features: CLIP-T, CLIP-I, DINO, PRES, DIV (method.md section 5).

Every feature row has unit length, so a cosine is a dot product. Each score comes per generated image; a
figure of a whole evaluation is the mean over *prompts* of the per-prompt means, with a bootstrap interval
over prompts, because images of one prompt are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mooring_server.evaluation.design import bootstrap_ratio

HIGHER_IS_BETTER = {
    "clip_t": True,
    "clip_i": True,
    "dino": True,
    "pres": False,
    "div": True,
    "generic_clip_t": True,
    "generic_change": False,
    "drift": False,
}
"""Direction of every figure; figures of the base on the same pictures' seeds carry the prefix `base_`."""


def clip_t(images: Tensor, texts: Tensor) -> Tensor:
    """CLIP-T: cosine of CLIP image features [N,d], each with its own prompt's text feature [N,d]; [N]."""
    return (images * texts).sum(-1)


def photo_similarity(images: Tensor, photos: Tensor) -> Tensor:
    """Mean cosine of each generated image [N,d] with all subject photos [M,d]; [N].

    With CLIP image features this is CLIP-I, with DINO features DINO. With DINO features of samples of the
    bare class prompt it is DreamBooth's PRES (arXiv 2208.12242, section 4.3; lower is better): a model
    whose every dog became the subject scores high.
    """
    return (images @ photos.T).mean(1)


def div(samples: Tensor) -> float | None:
    """Mean pairwise distance 1 - cosine among samples [N,d] of one prompt, higher is better; None below two.

    DreamBooth's DIV uses LPIPS; this one uses the DINO judge's features, as no LPIPS weights ship here:
    compare figures of this DIV with each other only.
    """
    count = len(samples)
    if count < 2:
        return None
    similar = samples @ samples.T
    off_diagonal = similar.sum() - similar.diagonal().sum()
    return float(1 - off_diagonal / (count * (count - 1)))


def same_seed_distance(base: Tensor, adapted: Tensor) -> Tensor:
    """1 - cosine of pairs drawn from the same seed, [N,d] each; [N], 0 when the picture did not change."""
    return 1 - (base * adapted).sum(-1)


def mean_over_prompts(
    scores: Sequence[tuple[str, float]], *, seed: int = 0
) -> tuple[float, float, float] | None:
    """Mean of per-prompt means with its 95 % bootstrap interval over prompts.

    Args:
        scores: (prompt, score) of each image.
        seed: of the resampling.

    Returns:
        (mean, low, high), or None without scores.
    """
    means = per_prompt(scores)
    if not means:
        return None
    values = torch.tensor(list(means.values()), dtype=torch.float64)
    return bootstrap_ratio(values, torch.ones_like(values), torch.arange(len(values)), seed=seed)


def per_prompt(scores: Sequence[tuple[str, float]]) -> Mapping[str, float]:
    """Mean score of each prompt, in order of first appearance."""
    grouped: dict[str, list[float]] = {}
    for prompt, score in scores:
        grouped.setdefault(prompt, []).append(score)
    return {prompt: sum(values) / len(values) for prompt, values in grouped.items()}
