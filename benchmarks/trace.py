"""Requests as they come from many customers: Poisson arrivals, Zipf popularity, mixed sizes and steps.

A trace is drawn once, at one request a second, and stretched to the load that is offered: every system at
every load gets the same requests in the same order. Open loop: a request arrives when its time has come,
whether or not the system has kept up, so a slow system is not spared the load that a fast one gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Arrival:
    """One request for one image.

    Args:
        index: from 0, in order of arrival.
        at: seconds from the start at a load of one request a second.
        adapter: 0 is the most popular one.
        prompt: index into the prompts.
        seed: of the image.
        size: pixels a side.
        steps: denoising steps.
    """

    index: int
    at: float
    adapter: int
    prompt: int
    seed: int
    size: int
    steps: int


def trace(
    count: int,
    *,
    adapters: int,
    sizes: Sequence[int],
    steps: Sequence[int],
    prompts: int,
    exponent: float = 1.0,
    seed: int = 0,
) -> list[Arrival]:
    """Requests in order of arrival.

    Args:
        count: requests.
        adapters: how many there are to choose from; the k-th has a share proportional to 1/k^exponent (Zipf).
        sizes: pixels a side, equally likely.
        steps: denoising steps, equally likely.
        prompts: how many there are to choose from.
        exponent: of Zipf's law; 1 is the usual measure of popularity on the web.
        seed: decides everything.
    """
    draw = np.random.default_rng(seed)
    popularity = 1.0 / np.arange(1, adapters + 1) ** exponent
    times = np.cumsum(draw.exponential(1.0, count))
    chosen = draw.choice(adapters, count, p=popularity / popularity.sum())
    return [
        Arrival(
            index=index,
            at=float(times[index]),
            adapter=int(chosen[index]),
            prompt=int(draw.integers(prompts)),
            seed=int(draw.integers(2**31)),
            size=int(draw.choice(sizes)),
            steps=int(draw.choice(steps)),
        )
        for index in range(count)
    ]
