"""The mixed-adapter linear against its float64 reference, and its promises about bits and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mooring_kernels.arena import ArenaLayout, LayerShape
from mooring_kernels.multi_lora import multi_lora_, multi_lora_shared_, stacked
from mooring_kernels.multi_lora.reference import reference, reference_gradients

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}
SLOTS = 5


def arena(out=12, in_=10, rank=3, *, slots=SLOTS, layers=2, seed=0, dtype=torch.float32):
    """An arena with a zero slot 0, and views of its second layer: offsets and strides as in use."""
    layout = ArenaLayout([LayerShape(f"l{i}", out, in_) for i in range(layers)], rank)
    flat = torch.full((slots, layout.size), float("nan"), dtype=dtype)  # nothing outside a view may be read
    generator = torch.Generator().manual_seed(seed)
    for a, b in layout.views(flat).values():
        a.copy_(torch.randn(a.shape, generator=generator) / in_**0.5)
        b.copy_(torch.randn(b.shape, generator=generator) / rank**0.5)
        a[0], b[0] = 0.0, 0.0
    return layout, flat


def close(found, expected, dtype, summed=None):
    """Within the rounding of ``dtype``, as a share of the largest value; of ``summed`` where terms cancel."""
    found, expected = found.detach(), expected.detach()
    scale = (expected.abs() if summed is None else summed.detach()).max().clamp_min(1.0)
    return float((found.double() - expected).abs().max() / scale) <= TOLERANCE[dtype]


def bits(t):
    return t.view({4: torch.int32, 2: torch.int16}[t.element_size()])


@st.composite
def cases(draw):
    rows = draw(st.integers(1, 6))
    return {
        "slots": draw(st.lists(st.integers(0, SLOTS - 1), min_size=rows, max_size=rows)),
        "scales": draw(st.lists(st.sampled_from([0.0, 1.0, 0.5, -2.0]), min_size=rows, max_size=rows)),
        "tokens": draw(st.sampled_from([None, 1, 7, 33])),
        "in_": draw(st.sampled_from([1, 10, 63])),
        "out": draw(st.sampled_from([1, 12, 65])),
        "rank": draw(st.integers(1, 9)),
        "dtype": draw(st.sampled_from(list(TOLERANCE))),
        "factor_dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "seed": draw(st.integers(0, 9)),
    }


CANCELLING = {
    "slots": [0, 0, 0, 0, 4, 0], "scales": [0.0, 0.0, 0.0, 0.0, 1.0, 0.0], "tokens": None, "in_": 1,
    "out": 65, "rank": 3, "dtype": torch.bfloat16, "factor_dtype": torch.float32, "seed": 1,
}  # fmt: skip
"""Terms of 9.2 and -7.4 sum to 1.6: their rounding in bfloat16 is 5 % of it."""


@given(cases())
@example(CANCELLING)
@settings(max_examples=150, deadline=None)
def test_forward_and_gradients_are_the_references(case):
    layout, flat = arena(
        case["out"], case["in_"], case["rank"], seed=case["seed"], dtype=case["factor_dtype"]
    )
    dtype, rows = case["dtype"], len(case["slots"])
    A, B = (t.requires_grad_() for t in layout.views(flat)["l1"])
    generator = torch.Generator().manual_seed(case["seed"])
    middle = () if case["tokens"] is None else (case["tokens"],)
    x = torch.randn(rows, *middle, case["in_"], generator=generator).to(dtype).requires_grad_()
    plain = torch.randn(rows, *middle, case["out"], generator=generator).to(dtype)
    slots, scales = torch.tensor(case["slots"]), torch.tensor(case["scales"])
    found = multi_lora_(plain.clone(), x, A, B, slots, scales)
    grad = torch.randn(found.shape, generator=generator).to(dtype)
    grads = torch.autograd.grad(found, (x, A, B), grad)

    worst = max(dtype, case["factor_dtype"], key=TOLERANCE.__getitem__)
    values = plain, grad, x.detach(), A.detach(), B.detach()
    exact = _exact(values, case["slots"], case["scales"])
    # what is rounded are the terms, which may be many times their sum
    summed = _exact([value.abs() for value in values], case["slots"], [abs(c) for c in case["scales"]])
    assert close(found, exact[0], dtype, summed[0])
    for ours, wanted, size in zip(grads, exact[1:], summed[1:], strict=True):
        assert close(ours, wanted, worst, size)


def _exact(values, slots, scales):
    """Output and the three gradients in float64."""
    plain, grad, x, A, B = values
    return reference(plain, x, A, B, slots, scales), *reference_gradients(grad, x, A, B, slots, scales)


@pytest.mark.parametrize("slots", [[1, 1, 1], [3, 0, 2], [2, 4, 2], 3])
@pytest.mark.parametrize("tokens", [None, 4])
def test_gradcheck(slots, tokens):
    layout, flat = arena(dtype=torch.float64)
    A, B = (t.clone().requires_grad_() for t in layout.views(flat)["l0"])
    generator = torch.Generator().manual_seed(1)
    shape = (3,) if tokens is None else (3, tokens)
    x = torch.randn(*shape, 10, generator=generator, dtype=torch.float64, requires_grad=True)
    plain = torch.randn(*shape, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    if isinstance(slots, int):
        chosen, scales = slots, 0.7
    else:
        chosen, scales = torch.tensor(slots), torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)

    def run(plain, x, A, B):
        return multi_lora_(plain.clone(), x, A, B, chosen, scales)

    assert torch.autograd.gradcheck(run, (plain, x, A, B))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_rows_of_slot_zero_keep_the_bases_bits(slots, dtype):
    """Also the sign of zeros, for which `torch.equal` has no eyes, and with gradients recorded."""
    layout, flat = arena(64, 64, 8)
    A, B = layout.views(flat)["l1"]
    plain = torch.randn(len(slots), 16, 64).to(dtype)
    plain[..., ::3] = -0.0
    plain[..., 1::7] = 0.0
    x = -torch.rand(len(slots), 16, 64).to(dtype)
    for recorded in (False, True):
        x.requires_grad_(recorded)
        found = multi_lora_(plain.clone(), x, A, B, torch.tensor(slots), torch.ones(len(slots))).detach()
        for row, slot in enumerate(slots):
            assert torch.equal(bits(found[row]), bits(plain[row])) == (slot == 0)


def test_a_rows_bits_do_not_depend_on_the_other_rows():
    layout, flat = arena(48, 40, 8)
    A, B = layout.views(flat)["l1"]
    x, plain = torch.randn(1, 9, 40).expand(4, -1, -1), torch.randn(1, 9, 48).expand(4, -1, -1)
    results = [
        multi_lora_(plain.clone(), x, A, B, torch.tensor(slots), torch.tensor([0.5, 1.0, 1.0, 2.0]))[0]
        for slots in ([3, 3, 3, 3], [3, 0, 1, 2], [3, 1, 4, 0])
    ]
    assert all(torch.equal(bits(result), bits(results[0])) for result in results)


def test_infinite_rows_stay_alone():
    layout, flat = arena()
    A, B = layout.views(flat)["l0"]
    x, plain = torch.randn(3, 4, 10), torch.randn(3, 4, 12)
    slots, scales = torch.tensor([1, 2, 0]), torch.ones(3)
    clean = multi_lora_(plain.clone(), x, A, B, slots, scales)
    broken = x.clone()
    broken[1] = float("inf")
    broken[2] = float("nan")
    found = multi_lora_(plain.clone(), broken, A, B, slots, scales)
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[2], plain[2])
    assert not torch.isfinite(found[1]).all()


def test_gradients_sum_into_their_slots_of_the_flat_gradient():
    """Twice, so the second backward adds; and nothing but the layer's own elements is written."""
    layout, flat = arena()
    A, B = (t.requires_grad_() for t in layout.views(flat)["l1"])
    flat_grad = torch.zeros(SLOTS, layout.size)
    sums = layout.views(flat_grad)["l1"]
    x, plain, grad = torch.randn(5, 6, 10), torch.randn(5, 6, 12), torch.randn(5, 6, 12)
    slots, scales = [1, 2, 1, 0, 1], [1.0, 0.5, 2.0, 1.0, -1.0]
    for _ in range(2):
        found = multi_lora_(plain.clone(), x, A, B, torch.tensor(slots), torch.tensor(scales), grads=sums)
        found.backward(grad)
    _, exact_A, exact_B = reference_gradients(grad, x, A.detach(), B.detach(), slots, scales)
    assert A.grad is None
    assert B.grad is None
    assert close(sums[0], 2 * exact_A, torch.float32)
    assert close(sums[1], 2 * exact_B, torch.float32)
    assert not flat_grad[[0, 3, 4]].any()
    for t in sums:
        t.zero_()
    assert not flat_grad.any()


def test_one_slot_for_all_rows_is_a_plain_lora():
    layout, flat = arena()
    A, B = (t.requires_grad_() for t in layout.views(flat)["l1"])
    x = torch.randn(3, 6, 10, requires_grad=True)
    plain, grad = torch.randn(3, 6, 12), torch.randn(3, 6, 12)
    expected = plain + 0.5 * F.linear(F.linear(x, A[2]), B[2])
    exact = torch.autograd.grad(expected, (x, A, B), grad)
    with torch.no_grad():
        assert torch.allclose(multi_lora_(plain.clone(), x, A, B, 2, 0.5), expected, atol=1e-6)
    found = multi_lora_(plain.clone(), x, A, B, 2, 0.5)
    assert torch.allclose(found, expected, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(found, (x, A, B), grad), exact, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    alone = [t[2:3].detach().clone().requires_grad_() for t in (A, B)]  # and a bank of one slot
    found = torch.autograd.grad(multi_lora_(plain.clone(), x, *alone, 0, 0.5), alone, grad)
    for ours, theirs in zip(found, exact[1:], strict=True):
        assert torch.allclose(ours[0], theirs[2], atol=1e-5)


@pytest.mark.parametrize("slots", [torch.tensor([1, 3, 0]), 2])
def test_layers_of_one_input_share_the_first_product(slots):
    layout, flat = arena(layers=4)
    names = ["l1", "l2", "l3"]
    A = stacked(layout, flat, names).requires_grad_()
    assert A.data_ptr() == layout.views(flat)["l1"][0].data_ptr()
    Bs = [layout.views(flat)[name][1].requires_grad_() for name in names]
    x = torch.randn(3, 5, 10, requires_grad=True)
    plain = [torch.randn(3, 5, 12) for _ in names]
    scales = None if isinstance(slots, int) else torch.tensor([1.0, 0.5, 2.0])
    together = multi_lora_shared_([t.clone() for t in plain], x, A, Bs, slots, scales)
    alone = [
        multi_lora_(t.clone(), x, A[:, i], B, slots, scales)
        for i, (t, B) in enumerate(zip(plain, Bs, strict=True))
    ]
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    weights = [torch.randn_like(t) for t in plain]
    found, expected = (
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(outs, weights, strict=True)), (x, A, *Bs))
        for outs in (together, alone)
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_an_output_that_the_loss_does_not_use_costs_no_gradient():
    layout, flat = arena(layers=2)
    A = stacked(layout, flat, ["l0", "l1"]).requires_grad_()
    Bs = [layout.views(flat)[name][1].requires_grad_() for name in ("l0", "l1")]
    x = torch.randn(2, 5, 10, requires_grad=True)
    outs = multi_lora_shared_([torch.randn(2, 5, 12) for _ in Bs], x, A, Bs, torch.tensor([1, 2]))
    grad_x, grad_A, grad_B = torch.autograd.grad(outs[0].sum(), (x, A, Bs[0]))
    assert grad_x.any()
    assert grad_B.any()
    assert not grad_A[:, 1].any()


def test_one_slot_takes_no_sums():
    layout, flat = arena()
    A, B = (t.requires_grad_() for t in layout.views(flat)["l0"])
    with pytest.raises(ValueError, match="tensor of slots"):
        multi_lora_(torch.zeros(2, 3, 12), torch.zeros(2, 3, 10), A, B, 1, grads=(A, B))


def test_known_base_rows_need_no_search():
    layout, flat = arena()
    A, B = layout.views(flat)["l0"]
    x, plain, slots = torch.randn(3, 4, 10), torch.randn(3, 4, 12), torch.tensor([1, 0, 2])
    found = multi_lora_(plain.clone(), x, A, B, slots)
    assert torch.equal(multi_lora_(plain.clone(), x, A, B, slots, base_rows=torch.tensor([1])), found)
    # the caller's word is taken: with rows 0 and 1 named, only row 2 is changed
    fewer = multi_lora_(plain.clone(), x, A, B, slots, base_rows=torch.tensor([0, 1]))
    assert torch.equal(fewer[:2], plain[:2])
    assert torch.equal(fewer[2], found[2])


def test_only_neighbours_can_be_stacked():
    layout, flat = arena(layers=4)
    with pytest.raises(ValueError, match="l0, l2"):
        stacked(layout, flat, ["l0", "l2"])


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"slots": torch.tensor([1])}, ValueError, "x has 2 rows, slots \\[1\\]"),
        ({"scales": torch.ones(3)}, ValueError, "scales \\[3\\]"),
        ({"scales": 0.5}, TypeError, "tensor \\[N\\]"),
        ({"slots": 1}, TypeError, "a number"),
        ({"slots": 1, "scales": None, "grads": (torch.zeros(1),) * 2}, ValueError, "do not require grad"),
        ({"x": torch.zeros(2, 3, 9)}, ValueError, "does not fit x"),
        ({"x": torch.zeros(2, 3, 4, 10)}, ValueError, "x must be"),
        ({"output": torch.zeros(2, 3, 11)}, ValueError, "does not fit output"),
        ({"grads": (torch.zeros(1), torch.zeros(1))}, ValueError, "do not require grad"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, says):
    layout, flat = arena()
    A, B = layout.views(flat)["l0"]
    given = {
        "output": torch.zeros(2, 3, 12),
        "x": torch.zeros(2, 3, 10),
        "A": A,
        "B": B,
        "slots": torch.tensor([1, 2]),
        "scales": torch.ones(2),
        **change,
    }
    with pytest.raises(error, match=says):
        multi_lora_(**given)


@pytest.mark.parametrize("compiler", ["graph", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_keeps_one_graph_for_every_mixture(compiler):
    layout, flat = arena(64, 48, 8)
    A, B = layout.views(flat)["l1"]
    weight = torch.randn(64, 48)
    seen = []

    def backend(graph, _inputs):
        seen.append(graph)
        return graph

    def layer(x, slots, scales):
        return multi_lora_(F.linear(x, weight), x, A, B, slots, scales)

    compiled = torch.compile(layer, fullgraph=True, backend=backend if compiler == "graph" else "inductor")
    with torch.no_grad():
        for slots in ([1, 2, 3], [0, 4, 4], [0, 0, 0]):
            x = torch.randn(3, 16, 48)
            found = compiled(x, torch.tensor(slots), torch.tensor([1.0, 0.5, 2.0]))
            exact = reference(F.linear(x, weight), x, A, B, slots, [1.0, 0.5, 2.0])
            assert close(found, exact, torch.float32)
    assert len(seen) == (compiler == "graph")


def test_torch_compile_trains():
    layout, flat = arena(64, 48, 8)
    A, B = (t.clone().requires_grad_() for t in layout.views(flat)["l1"])
    weight = torch.randn(64, 48)

    def layer(x, A, B, slots, scales):
        return multi_lora_(F.linear(x, weight), x, A, B, slots, scales)

    x, slots, scales = torch.randn(3, 16, 48, requires_grad=True), torch.tensor([1, 2, 1]), torch.ones(3)
    results = [
        torch.autograd.grad(run(x, A, B, slots, scales).square().sum(), (x, A, B))
        for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager"))
    ]
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, atol=1e-3, rtol=1e-4)
