"""Muon's update is the gradient's nearest semi-orthogonal matrix, and torch's own Muon agrees with it."""

from __future__ import annotations

import pytest
import torch
from mooring_server.dinghy.muon import Muon, _directly, _through_gram, orthogonal
from torch import nn


def _draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(48, 48), (32, 200), (200, 32)])
def test_singular_vectors_stay_and_values_come_near_one(shape):
    matrices = _draw(3, *shape) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    u, _, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    found = u.mT @ orthogonal(matrices).double() @ vh.mT
    values = found.diagonal(dim1=-2, dim2=-1)
    # the smallest of a square matrix's values may still be on its way after five iterations
    largest = values[:, : min(shape) * 3 // 4]
    assert largest.min() > 0.5
    assert values.max() < 1.3
    assert (found - torch.diag_embed(values)).abs().max() < 1e-3


def test_a_wide_matrix_iterates_through_its_gram_matrix_to_the_same():
    """Also where singular values range over seven decades, as a momentum's do."""
    u, _, vh = torch.linalg.svd(_draw(2, 48, 400).double(), full_matrices=False)
    x = (u * torch.logspace(-7, -0.5, 48, dtype=torch.float64)) @ vh
    exact = _directly(x)
    assert (_through_gram(x.float()).double() - exact).abs().max() < 1e-3 * exact.abs().max()
    assert exact.abs().max() > 0.01


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonal(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


def test_steps_are_torchs_within_its_precision():
    """torch iterates in bfloat16 (8 bits): three steps of both differ by less than a tenth of a step."""
    start = [_draw(64, 40), _draw(40, 64), _draw(64, 40).flip(0)]
    both = [[nn.Parameter(x.clone()) for x in start] for _ in range(2)]
    ours = Muon(both[0], lr=0.01)
    peer = torch.optim.Muon(both[1], lr=0.01, weight_decay=0.0, momentum=0.95, nesterov=True)
    for step in range(3):
        for mine, other in zip(*both, strict=True):
            mine.grad = torch.sin(mine.detach() * (step + 1))
            other.grad = mine.grad.clone()
        ours.step()
        peer.step()
    for mine, other, x in zip(*both, start, strict=True):
        moved = (other - x).norm()
        assert (mine - other).norm() < 0.1 * moved
        assert moved > 0
