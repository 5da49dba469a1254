"""What a run may be told, and how a wrong word is answered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mooring_server.errors import MooringError, Reason
from mooring_server.training import PRESETS, Method, TrainConfig

configs = st.builds(
    TrainConfig,
    method=st.sampled_from([Method.L2, Method.SPECTRAL, Method.FACTOR_DECAY]),
    budget=st.none() | st.floats(1e-3, 5.0),
    rank=st.integers(1, 128),
    steps=st.integers(1, 20_000),
    seed=st.integers(0, 2**63 - 1),
    targets=st.sampled_from(["attention", "attention+ff"]),
    flip=st.booleans(),
)


@given(configs)
def test_json_round_trip_keeps_the_digest(config):
    again = TrainConfig.from_json(config.to_json())
    assert again == config
    assert again.digest == config.digest


def test_every_field_decides_the_digest():
    base = TrainConfig()
    changed = {
        "method": Method.L2, "budget": 0.3, "strength": 0.5, "rank": 3, "learning_rate": 2e-3,
        "embedding_learning_rate": 1e-3, "steps": 7, "batch_size": 2, "seed": 1, "targets": "attention+ff",
        "learn_embedding": False, "framing": "letterbox", "views": 2, "flip": True, "prior_images": 3,
        "checkpoint_every": 3, "preview_every": 0, "probe_every": 3, "probe_points": 12, "control_points": 4,
    }  # fmt: skip
    assert set(changed) == set(base.to_json())
    for name, given_value in changed.items():
        document = {**base.to_json(), name: given_value}
        if document[name] == base.to_json()[name]:
            pytest.fail(f"{name} is not changed by this test")
        assert TrainConfig.from_json(document).digest != base.digest


def test_presets_are_ordered_and_known_by_name():
    assert list(PRESETS.values()) == sorted(PRESETS.values())
    assert TrainConfig.from_json({"budget": "conservative"}).target_drift == PRESETS["conservative"]
    assert TrainConfig().target_drift == PRESETS["balanced"]


def test_a_target_exists_only_where_a_penalty_can_keep_it():
    assert TrainConfig(method=Method.NONE).target_drift is None
    assert TrainConfig(method=Method.PRIOR_PRESERVATION).target_drift is None
    assert TrainConfig(strength=0.1).target_drift is None


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 10**9}, "steps"),
        ({"rank": 0}, "rank"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"rank": 2.5}, "rank"),
        ({"rank": True}, "rank"),
        ({"learn_embedding": 1}, "learn_embedding"),
        ({"method": "magic"}, "method"),
        ({"budget": "generous"}, "budget"),
        ({"budget": -1.0}, "budget"),
        ({"method": "none", "budget": 0.1}, "budget"),
        ({"method": "prior_preservation", "budget": 0.1}, "budget"),
        ({"budget": 0.1, "strength": 0.1}, "budget"),
        ({"method": "none", "strength": 1.0}, "strength"),
        ({"targets": "everything"}, "targets"),
        ({"framing": "stretch"}, "framing"),
        ({"stepz": 3}, "stepz"),
    ],
)
def test_a_wrong_field_is_named(document, field):
    with pytest.raises(MooringError) as caught:
        TrainConfig.from_json(document)
    assert [violation.field for violation in caught.value.fields] == [field]
    expected = Reason.STEPS_OUT_OF_RANGE if field == "steps" else Reason.INVALID_FIELD
    assert caught.value.reason is expected
    assert caught.value.remedy


def test_all_wrong_fields_are_named_at_once():
    with pytest.raises(MooringError) as caught:
        TrainConfig(rank=0, steps=0, batch_size=0).validate()
    assert {violation.field for violation in caught.value.fields} == {"rank", "steps", "batch_size"}
