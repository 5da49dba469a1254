"""The controller on simulated plants: it lands on the budget whatever the scale of λ, and never winds up."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mooring_server.training.budget import BudgetController, ControllerGains


def run(controller, *, gain, stiffness, pull, steps=400, every=10, noise=0.05, seed=0):
    """A plant like training: the loss pulls the update u up, the penalty back; drift = gain·u²."""
    rnd = random.Random(seed)
    u = 0.0
    strengths = []
    for step in range(1, steps + 1):
        rate = min(1.0, step / 20) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        force = pull - stiffness * controller.strength * u
        u = max(0.0, u + 0.5 * rate * pull * math.tanh(2 * force / pull))
        if step % every == 0:
            drift = gain * u * u * math.exp(rnd.gauss(0, noise))
            strengths.append(controller.update(drift, pull / (stiffness * max(u, 1e-9))))
    return gain * u * u, strengths


@settings(max_examples=60, deadline=None)
@given(
    gain=st.floats(0.1, 10.0),
    stiffness=st.sampled_from([1e-6, 1e-3, 1.0, 1e3, 1e6]),
    pull=st.floats(0.03, 0.08),
    seed=st.integers(0, 1000),
)
def test_lands_on_the_budget_over_twelve_decades_of_strength(gain, stiffness, pull, seed):
    target = 0.12
    unprotected, _ = run(BudgetController(1e9), gain=gain, stiffness=stiffness, pull=pull, seed=seed)
    final, _ = run(BudgetController(target), gain=gain, stiffness=stiffness, pull=pull, seed=seed)
    if unprotected > 1.3 * target:
        assert final == pytest.approx(target, rel=0.15)
    else:
        assert final <= 1.2 * target


def test_sleeps_far_below_the_budget():
    controller = BudgetController(1.0)
    for _ in range(50):
        assert controller.update(0.1, 5.0) == 0.0
    assert not controller.engaged


def test_starts_from_the_balance_strength():
    controller = BudgetController(1.0)
    controller.update(0.2, 123.0)
    assert controller.update(0.9, 7.0) == pytest.approx(7.0)


def test_does_not_wait_for_a_balance_once_the_budget_is_reached():
    controller = BudgetController(1.0)
    assert controller.update(0.9, math.nan) == 0.0
    assert controller.update(5.0, math.nan) > 0.0


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=200), st.floats(1e-9, 1e9))
def test_strength_stays_finite_within_its_span(drifts, balance):
    controller = BudgetController(0.5)
    for drift in drifts:
        strength = controller.update(drift, balance)
        assert math.isfinite(strength)
        if controller.engaged:
            span = controller.gains.span * 1.001
            assert 1 / span <= strength / _start(controller) <= span


def _start(controller):
    return math.exp(controller.state_dict()["log_start"])


def test_no_windup_after_long_saturation():
    gains = ControllerGains(span=100.0)
    controller = BudgetController(1.0, gains)
    for _ in range(500):
        controller.update(50.0, 1.0)
    assert controller.strength == pytest.approx(100.0)
    before = controller.strength
    for _ in range(6):
        controller.update(0.2, 1.0)
    assert controller.strength < 0.5 * before, "leaves the clamp at once when the error changes sign"


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=40), st.integers(0, 39))
def test_a_restored_controller_goes_on_bit_for_bit(drifts, cut):
    whole = BudgetController(0.3)
    expected = [whole.update(drift, 2.0) for drift in drifts]
    first = BudgetController(0.3)
    got = [first.update(drift, 2.0) for drift in drifts[:cut]]
    second = BudgetController.from_state(json.loads(json.dumps(first.state_dict())))
    got += [second.update(drift, 2.0) for drift in drifts[cut:]]
    assert got == expected


@pytest.mark.parametrize("drift", [math.nan, math.inf, -1.0])
def test_a_diverged_measurement_is_refused(drift):
    with pytest.raises(ValueError, match="finite"):
        BudgetController(1.0).update(drift, 1.0)


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_target_is_refused(target):
    with pytest.raises(ValueError, match="positive"):
        BudgetController(target)
