"""Passes prepared at start: what they compute, when they are used, and what a start keeps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from engine_helpers import random_adapter
from mooring_server.engine import warm_up as warming
from mooring_server.engine.engine import Engine
from mooring_server.engine.requests import AdapterUse, GenerationRequest, ImageReady
from mooring_server.engine.static_passes import StaticPasses
from mooring_server.engine.ticks import UnetCall, answer
from mooring_server.engine.warm_up import warm_up
from mooring_server.errors import MooringError, Reason

WAIT = 240


class Capture:
    """Stands for a CUDA graph: what is repeated may read nothing but the tensors it was made with."""

    def __init__(self):
        self.runs = 0

    def __call__(self, compute):
        def replay():
            self.runs += 1
            return compute()

        return replay


def point(base, rows, seed=0, side=None):
    generator = torch.Generator().manual_seed(seed)
    side = side or base.native_size // base.vae_scale_factor
    return (
        torch.randn(rows, base.latent_channels, side, side, generator=generator),
        torch.randint(base.num_train_timesteps, (rows,), generator=generator),
        base.encode_prompt(["a duck", "a red car", "a toy robot", "grass"][:rows]),
    )


def plain(base, bank, inputs, mixes):
    with torch.no_grad(), bank.mixed(mixes):
        return base.predict(*inputs)


def check_mixtures(base, bank, passes):
    slots = [bank.acquire(random_adapter(base, seed)) for seed in (1, 2)]
    for seed, mixes in enumerate(
        (
            [[(slots[0], 1.0)], [], [(slots[1], 0.5)]],
            [[], []],
            [[(slots[1], 1.0)], [(slots[1], 2.0)], [(slots[0], 1.0)], [(slots[0], 0.0)]],
            [[(slots[0], 1.0)]],
        )
    ):
        inputs = point(base, len(mixes), seed)
        found = passes.run(*inputs, mixes)
        expected = plain(base, bank, inputs, mixes)
        assert (found - expected).abs().max() < 1e-5
        untouched = plain(base, bank, inputs, [[]] * len(mixes))
        for row, mix in enumerate(mixes):
            acts = any(scale > 0 for _, scale in mix)
            assert bool((found - untouched)[row].abs().max() > 1e-3) == acts


@pytest.mark.parametrize("which", ["base", "base_sdxl"])
def test_a_prepared_pass_serves_every_mixture_and_is_filled_up_with_the_base(which, request, make_bank):
    base, capture = request.getfixturevalue(which), Capture()
    bank = make_bank(base, slots=4, rank=8)
    passes = StaticPasses(base, bank, capture=capture)
    passes.prepare(2)
    passes.prepare(4)
    passes.prepare(4)
    assert passes.row_counts == (2, 4)
    check_mixtures(base, bank, passes)
    assert capture.runs == 4


@pytest.mark.slow
def test_a_compiled_pass_serves_every_mixture_without_compiling_again(base, make_bank):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    bank = make_bank(base, slots=4, rank=8)
    passes = StaticPasses(base, bank, compiler="aot_eager")
    passes.prepare(4)
    check_mixtures(base, bank, passes)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_what_was_not_prepared_is_left_to_others(base, make_bank):
    bank = make_bank(base, slots=4, rank=8)
    passes = StaticPasses(base, bank, capture=Capture())
    assert passes.run(*point(base, 1), [[]]) is None
    passes.prepare(2)
    assert passes.run(*point(base, 3), [[]] * 3) is None
    assert passes.run(*point(base, 2, side=4), [[]] * 2) is None
    slots = [bank.acquire(random_adapter(base, seed)) for seed in (1, 2)]
    both = [[(slots[0], 1.0), (slots[1], 1.0)], []]
    assert passes.run(*point(base, 2), both) is None
    inputs = point(base, 2)
    call = UnetCall(inputs[0], torch.tensor(7), inputs[2], both)
    found = answer(base, bank, [call], prepared=passes)[0]
    assert torch.equal(found, plain(base, bank, (inputs[0], torch.tensor([7, 7]), inputs[2]), both))


def test_a_result_is_not_written_over_by_the_next_pass(base, make_bank):
    bank, outputs = make_bank(base, slots=2, rank=8), []

    def capture(compute):
        outputs.append(torch.empty(2, base.latent_channels, 8, 8))
        return lambda: outputs[-1].copy_(compute())

    passes = StaticPasses(base, bank, capture=capture)
    passes.prepare(2)
    first = passes.run(*point(base, 2, 1), [[]] * 2)
    kept = first.clone()
    passes.run(*point(base, 2, 2), [[]] * 2)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("apart", [False, True])
def test_an_engine_uses_prepared_passes(base, make_bank, apart, monkeypatch):
    bank, capture = make_bank(base, slots=3, rank=8), Capture()
    passes = StaticPasses(base, bank, capture=capture)
    passes.prepare(2)
    engine = Engine(base, bank, threads=1, deterministic=False, prepared=passes)
    stages = []
    base.on_stage = lambda name, seconds: stages.append(name)
    monkeypatch.setattr(engine, "deterministic", apart)  # as on a device: requests apart, not row by row
    try:
        images = []
        for uses in ((), (AdapterUse(random_adapter(base, 1)),)):
            request = GenerationRequest("a duck", adapters=uses, steps=3, guidance_scale=3.0)
            events = []
            engine.generate(request, events.append).result(WAIT)
            images += [event.image for event in events if isinstance(event, ImageReady)]
            assert capture.runs == 3 * len(images)
        assert stages.count("denoise") == 2 * 2 * 3  # ours and, inside the stand-in, the network's
        assert (images[0] != images[1]).any()
        plain_engine = Engine(base, bank, threads=1, deterministic=False)
        events = []
        plain_engine.generate(request, events.append).result(WAIT)
        plain_engine.close()
        assert np.abs(events[-1].image.astype(int) - images[1].astype(int)).max() <= 1
    finally:
        engine.close()
        base.on_stage = None


# ---------------------------------------------------------------------- the start


def start(base, bank, path, **changes):
    options = {"deterministic": True, "max_step_seconds": 60.0, "costs_file": path, **changes}
    return warm_up(base, bank, **options)


def test_a_start_measures_once_and_leaves_the_bank_as_it_was(base, make_bank, tmp_path, monkeypatch):
    bank, path = make_bank(base, slots=2, rank=8), tmp_path / "state" / "costs.json"
    ready = start(base, bank, path)
    assert ready.prepared is None
    assert not bank.arena.any()
    bank.release(bank.reserve())
    assert json.loads(path.read_text())["key"]["base"] == base.digest

    def never(*_args, **_options):
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(warming, "measure", never)
        assert start(base, bank, path).costs.to_json() == ready.costs.to_json()
        for change in ({"deterministic": False}, {"max_step_seconds": 1.0}):
            with pytest.raises(AssertionError, match="measured again"):
                start(base, bank, path, **change)


def test_a_start_prepares_what_the_table_wants(base, make_bank, tmp_path, monkeypatch):
    bank = make_bank(base, slots=2, rank=8)
    monkeypatch.setattr(warming, "cuda_graph", Capture())
    options = {"deterministic": False, "cuda_graphs": True}
    for _ in range(2):  # measured, and from the file
        ready = start(base, bank, tmp_path / "costs.json", **options)
        limit = ready.costs.limit(ready.costs.native)
        assert max(ready.prepared.row_counts) >= limit
        assert 2 in ready.prepared.row_counts


def test_a_configuration_that_cannot_run_is_told_at_the_start(base, make_bank, tmp_path, monkeypatch):
    def broken(*_args, **_options):
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    monkeypatch.setattr(base, "predict", broken)
    with pytest.raises(
        MooringError, match=r"on cpu: No available kernel\. Aborting execution\. Check MOORING_ATTENTION"
    ) as caught:
        start(base, make_bank(base, slots=2, rank=8), tmp_path / "costs.json")
    assert caught.value.reason is Reason.BASE_NOT_USABLE
