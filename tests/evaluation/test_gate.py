"""The gate's judgement as a pure function, on the figures of the demo."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mooring_server.errors import MooringError
from mooring_server.evaluation import gate
from mooring_server.evaluation.gate import PRESETS, RANGES, Facts, GatePolicy, Mode

MOORED = Facts(
    rights={"basis": "licensed", "statement": "CC0"},
    certificate={"sigma_max": 0.0447, "relative_max": 0.012, "drift": {"value": 0.1189, "high": 0.1605}},
    budget=0.12,
    evaluation={
        "adapter_scale": 1.0,
        "subject": "robot",
        "prompts": 12,
        "generic_prompts": 24,
        "dino": 0.7707,
        "base_dino": 0.4799,
        "generic_clip_t_drop": [0.0006, -0.0004, 0.0017],
        "drift": {"value": 0.1319, "low": 0.115, "high": 0.149},
    },
)
"""`make demo`, robot, method spectral, balanced."""
NONE = Facts(
    rights=MOORED.rights,
    certificate={"sigma_max": 6.4177, "relative_max": 1.467, "drift": {"value": 3.8212, "high": 4.5385}},
    budget=None,
    evaluation={
        **MOORED.evaluation,
        "dino": 0.7383,
        "generic_clip_t_drop": [0.038, 0.03, 0.046],
        "drift": {"value": 4.1389, "low": 3.4, "high": 4.9},
    },
)
"""The same without protection."""


def failed(policy: GatePolicy, facts: Facts) -> list[str]:
    return [check.figure for check in gate.failing(gate.judge(policy, facts))]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_demos_moored_adapter_passes_and_its_unprotected_one_does_not(preset):
    assert failed(PRESETS[preset], MOORED) == []
    assert "drift" in failed(PRESETS[preset], NONE)
    assert "relative_sigma" in failed(PRESETS[preset], NONE)


def test_the_default_names_everything_that_is_wrong_with_the_unprotected_one():
    assert failed(GatePolicy(), NONE) == ["generic_clip_t_drop", "drift", "relative_sigma"]


def test_drift_is_held_by_the_upper_end_of_its_interval():
    loose = {"value": 0.12, "low": 0.02, "high": 0.19}
    (check,) = gate.failing(
        gate.judge(GatePolicy(), replace(MOORED, evaluation={**MOORED.evaluation, "drift": loose}))
    )
    assert (check.figure, check.value, check.measured) == (
        "drift_over_budget",
        pytest.approx(0.19 / 0.12),
        pytest.approx(1.0),
    )


@pytest.mark.parametrize("missing", ["dino", "base_dino", "generic_clip_t_drop", "drift"])
def test_what_was_not_measured_fails(missing):
    facts = replace(MOORED, evaluation={**MOORED.evaluation, missing: None})
    assert failed(GatePolicy(), facts)
    assert all(check.value is None for check in gate.failing(gate.judge(GatePolicy(), facts)))


def test_not_a_number_fails():
    facts = replace(MOORED, evaluation={**MOORED.evaluation, "dino": math.nan})
    assert failed(GatePolicy(), facts) == ["dino_gain"]


def test_without_an_evaluation_the_missing_evaluation_is_what_is_wrong():
    assert failed(GatePolicy(), replace(MOORED, evaluation=None)) == ["evaluation"]
    assert failed(GatePolicy(), replace(MOORED, evaluation=None, certificate={"relative_max": 0.1})) == [
        "evaluation"
    ]


def test_a_gate_that_asks_for_no_evaluation_takes_the_certificates_drift():
    policy = replace(GatePolicy(), require_evaluation=False)
    assert failed(policy, replace(MOORED, evaluation=None)) == []
    assert failed(policy, replace(NONE, evaluation=None)) == ["drift", "relative_sigma"]
    assert failed(policy, replace(MOORED, evaluation=None, certificate={})) == [
        "drift",
        "drift_over_budget",
        "relative_sigma",
    ]
    assert failed(policy, NONE) == failed(GatePolicy(), NONE)  # one that is there is judged


@pytest.mark.parametrize(
    ("changes", "rights", "passes"),
    [
        ({}, {}, False),
        ({"require_rights": False}, {}, True),
        ({}, {"basis": "OWNED"}, True),
        ({"allowed_rights": ("owned",)}, {"basis": "owned"}, True),
        ({"allowed_rights": ("owned",)}, {"basis": "public_domain"}, False),
        ({"allowed_rights": ("owned",), "require_rights": False}, {}, True),
        ({"allowed_rights": ("owned",), "require_rights": False}, {"basis": "licensed"}, False),
    ],
)
def test_rights(changes, rights, passes):
    assert (
        "rights" not in failed(replace(GatePolicy(), **changes), replace(MOORED, rights=rights))
    ) == passes


def test_a_gate_that_is_off_looks_at_nothing():
    assert gate.judge(replace(GatePolicy(), mode=Mode.OFF), NONE) == []


@pytest.mark.parametrize(
    ("figures", "subject", "counted"),
    [
        ({"adapter_scale": 1.0, "subject": "rex"}, "rex", True),
        ({"adapter_scale": 1.0, "subject": "rex"}, "", True),
        ({"adapter_scale": 1.0, "subject": "cat"}, "rex", False),
        ({"adapter_scale": 0.5, "subject": "rex"}, "rex", False),
    ],
)
def test_which_evaluations_count(figures, subject, counted):
    assert gate.counts(figures, subject) is counted


THRESHOLDS = st.fixed_dictionaries(
    {name: st.none() | st.floats(low, high) for name, (low, high) in RANGES.items()}
    | {
        "mode": st.sampled_from(Mode),
        "require_evaluation": st.booleans(),
        "require_rights": st.booleans(),
        "allowed_rights": st.sets(st.sampled_from(["owned", "licensed"])).map(tuple),
    }
)


@given(THRESHOLDS)
def test_a_policy_goes_through_json_unchanged(values):
    policy = GatePolicy(**values)
    policy.validate()
    assert GatePolicy.from_json(policy.to_json()) == policy
    assert set(values) == {field.name for field in fields(GatePolicy)}


@given(THRESHOLDS, st.sampled_from(sorted(RANGES)), st.floats(-3, 3))
def test_a_stricter_threshold_never_passes_more(values, name, value):
    loose = replace(GatePolicy(**values), mode=Mode.ENFORCE, **{name: None})
    strict = replace(loose, **{name: value})
    for facts in (MOORED, NONE):
        assert set(failed(loose, facts)) <= set(failed(strict, facts))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_thresholds_outside_their_range_are_named(value):
    with pytest.raises(MooringError) as caught:
        replace(GatePolicy(), max_drift=value, max_sigma=value).validate()
    assert [field.field for field in caught.value.fields] == ["policy.max_drift", "policy.max_sigma"]
