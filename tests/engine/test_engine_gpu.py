"""The engine on a CUDA device: deterministic mode, and passes captured as CUDA graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_helpers import random_adapter
from mooring_server.engine.base import load_base
from mooring_server.engine.engine import Engine
from mooring_server.engine.requests import AdapterUse, GenerationRequest, ImageReady
from mooring_server.engine.warm_up import warm_up

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

WAIT = 240


def draw(engine, requests):
    """Images of requests that are submitted together."""
    events = [[] for _ in requests]
    handles = [engine.generate(r, log.append) for r, log in zip(requests, events, strict=True)]
    for handle in handles:
        handle.result(WAIT)
    return [[e.image for e in log if isinstance(e, ImageReady)] for log in events]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("which", ["tiny_sd15", "tiny_sdxl"])
def test_deterministic_mode_keeps_bits_and_graphs_keep_images(which, graphs, request, make_bank, tmp_path):
    base = load_base(request.getfixturevalue(which), device="cuda")
    bank = make_bank(base, slots=5, rank=8)
    requests = [
        GenerationRequest(
            "a duck",
            adapters=(AdapterUse(random_adapter(base, seed)),) if seed else (),
            steps=4,
            guidance_scale=3.0 if seed < 3 else 1.0,
            seed=seed,
            count=1 + seed % 2,
        )
        for seed in range(4)
    ]
    ready = warm_up(
        base,
        bank,
        deterministic=True,
        cuda_graphs=graphs,
        max_step_seconds=1.0,
        costs_file=tmp_path / "costs.json",
    )
    engine = Engine(base, bank, costs=ready.costs, deterministic=True, prepared=ready.prepared)
    try:
        alone = [draw(engine, [one])[0] for one in requests]
        together = draw(engine, requests)
    finally:
        engine.close()
    for mine, theirs in zip(alone, together, strict=True):
        assert all((a == b).all() for a, b in zip(mine, theirs, strict=True))
    plain = Engine(base, bank, deterministic=False)
    try:
        batched = draw(plain, requests)
    finally:
        plain.close()
    for mine, theirs in zip(alone, batched, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert np.abs(a.astype(int) - b.astype(int)).mean() < 1.0
