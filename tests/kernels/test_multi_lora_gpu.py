"""The mixed-adapter linear on a CUDA device: values, gradients, bits, CUDA graphs, compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mooring_kernels.arena import ArenaLayout, LayerShape
from mooring_kernels.multi_lora import multi_lora_, multi_lora_shared_, stacked
from mooring_kernels.multi_lora.reference import reference, reference_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SLOTS = 6


def case(rows=4, tokens=100, in_=320, out=192, rank=16, dtype=torch.bfloat16, stored=torch.float32, layers=3):
    layout = ArenaLayout([LayerShape(f"l{i}", out, in_) for i in range(layers)], rank)
    generator = torch.Generator().manual_seed(0)
    flat = torch.full((SLOTS, layout.size), float("nan"))
    for a, b in layout.views(flat).values():
        a.copy_(torch.randn(a.shape, generator=generator) / in_**0.5)
        b.copy_(torch.randn(b.shape, generator=generator) / rank**0.5)
        a[0], b[0] = 0.0, 0.0
    flat = flat.to("cuda", stored)
    x = torch.randn(rows, tokens, in_, generator=generator).to("cuda", dtype)
    plain = torch.randn(rows, tokens, out, generator=generator).to("cuda", dtype)
    return layout, flat, x, plain


def close(found, expected, dtype):
    error = (found.detach().double().cpu() - expected).abs().max()
    return float(error / expected.abs().max().clamp_min(1.0)) <= TOLERANCE[dtype]


def bits(t):
    return t.view({4: torch.int32, 2: torch.int16}[t.element_size()])


@pytest.mark.parametrize(
    ("tokens", "in_", "out", "rank", "dtype", "stored"),
    [
        (100, 320, 192, 16, torch.float32, torch.float32),
        (100, 320, 192, 16, torch.bfloat16, torch.float32),
        (1, 63, 65, 5, torch.float16, torch.float32),
        (77, 768, 640, 4, torch.bfloat16, torch.bfloat16),
        (1024, 1280, 640, 64, torch.bfloat16, torch.bfloat16),
        (33, 130, 1000, 128, torch.bfloat16, torch.float32),
        (33, 130, 1000, 128, torch.float32, torch.float32),
    ],
)
def test_forward_and_gradients_are_the_references(tokens, in_, out, rank, dtype, stored):
    layout, flat, x, plain = case(4, tokens, in_, out, rank, dtype, stored)
    A, B = (t.requires_grad_() for t in layout.views(flat)["l1"])
    slots, scales = [2, 0, 5, 2], [1.0, 1.0, 0.5, -2.0]
    where, factor = torch.tensor(slots, device="cuda"), torch.tensor(scales, device="cuda")
    x.requires_grad_()
    found = multi_lora_(plain.clone(), x, A, B, where, factor)
    cpu = [t.detach().cpu() for t in (plain, x, A, B)]
    assert close(found, reference(*cpu, slots, scales), dtype)
    with torch.no_grad():
        assert torch.equal(multi_lora_(plain.clone(), x, A, B, where, factor), found)
    grad = torch.randn_like(found)
    grads = torch.autograd.grad(found, (x, A, B), grad)
    worst = max(dtype, stored if stored in TOLERANCE else dtype, key=TOLERANCE.__getitem__)
    for ours, exact in zip(grads, reference_gradients(grad.cpu(), *cpu[1:], slots, scales), strict=True):
        assert close(ours, exact, worst)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_rows_of_slot_zero_keep_the_bases_bits(dtype):
    layout, flat, x, plain = case(dtype=dtype)
    A, B = layout.views(flat)["l1"]
    plain[..., ::3] = -0.0
    where = torch.tensor([0, 3, 0, 1], device="cuda")
    found = multi_lora_(plain.clone(), x, A, B, where, torch.ones(4, device="cuda"))
    for row, slot in enumerate([0, 3, 0, 1]):
        assert torch.equal(bits(found[row]), bits(plain[row])) == (slot == 0)


def test_a_rows_bits_do_not_depend_on_the_other_rows():
    layout, flat, x, plain = case()
    A, B = layout.views(flat)["l1"]
    results = [
        multi_lora_(plain.clone(), x, A, B, torch.tensor(slots, device="cuda"))[0]
        for slots in ([3, 3, 3, 3], [3, 0, 1, 2], [3, 5, 4, 0])
    ]
    assert all(torch.equal(bits(result), bits(results[0])) for result in results)


def test_gradients_sum_into_their_slots_of_the_flat_gradient():
    layout, flat, x, plain = case(dtype=torch.float32)
    A, B = (t.requires_grad_() for t in layout.views(flat)["l1"])
    flat_grad = torch.zeros(SLOTS, layout.size, device="cuda")
    sums = layout.views(flat_grad)["l1"]
    slots, scales = [1, 2, 1, 0], [1.0, 0.5, 2.0, 1.0]
    where, factor = torch.tensor(slots, device="cuda"), torch.tensor(scales, device="cuda")
    grad = torch.randn_like(plain)
    multi_lora_(plain.clone(), x, A, B, where, factor, grads=sums).backward(grad)
    cpu = [t.detach().cpu() for t in (grad, x, A, B)]
    _, exact_A, exact_B = reference_gradients(*cpu, slots, scales)
    assert A.grad is None
    assert close(sums[0], exact_A, torch.float32)
    assert close(sums[1], exact_B, torch.float32)
    assert not flat_grad[[0, 3, 4, 5]].any()


def test_layers_of_one_input_and_one_slot_for_all():
    layout, flat, x, plain = case(dtype=torch.float32)
    names = ["l0", "l1", "l2"]
    A, Bs = stacked(layout, flat, names), [layout.views(flat)[name][1] for name in names]
    where = torch.tensor([4, 4, 4, 4], device="cuda")
    together = multi_lora_shared_([plain.clone() for _ in names], x, A, Bs, where)
    for i, found in enumerate(together):
        alone = multi_lora_(plain.clone(), x, A[:, i], Bs[i], 4)
        assert torch.allclose(found, alone, atol=1e-4)


def test_one_cuda_graph_serves_every_mixture():
    layout, flat, x, plain = case()
    A, B = layout.views(flat)["l1"]
    where, factor = torch.tensor([1, 2, 3, 4], device="cuda"), torch.ones(4, device="cuda")
    output = plain.clone()

    def run():
        output.copy_(plain)
        multi_lora_(output, x, A, B, where, factor)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for slots, scales in (([5, 0, 5, 1], [1.0, 1.0, 0.5, 2.0]), ([0, 0, 0, 0], [1.0] * 4)):
        where.copy_(torch.tensor(slots))
        factor.copy_(torch.tensor(scales))
        graph.replay()
        expected = multi_lora_(plain.clone(), x, A, B, where, factor)
        assert torch.equal(bits(output), bits(expected))


def test_torch_compile_keeps_one_graph():
    layout, flat, x, _ = case()
    A, B = layout.views(flat)["l1"]
    weight = torch.randn(192, 320, device="cuda", dtype=torch.bfloat16)

    def layer(x, slots, scales):
        return multi_lora_(F.linear(x, weight), x, A, B, slots, scales)

    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        for slots in ([1, 2, 3, 4], [0, 5, 5, 0]):
            where, factor = torch.tensor(slots, device="cuda"), torch.full((4,), 0.5, device="cuda")
            eager = layer(x, where, factor)
            assert torch.allclose(compiled(x, where, factor).float(), eager.float(), atol=0.1, rtol=2e-2)
