from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from mooring_server.engine.adapters import AdapterWeights, LayerFactors, adaptable_layers
from mooring_server.errors import MooringError, Reason
from mooring_server.evaluation.certificate import Certificate, build
from mooring_server.evaluation.probe import DriftFigure


@pytest.fixture(scope="module")
def drift():
    return DriftFigure(0.11, 0.1, 0.125, 0.09, 0.2, 96, 24, "sha256:probe")


def test_norms_equal_those_of_the_dense_update(base, adapter, drift):
    certificate = build(base, adapter, drift, budget=0.12)
    modules = adaptable_layers(base)
    assert [layer.name for layer in certificate.layers] == list(adapter.layers)
    for layer in certificate.layers:
        factors = adapter.layers[layer.name]
        dense = factors.B.double() @ factors.A.double()
        values = torch.linalg.svdvals(dense)
        weight = modules[layer.name].weight.double()
        assert layer.sigma == pytest.approx(float(values[0]), rel=1e-10)
        assert layer.frobenius == pytest.approx(float(dense.norm()), rel=1e-10)
        assert layer.stable_rank == pytest.approx(float((dense.norm() / values[0]) ** 2), rel=1e-10)
        assert layer.base_sigma == pytest.approx(float(torch.linalg.svdvals(weight)[0]), rel=1e-10)
        assert layer.relative == pytest.approx(layer.sigma / layer.base_sigma)
        x = torch.randn(dense.shape[1], 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert bool(((dense @ x).norm(dim=0) <= layer.sigma * x.norm(dim=0) * (1 + 1e-12)).all())
    assert certificate.sigma_max == max(layer.sigma for layer in certificate.layers)
    assert (certificate.budget, certificate.drift) == (0.12, drift)


def test_norms_are_linear_in_the_adapter_scale(base, adapter):
    one, half = build(base, adapter), build(base, adapter, adapter_scale=0.5)
    for a, b in zip(one.layers, half.layers, strict=True):
        assert b.sigma == pytest.approx(0.5 * a.sigma)
        assert b.stable_rank == pytest.approx(a.stable_rank)


def test_logit_bound_holds_on_random_inputs(base, adapter):
    modules = adaptable_layers(base)
    certificate = build(base, adapter)
    assert certificate.attentions
    generator = torch.Generator().manual_seed(1)
    for attention in certificate.attentions:
        query, key = modules[f"{attention.name}.to_q"], modules[f"{attention.name}.to_k"]
        factors = adapter.layers[f"{attention.name}.to_q"]  # this adapter leaves to_k alone
        dq = factors.B.double() @ factors.A.double()
        d = attention.head_dim
        x = torch.randn(50, query.in_features, generator=generator).double()
        y = torch.randn(50, key.in_features, generator=generator).double()
        moved, k = (x @ dq.T).unflatten(1, (-1, d)), (y @ key.weight.double().T).unflatten(1, (-1, d))
        change = (moved * k).sum(-1).abs() / d**0.5  # [50, heads]
        assert bool((change <= (attention.logit_gain * x.norm(dim=1) * y.norm(dim=1))[:, None]).all())


def test_a_zero_update_has_zero_norms(base, adapter):
    name, factors = next(iter(adapter.layers.items()))
    zero = {name: LayerFactors(factors.A, torch.zeros_like(factors.B))}
    certificate = build(base, dataclasses.replace(adapter, layers=zero))
    assert (certificate.layers[0].sigma, certificate.layers[0].stable_rank, certificate.sigma_max) == (
        0,
        0,
        0,
    )


def test_round_trip_through_metadata(base, adapter, drift):
    certificate = build(base, adapter, drift, budget=0.12)
    assert Certificate.from_json(certificate.dumps()) == certificate
    assert Certificate.from_json(json.loads(json.dumps(certificate.to_json()))) == certificate
    assert certificate.to_json()["statements"]["drift"].startswith("measurement")
    without = build(base, adapter)
    assert Certificate.from_json(without.dumps()) == without


def test_another_version_another_base_and_unknown_layers_are_refused(base, adapter):
    with pytest.raises(MooringError) as version:
        Certificate.from_json({**build(base, adapter).to_json(), "version": 99})
    assert version.value.reason is Reason.INVALID_FIELD
    with pytest.raises(MooringError) as other:
        build(base, AdapterWeights("sha256:other", 2, adapter.layers))
    assert other.value.reason is Reason.BASE_DIGEST_MISMATCH
    factors = next(iter(adapter.layers.values()))
    with pytest.raises(MooringError) as unmatched:
        build(base, AdapterWeights(base.digest, 2, {"unet.nowhere.to_q": factors}))
    assert unmatched.value.reason is Reason.ADAPTER_KEYS_UNMATCHED
    assert "unet.nowhere.to_q" in unmatched.value.message
