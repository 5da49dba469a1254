"""The back-off and the window's calibration, on curves whose answer is known."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mooring_server.evaluation.probe import DriftFigure, DriftResult
from mooring_server.training.control import (
    BACKOFF_TOLERANCE,
    EARLY_FACTOR,
    DriftGauge,
    back_off,
    calibration_steps,
    early_steps,
)


def result(drift):
    empty = torch.zeros(0)
    return measured(drift, empty, empty)


def measured(drift, per_point, energy):
    figure = DriftFigure(drift, drift, drift, None, None, 8, 2, "sha256:0")
    none = torch.zeros(len(per_point))
    return DriftResult(figure, per_point, energy, none, none.bool())


def finish(generator):
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value


def search(curve, budget):
    asked = []

    def measure(scale):
        asked.append(scale)
        yield
        return result(curve(scale))

    scale, found = finish(back_off(measure, budget))
    return scale, found, asked


@given(st.floats(0.13, 20.0), st.floats(1.6, 2.5), st.floats(0.0, 0.5))
def test_lands_just_below_the_budget_on_near_quadratic_curves(at_one, power, bend):
    scale, found, asked = search(lambda s: at_one * s**power * (1 + bend * s) / (1 + bend), 0.12)
    assert 0.12 * (1 - BACKOFF_TOLERANCE) <= found.drift <= 0.12
    assert 0 < scale < 1
    assert max(asked) == 1.0, "never scaled up"


def test_an_exactly_quadratic_curve_takes_two_measurements():
    scale, _, asked = search(lambda s: 0.4 * s * s, 0.1)
    assert len(asked) == 2
    assert scale == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("drift", [0.0, 0.05, 0.1])
def test_within_the_budget_nothing_changes(drift):
    scale, found, asked = search(lambda s: drift * s * s, 0.1)
    assert (scale, found.drift, len(asked)) == (1.0, drift, 1)


@pytest.mark.parametrize(
    "curve",
    [
        lambda s: 1.0 if s > 0.3 else 0.05 * s,
        lambda s: 1.0 + s if s > 1e-3 else 0.0,
        lambda s: math.tanh(40 * s) if s > 0.001 else 0.01,
    ],
)
def test_the_budget_holds_even_on_a_cliff(curve):
    scale, found, _ = search(curve, 0.1)
    assert found.drift <= 0.1
    assert found.drift == curve(scale)


class FakeProbe:
    """A probe of 8 points whose first half drifts twice as much as the whole."""

    def __init__(self):
        self.energy = torch.ones(8)

    def window(self, index, size):
        return slice(0, size)

    def measure(self, slot, scale=1.0, subset=None):
        yield
        points = slot.level * torch.tensor([4.0, 4, 4, 4, 0, 0, 0, 0]) / 2
        inside = subset or slice(None)
        drift = float(points[inside].sum() / self.energy[inside].sum())
        return measured(drift, points[inside], self.energy[inside])


def test_calibration_removes_the_windows_bias():
    gauge = DriftGauge(FakeProbe(), 4)
    slot = SimpleNamespace(level=1.0)
    assert finish(gauge.estimate(slot)) == pytest.approx(2.0)
    assert finish(gauge.calibrate(slot)) == pytest.approx(1.0)
    slot.level = 3.0
    assert finish(gauge.estimate(slot)) == pytest.approx(3.0)


@pytest.mark.parametrize(("steps", "every"), [(400, 10), (100, 7), (5, 10), (40, 5)])
def test_calibration_happens_when_a_measurement_does(steps, every):
    found = calibration_steps(steps, every)
    assert all(step % every == 0 and step > 0 for step in found)
    if steps >= 4 * every:
        assert len(found) == 3


@given(st.integers(1, 200))
def test_early_measurements_lie_a_factor_apart_until_the_regular_ones_take_over(every):
    steps = sorted(early_steps(every))
    assert steps[0] == 1
    for earlier, later in pairwise(steps):
        assert later - earlier < every
        assert later == earlier + 1 or later <= earlier * EARLY_FACTOR
    assert max(steps[-1] + 1, int(steps[-1] * EARLY_FACTOR)) - steps[-1] >= every
    assert len(steps) <= 30
