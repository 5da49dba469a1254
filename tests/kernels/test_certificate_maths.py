"""Exact norms against the dense singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mooring_kernels.certificate import conv_factor, logit_gain, spectral_norm, spectrum


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 24), st.floats(-6, 6), st.integers(0, 99))
def test_spectrum_is_that_of_the_product(out, in_, rank, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, in_, generator=generator)
    b = torch.randn(out, rank, generator=generator) * 10.0**exponent
    found = spectrum(a, b)
    exact = torch.linalg.svdvals(b.double() @ a.double())
    assert found.sigma_max == pytest.approx(float(exact[0]), rel=1e-10)
    assert found.frobenius == pytest.approx(float(exact.norm()), rel=1e-10)
    assert 1.0 - 1e-9 <= found.stable_rank <= min(out, in_, rank) + 1e-9


def test_zero_update_has_no_rank():
    found = spectrum(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(6, 4))
    assert (found.sigma_max, found.frobenius, found.stable_rank) == (0.0, 0.0, 0.0)


def test_cancelling_factors_keep_their_accuracy():
    # B·A is tiny although A and B are not: the Gram route would lose every digit here
    a = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -1.0 + 1e-9]], dtype=torch.float64)
    assert spectrum(a, b).sigma_max == pytest.approx(1e-9 * 14**0.5, rel=1e-6)


def test_bad_factors_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        spectrum(torch.zeros(3, 4), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="not finite"):
        spectrum(torch.full((2, 4), torch.inf), torch.zeros(5, 2))


def test_spectral_norm_bounds_every_vector_and_flattens_kernels():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(12, 4, 3, 3, generator=generator)
    sigma = spectral_norm(weight)
    x = torch.randn(36, 200, generator=generator, dtype=torch.float64)
    ratios = (weight.double().flatten(1) @ x).norm(dim=0) / x.norm(dim=0)
    assert float(ratios.max()) <= sigma
    assert float(ratios.max()) > 0.5 * sigma


@pytest.mark.parametrize(
    ("kernel", "stride"),
    [((3, 3), (1, 1)), ((1, 1), (1, 1)), ((3, 1), (1, 2)), ((3, 3), (2, 2)), ((2, 4), (3, 1))],
)
def test_conv_factor_bounds_the_operator(kernel, stride):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(3, 2, *kernel, generator=generator, dtype=torch.float64)
    size = 7
    basis = torch.eye(2 * size * size, dtype=torch.float64).view(-1, 2, size, size)
    padding = (kernel[0] // 2, kernel[1] // 2)
    operator = torch.nn.functional.conv2d(basis, weight, stride=stride, padding=padding).flatten(1)
    norm = float(torch.linalg.matrix_norm(operator, 2))
    assert norm <= conv_factor(kernel, stride) * spectral_norm(weight) * (1 + 1e-12)
    # a kernel of equal entries of one sign comes close: the factor is not loose
    flat = torch.ones(1, 1, *kernel, dtype=torch.float64)
    wide = torch.eye(19 * 19, dtype=torch.float64).view(-1, 1, 19, 19)
    constant = torch.nn.functional.conv2d(wide, flat, stride=stride).flatten(1)
    assert float(torch.linalg.matrix_norm(constant, 2)) > 0.5 * conv_factor(kernel, stride) * spectral_norm(
        flat
    )


def test_logit_gain_bounds_every_pair_and_is_met():
    generator = torch.Generator().manual_seed(6)
    wq, wk, dq, dk = (torch.randn(8, 12, generator=generator, dtype=torch.float64) for _ in range(4))
    gain = logit_gain(*(spectral_norm(w) for w in (dq, wq, dk, wk)), head_dim=8)
    x, y = (torch.randn(12, 500, generator=generator, dtype=torch.float64) for _ in range(2))
    moved = (((wq + dq) @ x) * ((wk + dk) @ y) - (wq @ x) * (wk @ y)).sum(0) / 8**0.5
    ratio = moved.abs() / (x.norm(dim=0) * y.norm(dim=0))
    assert float(ratio.max()) <= gain
    # aligned rank-one matrices meet the bound: (2+1)(3+2) − 2·3 over √4
    assert logit_gain(1.0, 2.0, 2.0, 3.0, head_dim=4) == pytest.approx((3 * 5 - 6) / 2)
    assert logit_gain(0.0, 2.0, 0.0, 3.0, head_dim=4) == 0.0


def test_figures_that_are_no_norms_are_refused():
    with pytest.raises(ValueError, match="must be positive"):
        conv_factor((3, 0))
    with pytest.raises(ValueError, match="not norms"):
        logit_gain(-1.0, 1.0, 1.0, 1.0, head_dim=4)
    with pytest.raises(ValueError, match="head dimension 0"):
        logit_gain(1.0, 1.0, 1.0, 1.0, head_dim=0)
