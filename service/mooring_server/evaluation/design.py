"""Where a measurement looks: random numbers by counter, stratified timesteps, prompt order, and its interval.

Pure functions of seeds, so that a probe can be named by a digest and a resumed run measures the same points.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

BOOTSTRAP_RESAMPLES = 2000


def counter_generator(seed: int, *path: object) -> torch.Generator:
    """A CPU generator that depends on the seed and the path only: point 7 is the same however many exist."""
    digest = hashlib.sha256(json.dumps([seed, *map(str, path)]).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def stratified_timesteps(prompts: int, rounds: int, train_timesteps: int, seed: int) -> Tensor:
    """Timesteps [rounds·prompts] for points ordered round by round, prompt by prompt.

    A Latin square: over its `rounds` points every prompt visits each of `rounds` equal bands of [0, T) once,
    and inside one round the prompts share the bands evenly. Within a band the prompts sit in different
    cells, visited in golden-ratio order, so that a short run of consecutive points is spread as well.
    """
    cells = -(-prompts // rounds)
    golden = sorted(range(cells), key=lambda i: (i * 0.6180339887498949) % 1.0)
    order = [golden.index(i) for i in range(cells)]
    jitter = torch.rand(rounds, prompts, generator=counter_generator(seed, "timesteps"), dtype=torch.float64)
    position = torch.empty(rounds, prompts, dtype=torch.float64)
    for round_ in range(rounds):
        for prompt in range(prompts):
            band = (prompt + round_) % rounds
            cell = (order[prompt // rounds] + float(jitter[round_, prompt])) / cells
            position[round_, prompt] = (band + cell) / rounds
    return (position.flatten() * train_timesteps).long().clamp_(0, train_timesteps - 1)


def weighted_ratio(numerator: Tensor, denominator: Tensor, strata: Tensor, weights: Sequence[float]) -> float:
    """Σ_g w_g·mean_g(numerator) / Σ_g w_g·mean_g(denominator) over the strata that are present.

    With weights of its own, a stratum counts the same however many points it happens to have.

    Args:
        numerator: [N] per-point values.
        denominator: [N] per-point values, positive in sum.
        strata: [N] stratum of each point, an index into `weights`.
        weights: of the strata, > 0.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for stratum, weight in enumerate(weights):
        inside = (strata == stratum).to(numerator.device)
        if bool(inside.any()):
            sums[0] += weight * numerator[inside].double().mean().cpu()
            sums[1] += weight * denominator[inside].double().mean().cpu()
    return float(sums[0] / sums[1])


def bootstrap_ratio(
    numerator: Tensor,
    denominator: Tensor,
    clusters: Tensor,
    strata: Tensor | None = None,
    weights: Sequence[float] = (1.0,),
    *,
    resamples: int = BOOTSTRAP_RESAMPLES,
    seed: int = 0,
) -> tuple[float, float, float]:
    """`weighted_ratio` with its 95 % percentile interval: clusters resampled within strata, sums paired.

    Points of one prompt share an image and are not independent, so prompts are what is resampled (Efron and
    Tibshirani, An Introduction to the Bootstrap, ch. 8). With few prompts the interval is too narrow rather
    than too wide: use at least a dozen.

    Args:
        numerator: [N] per-point values.
        denominator: [N] per-point values, positive in sum.
        clusters: [N] integer cluster of each point.
        strata: [N] stratum of each point, an index into `weights`; a cluster lies in one. None: one stratum.
        weights: of the strata.
        resamples: bootstrap replicates.
        seed: of the resampling.

    Returns:
        (ratio, low, high).
    """
    within = torch.zeros_like(clusters) if strata is None else strata
    place = {label: i for i, label in enumerate(dict.fromkeys(clusters.tolist()))}
    index = torch.tensor([place[label] for label in clusters.tolist()])
    # numerator, denominator and number of points of each cluster
    sums = torch.zeros(3, len(place), dtype=torch.float64)
    for row, values in enumerate((numerator, denominator, torch.ones(len(index)))):
        sums[row].index_add_(0, index, values.double().cpu())
    stratum_of = torch.zeros(len(place), dtype=torch.long)
    stratum_of[index] = within.long().cpu()
    generator = counter_generator(seed, "bootstrap")
    replicates = torch.zeros(2, resamples, dtype=torch.float64)
    for stratum, weight in enumerate(weights):
        members = torch.nonzero(stratum_of == stratum)[:, 0]
        if len(members):
            drawn = members[torch.randint(len(members), (resamples, len(members)), generator=generator)]
            picked = sums[:, drawn].sum(2)
            replicates += weight * picked[:2] / picked[2]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = (replicates[0] / replicates[1]).quantile(ends).tolist()
    return weighted_ratio(numerator, denominator, within, weights), low, high


def interleave(generic: Sequence[str], class_: Sequence[str]) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """Both lists without repeats, the shorter spread evenly through the longer.

    Returns:
        (prompts, whether each is a class prompt); a prompt in both lists is a class prompt.
    """
    classes = list(dict.fromkeys(class_))
    generics = [prompt for prompt in dict.fromkeys(generic) if prompt not in classes]
    placed = [
        ((i + 0.5) / len(prompts), is_class, prompt)
        for prompts, is_class in ((generics, False), (classes, True))
        for i, prompt in enumerate(prompts)
    ]
    placed.sort(key=lambda item: item[:2])
    return tuple(prompt for _, _, prompt in placed), tuple(is_class for _, is_class, _ in placed)
