"""The bank: nothing changes in the base, rows do not touch each other, slots are kept and given back."""

from __future__ import annotations

import pytest
import torch
from engine_helpers import random_adapter
from mooring_server.engine.adapters import AdapterWeights, LayerFactors, adaptable_layers
from mooring_server.errors import MooringError, Reason


@pytest.fixture
def point(base):
    """A batch of three rows: latents, timesteps, prompts."""
    generator = torch.Generator().manual_seed(0)
    embeds = base.encode_prompt(["a duck", "a red car", "a toy robot on grass"])
    return torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([900, 500, 20]), embeds


def test_zero_slots_are_the_base_bit_for_bit(base, make_bank, point):
    untouched = base.predict(*point)
    bank = make_bank(base)
    bank.load(1, random_adapter(base, 1))
    with bank.rows([0, 0, 0], [1.0, 1.0, 1.0]):
        assert torch.equal(base.predict(*point), untouched)
    with bank.rows([1, 1, 1], [0.0, 0.0, 0.0]):
        assert torch.equal(base.predict(*point), untouched)
    assert torch.equal(base.predict(*point), untouched)


def test_an_adapter_is_w_plus_b_a(base, bank, point):
    """Against the same network with ΔW = scale·B·A added to its weights."""
    adapter = random_adapter(base, 1)
    bank.load(1, adapter)
    with bank.rows([1, 1, 1], [0.7] * 3):
        found = base.predict(*point)
    layers = adaptable_layers(base)
    saved = {name: layers[name].weight.detach().clone() for name in adapter.layers}
    with torch.no_grad():
        for name, factors in adapter.layers.items():
            layers[name].weight += 0.7 * factors.B @ factors.A
        expected = base.predict(*point)
        for name, weight in saved.items():
            layers[name].weight.copy_(weight)
    assert not torch.allclose(found, base.predict(*point), atol=1e-2)
    assert torch.allclose(found, expected, atol=1e-4)


def test_each_adapter_changes_its_own_row_and_no_other(base, bank, point):
    untouched = base.predict(*point)
    for slot in (1, 2):
        bank.load(slot, random_adapter(base, slot))

    def predict(*slots):
        with bank.rows(slots, [1.0] * 3):
            return base.predict(*point)

    mixed = predict(1, 0, 2)
    assert torch.equal(mixed[1].view(torch.int32), untouched[1].view(torch.int32))  # zeros keep their sign
    assert not torch.allclose(mixed[0], untouched[0], atol=1e-2)
    assert not torch.allclose(mixed[2], untouched[2], atol=1e-2)
    # a row's bits do not depend on what the other rows carry
    assert torch.equal(predict(1, 2, 0)[0], mixed[0])
    assert torch.equal(predict(0, 1, 2)[2], mixed[2])
    # nor on whether all rows share the slot (broadcast) or not (gathered)
    assert torch.equal(predict(1, 1, 1)[0], mixed[0])


def test_scales_are_per_row(base, bank, point):
    bank.load(1, random_adapter(base, 1))
    with bank.rows([1, 1, 1], [1.0, 0.0, 0.5]):
        found = base.predict(*point)
    assert torch.equal(found[1], base.predict(*point)[1])
    halved = random_adapter(base, 1)
    halved = AdapterWeights(
        base.digest, 4, {name: LayerFactors(f.A, f.B * 0.5) for name, f in halved.layers.items()}
    )
    bank.load(2, halved)
    with bank.rows([2, 2, 2], [1.0] * 3):
        assert torch.allclose(base.predict(*point)[2], found[2], atol=1e-5)


def test_padding_to_the_banks_rank_changes_nothing(base, make_bank, point):
    adapter = random_adapter(base, 1, rank=3)
    results = []
    for rank in (3, 8):
        bank = make_bank(base, slots=2, rank=rank)
        bank.load(1, adapter)
        with bank.rows([1] * 3, [1.0] * 3):
            results.append(base.predict(*point))
        bank.close()
    assert torch.allclose(*results, atol=1e-5)


def test_adapters_may_cover_some_layers_only(base, make_bank, point):
    bank = make_bank(base, targets="attention+ff")
    adapter = random_adapter(base, 1, targets="attention+ff")
    name = next(name for name in adapter.layers if name.endswith("ff.net.2"))
    bank.load(1, AdapterWeights(base.digest, 4, {name: adapter.layers[name]}))
    with bank.rows([1, 0, 0], [1.0] * 3):
        found = base.predict(*point)
    untouched = base.predict(*point)
    assert not torch.allclose(found[0], untouched[0])
    assert torch.equal(found[1:], untouched[1:])


def test_a_wrong_number_of_rows_is_an_error(base, bank, point):
    bank.load(1, random_adapter(base, 1))
    with bank.rows([1, 1], [1.0, 1.0]), pytest.raises(AssertionError, match="2 rows, the batch has 3"):
        base.predict(*point)
    base.predict(*point)  # and nothing stays active


def test_the_zero_slot_cannot_be_written(base, bank):
    with pytest.raises(ValueError, match="slot 0"):
        bank.load(0, random_adapter(base, 1))
    with pytest.raises(ValueError, match="slot 4"):
        bank.unload(4)
    assert not bank.arena[0].any()


def test_slots_are_shared_by_digest_and_evicted_by_age(base, bank):
    adapters = [random_adapter(base, seed) for seed in range(5)]
    first, second, third = (bank.acquire(adapter) for adapter in adapters[:3])
    assert len({first, second, third, 0}) == 4
    assert bank.acquire(adapters[0]) == first
    with pytest.raises(MooringError, match="All 3 adapter slots") as caught:
        bank.acquire(adapters[3])
    assert caught.value.reason is Reason.QUEUE_FULL
    bank.release(second)
    bank.release(third)
    assert bank.acquire(adapters[1]) == second  # still resident, now most recently used
    bank.release(second)
    assert bank.acquire(adapters[3]) == third
    bank.release(first)
    with pytest.raises(MooringError):  # first is still pinned once, and so is third
        [bank.acquire(adapters[4]), bank.reserve()]


def test_a_reserved_slot_is_empty_and_pinned(base, bank):
    slot = bank.acquire(random_adapter(base, 1))
    bank.release(slot)
    reserved = [bank.reserve() for _ in range(3)]
    assert not bank.arena[1:].any()
    assert bank.try_acquire(random_adapter(base, 1)) is None
    for place in reserved:
        bank.release(place)
    assert bank.try_acquire(random_adapter(base, 1)) is not None


@pytest.mark.parametrize(
    ("change", "reason", "says"),
    [
        ({"base_digest": "sha256:other"}, Reason.BASE_DIGEST_MISMATCH, "sha256:other"),
        ({"rank": 9}, Reason.ADAPTER_RANK_TOO_LARGE, "rank 9; this server's slots hold rank 8"),
        ({"layers": {"unet.nowhere": None}}, Reason.ADAPTER_KEYS_UNMATCHED, "unet.nowhere"),
        ({"layers": "nan"}, Reason.ADAPTER_NOT_FINITE, "NaN"),
        ({"layers": "wide"}, Reason.ADAPTER_KEYS_UNMATCHED, "this base needs"),
        ({"layers": "deep"}, Reason.ADAPTER_RANK_TOO_LARGE, "rank 9"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_slot_kept(base, bank, change, reason, says):
    good = random_adapter(base, 1)
    bank.load(1, good)
    before = bank.arena.clone()
    bad = random_adapter(base, 2)
    layers = dict(bad.layers)
    name, factors = next(iter(layers.items()))
    if change.get("layers") == "nan":
        layers[name] = LayerFactors(factors.A, factors.B.clone().fill_(float("nan")))
        change = {"layers": layers}
    elif change.get("layers") == "wide":
        layers[name] = LayerFactors(torch.zeros(4, 3), factors.B)
        change = {"layers": layers}
    elif change.get("layers") == "deep":
        layers[name] = LayerFactors(torch.zeros(9, factors.A.shape[1]), torch.zeros(factors.B.shape[0], 9))
        change = {"layers": layers}
    fields = {"base_digest": bad.base_digest, "rank": bad.rank, "layers": bad.layers, **change}
    with pytest.raises(MooringError, match=says) as caught:
        bank.load(1, AdapterWeights(**fields))
    assert caught.value.reason is reason
    assert torch.equal(bank.arena, before)
    assert bank.acquire(good) == 1


# ---------------------------------------------------------------------- training


def test_a_fresh_training_slot_changes_nothing_until_it_learns(base, bank, point):
    training = bank.training_slot(seed=5, rank=4)
    untouched = base.predict(*point)
    with training.active():
        assert torch.equal(base.predict(*point), untouched)
    other = bank.training_slot(seed=5, rank=4)
    assert torch.equal(training.flat, other.flat)
    assert not torch.equal(training.flat, bank.training_slot(seed=6, rank=4).flat)
    std = torch.cat([A.detach()[:4].flatten() for A, _ in training.params.values()]).std()
    assert abs(float(std) - 1 / 4) < 0.02


def test_training_happens_in_the_arenas_own_memory(base, bank, point):
    before = base.fingerprint()
    training = bank.training_slot(seed=1, rank=4)
    latents, timesteps, embeds = point
    goal = base.predict(*point).detach() + 0.3
    optimiser = torch.optim.Adam([torch.nn.Parameter(training.flat)], lr=1e-2)
    optimiser.param_groups[0]["params"][0].grad = training.flat_grad
    losses = []
    for _ in range(12):
        training.flat_grad.zero_()
        with training.active():
            loss = (base.predict(latents, timesteps, embeds) - goal).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    with training.active():
        trained = base.predict(*point).detach()
    with bank.rows([training.slot] * 3, [1.0] * 3):
        assert torch.allclose(base.predict(*point), trained, atol=1e-5)
    # padding of rank 4 in a rank-8 bank stayed zero in both factors
    assert all(not A[4:].any() and not B[:, 4:].any() for A, B in training.params.values())
    weights = training.weights({"method": "none"})
    assert weights.rank == 4
    training.close()
    assert not bank.arena[training.slot].any()
    slot = bank.acquire(weights)
    with bank.rows([slot] * 3, [1.0] * 3):
        assert torch.allclose(base.predict(*point), trained, atol=1e-5)
    assert base.fingerprint() == before


def test_gradients_are_those_of_the_factors(base, bank, point):
    training = bank.training_slot(weights=random_adapter(base, 3, rank=8, size=0.1))
    with training.active(0.5):
        base.predict(*point).square().mean().backward()
    name, (A, B) = next(iter(training.params.items()))
    index = (0, 0)
    epsilon = 1e-2
    numeric = []
    for sign in (1, -1):
        with torch.no_grad():
            B[index] += sign * epsilon
            with training.active(0.5):
                numeric.append(float(base.predict(*point).double().square().mean()))
            B[index] -= sign * epsilon
    expected = (numeric[0] - numeric[1]) / (2 * epsilon)
    assert float(training.layout.views(training.flat_grad)[name][1][index]) == pytest.approx(
        expected, rel=0.05, abs=1e-5
    )
    assert A.grad.data_ptr() == training.layout.views(training.flat_grad)[name][0].data_ptr()


def test_training_some_layers_of_a_larger_bank(base, make_bank, point):
    bank = make_bank(base, targets="attention+ff", rank=8)
    training = bank.training_slot(seed=1, rank=4, targets="attention")
    assert set(training.params) == set(adaptable_layers(base, "attention"))
    views = training.layout.views(training.flat)
    assert all(not A.any() and not B.any() for name, (A, B) in views.items() if name not in training.params)
    with training.active():
        base.predict(*point).square().mean().backward()
    assert set(training.weights().layers) == set(training.params)
    narrow = make_bank(base)
    with pytest.raises(ValueError, match="adapts “attention” only"):
        narrow.training_slot(targets="attention+ff")


def test_training_goes_on_from_weights_exactly(base, bank):
    training = bank.training_slot(seed=2, rank=4)
    with torch.no_grad():
        for _, B in training.params.values():
            B[:, :4] += 0.25
    saved, flat = training.weights(), training.flat.clone()
    training.close()
    resumed = bank.training_slot(weights=saved)
    assert torch.equal(resumed.flat, flat)
    assert resumed.weights().digest == saved.digest


def test_trained_nan_is_refused(base, bank):
    training = bank.training_slot(seed=2)
    training.flat[3] = float("inf")
    with pytest.raises(MooringError) as caught:
        training.weights()
    assert caught.value.reason is Reason.ADAPTER_NOT_FINITE


def test_a_training_slot_is_no_adapter_that_others_could_get(base, bank):
    weights = random_adapter(base, 1)
    training = bank.training_slot(weights=weights)
    assert bank.acquire(weights) != training.slot


def test_several_adapters_of_a_row_add_up(base, bank, point):
    bank.load(1, random_adapter(base, 1))
    bank.load(2, random_adapter(base, 2))
    latents, timesteps, embeds = point
    rows = len(latents)
    with torch.no_grad(), bank.mixed([[(1, 1.0), (2, 0.5)], [(2, 1.0)], []]):
        mixed = base.predict(latents, timesteps, embeds)
    both = bank.factors.items()
    # one adapter of twice the rank whose factors lie side by side is the sum, up to the order of additions
    stacked = AdapterWeights(
        base.digest,
        8,
        {
            name: LayerFactors(
                torch.cat([A[1][:4], A[2][:4]]).clone(),
                torch.cat([B[1][:, :4], B[2][:, :4] * 0.5], 1).clone(),
            )
            for name, (A, B) in both
        },
    )
    bank.load(3, stacked)
    with torch.no_grad(), bank.rows([3] * rows, [1.0] * rows):
        summed = base.predict(latents, timesteps, embeds)
    with torch.no_grad(), bank.rows([2] * rows, [1.0] * rows):
        second = base.predict(latents, timesteps, embeds)
    untouched = base.predict(latents, timesteps, embeds)
    assert torch.allclose(mixed[0], summed[0], atol=1e-5)
    assert not torch.allclose(mixed[0], second[0], atol=1e-3)
    assert torch.equal(mixed[1], second[1])  # a neighbour with two adapters changes nothing
    assert torch.equal(mixed[2], untouched[2])
