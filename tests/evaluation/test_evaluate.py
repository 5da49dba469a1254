from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from mooring_server.errors import MooringError, Reason
from mooring_server.evaluation.config import EvaluationConfig
from mooring_server.evaluation.evaluate import EvaluationCache, evaluate
from mooring_server.evaluation.prompts import (
    GENERIC_PROMPTS,
    HELD_OUT_TEMPLATES,
    STEERING_TEMPLATES,
    PromptSets,
    class_prompts,
    without_placeholder,
)
from mooring_server.evaluation.result import CLASS, GENERIC, PLAIN, SUBJECT, EvaluationResult
from running_ticks import finish


@pytest.fixture(scope="module")
def evaluation(base, bank, judges, adapter, photos, config):
    progress = []
    result, ticks = finish(evaluate(base, bank, judges, adapter, photos, config, on_progress=progress.append))
    return result, progress, ticks


def test_every_picture_has_its_twin_by_the_base(evaluation, config):
    result, _, _ = evaluation
    kinds = [pair.kind for pair in result.pairs]
    assert [kinds.count(kind) for kind in (SUBJECT, GENERIC, CLASS, PLAIN)] == [4, 3, 2, 2]
    first = result.pairs[0]
    assert (first.prompt, first.base_prompt) == (
        "a photo of a <duck> duck on the beach",
        "a photo of a duck on the beach",
    )
    for pair in result.pairs:
        assert pair.base.shape == pair.adapted.shape == (32, 32, 3)
        assert pair.base.dtype == np.uint8
        assert not np.array_equal(pair.base, pair.adapted), "the adapter acts on every picture"


def test_figures_are_the_means_of_the_judges_scores(evaluation, judges, photos):
    result, _, _ = evaluation
    subject = result.of_kind(SUBJECT)
    images = judges.dino([pair.adapted for pair in subject]) @ judges.dino(photos).T
    assert result.metrics["dino"] == pytest.approx(float(images.mean()), abs=1e-5)
    texts = judges.clip_text([without_placeholder(pair.prompt, "<duck>") for pair in subject])
    agreement = (judges.clip_image([pair.base for pair in subject]) * texts).sum(1)
    assert result.metrics["base_clip_t"] == pytest.approx(float(agreement.mean()), abs=1e-5)
    classes = judges.dino([pair.adapted for pair in result.of_kind(CLASS)]) @ judges.dino(photos).T
    assert result.metrics["pres"] == pytest.approx(float(classes.mean()), abs=1e-5)
    expected = {"clip_t", "clip_i", "dino", "pres", "div", "generic_clip_t"}
    assert expected | {f"base_{name}" for name in expected} | {"generic_change", "drift"} == set(
        result.metrics
    )
    for name, (low, high) in result.intervals.items():
        assert low <= result.metrics[name] <= high


def test_drift_and_certificate_belong_to_the_adapter(evaluation, base, adapter, config):
    result, _, _ = evaluation
    assert result.metrics["drift"] == result.drift.value > 0
    assert result.certificate.drift == result.drift
    assert result.certificate.budget == config.budget
    assert result.certificate.adapter_digest == result.adapter_digest == adapter.digest
    assert result.base_digest == base.digest


def test_progress_rises_to_the_end(evaluation):
    _, progress, ticks = evaluation
    steps = [item.step for item in progress]
    assert steps == sorted(steps)
    assert len(progress) == ticks + 1
    assert (progress[-1].phase, progress[-1].step) == ("done", progress[-1].steps)
    assert list(dict.fromkeys(item.phase for item in progress)) == [
        "base images",
        "adapted images",
        "drift",
        "judging",
        "done",
    ]
    assert progress[-2].step >= 0.6 * progress[-1].steps, "the estimate of the total is of the right size"


def test_the_base_alone_is_its_own_measure(base, bank, judges, photos, config):
    result, _ = finish(evaluate(base, bank, judges, None, photos, config))
    assert result.adapter_digest is result.certificate is result.drift is None
    assert result.metrics["drift"] == 0.0
    assert all(pair.adapted is None for pair in result.pairs)
    for name in ("clip_t", "clip_i", "dino", "pres", "div", "generic_clip_t"):
        assert result.metrics[name] == result.metrics[f"base_{name}"]


def test_an_adapter_of_strength_zero_is_the_base(base, bank, judges, adapter, photos, config):
    result, _ = finish(
        evaluate(base, bank, judges, adapter, photos, dataclasses.replace(config, adapter_scale=0.0))
    )
    assert result.metrics["drift"] == 0.0
    assert result.metrics["generic_change"] == pytest.approx(0.0, abs=1e-5)
    for pair in result.of_kind(GENERIC, CLASS):
        assert np.array_equal(pair.base, pair.adapted)


def test_same_request_same_result_and_the_cache_changes_nothing(
    evaluation, base, bank, judges, adapter, photos, config
):
    first, _, ticks = evaluation
    cache = EvaluationCache()
    again, _ = finish(evaluate(base, bank, judges, adapter, photos, config, cache=cache))
    cached, cached_ticks = finish(evaluate(base, bank, judges, adapter, photos, config, cache=cache))
    for other in (again, cached):
        assert other.metrics == first.metrics
        assert all(
            np.array_equal(a.adapted, b.adapted) and np.array_equal(a.base, b.base)
            for a, b in zip(first.pairs, other.pairs, strict=True)
        )
    assert cached_ticks < 0.6 * ticks


def test_the_cache_keeps_within_its_bounds(base, bank, judges, adapter, photos, config):
    cache = EvaluationCache(max_images=3, max_probes=0)
    finish(evaluate(base, bank, judges, adapter, photos, config, cache=cache))
    assert len(cache.images) == 3
    assert not cache.probes


def test_a_cancelled_evaluation_frees_its_slot(base, bank, judges, adapter, photos, config):
    run = evaluate(base, bank, judges, adapter, photos, config)
    seen = []
    run_with_progress = evaluate(base, bank, judges, adapter, photos, config, on_progress=seen.append)
    while not seen or seen[-1].phase != "adapted images":
        next(run_with_progress)
    assert sum(bank._pins) == 1
    run_with_progress.close()
    assert sum(bank._pins) == 0
    run.close()
    assert torch.is_grad_enabled()


def test_json_round_trip(evaluation):
    result, _, _ = evaluation
    again = EvaluationResult.from_json(json.loads(json.dumps(result.to_json())))
    assert again.to_json() == result.to_json()
    assert np.array_equal(again.pairs[0].adapted, result.pairs[0].adapted)
    assert again.certificate == result.certificate
    small = result.to_json(images=False)
    assert "base" not in small["pairs"][0]
    assert len(json.dumps(small)) < len(json.dumps(result.to_json()))
    assert EvaluationResult.from_json(small).metrics == result.metrics
    with pytest.raises(MooringError):
        EvaluationResult.from_json({**small, "version": 0})


def test_per_prompt_rows_are_means_over_seeds(evaluation):
    result, _, _ = evaluation
    row = next(row for row in result.per_prompt if row["kind"] == SUBJECT)
    pairs = [pair for pair in result.of_kind(SUBJECT) if pair.prompt == row["prompt"]]
    assert len(pairs) == 2
    assert row["dino"] == pytest.approx(sum(pair.scores["dino"] for pair in pairs) / 2)


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        ({"generic_prompts": ("one",)}, Reason.INVALID_FIELD, "generic_prompts"),
        ({"probe_prompts": ("one",)}, Reason.INVALID_FIELD, "probe_prompts"),
        ({"probe_prompts": ("a cat", "cat " * 20)}, Reason.PROMPT_TOO_LONG, "probe_prompts[1]"),
        ({"prompts": (" ",)}, Reason.EMPTY_PROMPT, "prompts[0]"),
        ({"steps": 0}, Reason.STEPS_OUT_OF_RANGE, "steps"),
        ({"steps": 151}, Reason.STEPS_OUT_OF_RANGE, "steps"),
        ({"guidance_scale": float("nan")}, Reason.INVALID_FIELD, "guidance_scale"),
        ({"adapter_scale": 2.5}, Reason.INVALID_FIELD, "adapter_scale"),
        ({"class_samples": 1}, Reason.INVALID_FIELD, "class_samples"),
        ({"seeds": ()}, Reason.INVALID_FIELD, "seeds"),
        ({"class_noun": ""}, Reason.INVALID_FIELD, "class_noun"),
        ({"placeholder": "<cat>"}, Reason.UNKNOWN_PLACEHOLDER, "placeholder"),
        ({"prompts": ("duck " * 20,)}, Reason.PROMPT_TOO_LONG, "prompts[0]"),
    ],
)
def test_bad_requests_name_their_field_before_any_work(
    base, bank, judges, adapter, photos, config, change, reason, field
):
    with pytest.raises(MooringError) as caught:
        next(evaluate(base, bank, judges, adapter, photos, dataclasses.replace(config, **change)))
    assert caught.value.reason is reason
    assert caught.value.fields[0].field == field


def test_no_photos_is_an_error(base, bank, judges, adapter, config):
    with pytest.raises(MooringError) as caught:
        next(evaluate(base, bank, judges, adapter, [], config))
    assert caught.value.reason is Reason.SUBJECT_HAS_NO_PHOTOS


def test_config_round_trips_and_refuses_unknown_fields(config):
    assert EvaluationConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert EvaluationConfig.from_json({}) == EvaluationConfig()
    with pytest.raises(MooringError) as caught:
        EvaluationConfig.from_json({"step": 3})
    assert caught.value.fields[0].field == "step"


@pytest.mark.parametrize(
    ("prompt", "placeholder", "expected"),
    [
        ("a photo of a <fox> fox in the snow", "<fox>", "a photo of a fox in the snow"),
        ("a photo of a <owl> owl", "<owl>", "a photo of an owl"),
        ("an <fox> fox", "<fox>", "a fox"),
        ("a photo of a <FOX> fox", "<fox>", "a photo of a fox"),
        ("a sks, at night", "sks", "a, at night"),
        ("a task on a desk", "sk", "a task on a desk"),
        ("a fox", "", "a fox"),
    ],
)
def test_placeholder_is_removed_as_a_whole_word(prompt, placeholder, expected):
    assert without_placeholder(prompt, placeholder) == expected


def test_drift_is_measured_on_the_probe_prompts_whatever_is_drawn(
    base, bank, judges, adapter, photos, config
):
    small = dataclasses.replace(config, prompts=("a {} in the snow",), seeds=(0,), class_samples=0)
    probe = ("a red dog", "a small cat", "a blue robot on the beach")
    apart = dataclasses.replace(small, probe_prompts=probe)
    same = dataclasses.replace(apart, generic_prompts=("a toy", "a robot"))
    digests = []
    for wanted in (small, apart, same):
        result, _ = finish(evaluate(base, bank, judges, adapter, photos, wanted))
        assert {pair.prompt for pair in result.of_kind(GENERIC)} == set(wanted.generic_prompts)
        digests.append(result.drift.probe_digest)
    assert digests[0] != digests[1] == digests[2]


def test_steering_and_evaluation_see_equal_mixes_of_different_prompts():
    sets = PromptSets.of(("a {}",), GENERIC_PROMPTS)
    assert len(sets.steering) == len(sets.held_out) == len(set(sets.steering + sets.held_out)) // 2 == 84
    assert set(sets.generic) < set(sets.held_out)
    assert not set(STEERING_TEMPLATES) & set(HELD_OUT_TEMPLATES)
    for templates in (STEERING_TEMPLATES, HELD_OUT_TEMPLATES):
        assert len(set(templates)) == 12
        for word in ("photo", "picture", "drawing", "beach", "snow", "city", "desert", "night"):
            assert sum(word in template for template in templates) in {2, 3}
    for place in ("on the beach", "in the snow", "in the city", "in a field"):
        for half in (sets.steering, sets.held_out):
            assert 18 <= sum(place in prompt for prompt in half) <= 24


def test_class_prompts_are_those_the_base_can_read(base):
    prompts = class_prompts(base, "duck")
    assert "a photo of a duck" in prompts
    assert all(not base.check_prompt(prompt).cut for prompt in prompts)
    with pytest.raises(MooringError) as caught:
        class_prompts(base, "duck " * 30)
    assert caught.value.reason is Reason.PROMPT_TOO_LONG


def test_sdxl_bases_are_evaluated_by_the_same_code(tiny_sdxl, judges, photos, config):
    from mooring_server.engine.adapters import AdapterWeights, LayerFactors, layer_shapes
    from mooring_server.engine.bank import AdapterBank
    from mooring_server.engine.base import load_base

    base = load_base(tiny_sdxl)
    bank = AdapterBank(base, slots=2, rank=2)
    generator = torch.Generator().manual_seed(8)
    layers = {
        name: LayerFactors(
            torch.randn(2, in_, generator=generator) / in_**0.5, torch.randn(out, 2, generator=generator) / 4
        )
        for name, (out, in_) in layer_shapes(base).items()
        if name.endswith("to_v")
    }
    small = dataclasses.replace(config, placeholder="", class_samples=0, seeds=(0,))
    result, _ = finish(evaluate(base, bank, judges, AdapterWeights(base.digest, 2, layers), photos, small))
    assert result.drift.value > 0
    assert "pres" not in result.metrics
