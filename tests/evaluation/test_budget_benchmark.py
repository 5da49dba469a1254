from __future__ import annotations

import pytest
import torch
from mooring_server.evaluation.design import bootstrap_ratio
from mooring_server.evaluation.probe import DriftFigure

from benchmarks.budget import drift_at_mix


def ratio(differences, energies, prompts):
    return bootstrap_ratio(differences[prompts], energies[prompts], torch.tensor(prompts), resamples=2)[0]


def test_drift_at_another_mix_equals_the_drift_of_such_a_probe():
    # 24 and 48 generic prompts of equal statistics beside the same 4 class prompts
    differences = torch.tensor([0.2, 0.1, 0.3] * 16 + [0.5, 0.4, 0.6, 0.5])
    energies = torch.tensor([1.0, 2.0, 3.0] * 16 + [0.1, 0.2, 0.1, 0.1])
    classes, small = list(range(48, 52)), [*range(24), *range(48, 52)]
    figure = DriftFigure(
        value=ratio(differences, energies, small),
        low=0,
        high=0,
        generic=ratio(differences, energies, list(range(24))),
        class_=ratio(differences, energies, classes),
        points=28,
        prompts=28,
        probe_digest="",
    )
    whole = ratio(differences, energies, list(range(52)))
    assert drift_at_mix(figure, 24, 48) == pytest.approx(whole, rel=1e-5)
    assert drift_at_mix(figure, 24, 24) == pytest.approx(figure.value)
    assert abs(whole - figure.value) > 0.01, "the mix matters"
