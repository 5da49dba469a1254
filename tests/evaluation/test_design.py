from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mooring_server.evaluation.design import (
    bootstrap_ratio,
    counter_generator,
    interleave,
    stratified_timesteps,
    weighted_ratio,
)


@settings(max_examples=60, deadline=None)
@given(prompts=st.integers(2, 40), rounds=st.sampled_from([1, 2, 4, 5, 8]), seed=st.integers(0, 9))
def test_each_prompt_visits_each_band_of_time_once(prompts, rounds, seed):
    t = stratified_timesteps(prompts, rounds, 1000, seed).reshape(rounds, prompts)
    bands = t * rounds // 1000
    assert t.min() >= 0
    assert t.max() < 1000
    for prompt in range(prompts):
        assert sorted(bands[:, prompt].tolist()) == list(range(rounds))
    for round_ in range(rounds):
        counts = torch.bincount(bands[round_], minlength=rounds)
        assert counts.max() - counts.min() <= 1


def test_points_of_one_band_are_spread_over_the_band():
    t = stratified_timesteps(24, 4, 1000, seed=3).reshape(4, 24)
    in_first_band = sorted(t[t < 250].tolist())
    assert len(in_first_band) == 24
    # 6 cells of a band are visited by every round: no sixth of the band stays empty
    assert {int(x * 6 // 250) for x in in_first_band} == set(range(6))


def test_random_numbers_depend_on_seed_and_path_only():
    def draw(seed, *path):
        return torch.randn(4, generator=counter_generator(seed, *path))

    assert torch.equal(draw(1, "noise", 7), draw(1, "noise", 7))
    different = [draw(1, "noise", 7), draw(2, "noise", 7), draw(1, "noise", 8), draw(1, "x0", 7)]
    for i, a in enumerate(different):
        for b in different[i + 1 :]:
            assert not torch.equal(a, b)


def test_class_prompts_lie_evenly_between_generic_ones():
    prompts, is_class = interleave([f"g{i}" for i in range(9)], ["c0", "c1", "c2", "c0"])
    assert len(prompts) == 12, "repeats count once"
    for third in range(3):
        assert sum(is_class[third * 4 : third * 4 + 4]) == 1
    assert [p for p, c in zip(prompts, is_class, strict=True) if not c] == [f"g{i}" for i in range(9)]


def test_interval_covers_the_true_ratio_about_as_often_as_promised():
    covered = 0
    for trial in range(200):
        generator = counter_generator(5, "trial", trial)
        level = torch.rand(24, generator=generator).repeat_interleave(4) + 0.5
        energy = level * (0.8 + 0.4 * torch.rand(96, generator=generator))
        clusters = torch.arange(24).repeat_interleave(4)
        own = (0.1 * torch.randn(24, generator=generator).exp()).repeat_interleave(4)
        truth = 0.1 * 2.718281828**0.5  # mean of a log-normal
        _, low, high = bootstrap_ratio(own * energy, energy, clusters, resamples=400, seed=trial)
        covered += low <= truth <= high
    # a percentile interval over 24 skewed clusters undercovers a little; far off would mean broken pairing
    assert 0.80 <= covered / 200 <= 0.99


def test_interval_has_no_width_when_every_cluster_has_the_same_ratio():
    energy = torch.rand(48, generator=counter_generator(0, "e")) + 0.1
    ratio, low, high = bootstrap_ratio(0.25 * energy, energy, torch.arange(48) % 12)
    assert ratio == pytest.approx(0.25, rel=1e-6)
    assert high - low < 1e-6, "numerator and denominator are resampled together"


def test_resampling_takes_whole_clusters():
    # one deviating cluster of many points: naive resampling of points would give a far narrower interval
    numerator = torch.ones(400)
    numerator[:100] = 5.0
    clusters = torch.arange(400) // 100
    _, low, high = bootstrap_ratio(numerator, torch.ones(400), clusters)
    assert low == pytest.approx(1.0)
    assert high >= 3.9


def test_strata_weigh_what_they_are_told_to():
    numerator = torch.tensor([1.0, 3.0, 10.0])
    denominator = torch.tensor([2.0, 2.0, 4.0])
    strata = torch.tensor([0, 0, 1])
    expected = (0.75 * 2.0 + 0.25 * 10.0) / (0.75 * 2.0 + 0.25 * 4.0)
    assert weighted_ratio(numerator, denominator, strata, (0.75, 0.25)) == pytest.approx(expected)
    repeated = torch.tensor([0, 1, 2, 2, 2, 2])
    found = weighted_ratio(numerator[repeated], denominator[repeated], strata[repeated], (0.75, 0.25))
    assert found == pytest.approx(expected), "points of one stratum more or less change nothing"
    assert weighted_ratio(numerator[:2], denominator[:2], strata[:2], (0.75, 0.25)) == pytest.approx(1.0)


def test_clusters_are_resampled_within_their_stratum():
    # two strata that differ in everything and vary in nothing: mixing them up would give the interval width
    strata = torch.arange(40) % 2
    numerator, denominator = 1.0 + 4.0 * strata, 2.0 - strata
    ratio, low, high = bootstrap_ratio(numerator, denominator, torch.arange(40), strata, (0.5, 0.5))
    assert ratio == pytest.approx(2.0)
    assert low == pytest.approx(high) == pytest.approx(2.0)


def test_a_rare_stratum_widens_the_interval():
    generator = counter_generator(1, "rare")
    numerator = 1.0 + 0.5 * torch.randn(44, generator=generator)
    strata = (torch.arange(44) >= 40).long()
    widths = []
    for weights in ((1.0, 0.0), (0.5, 0.5)):
        _, low, high = bootstrap_ratio(numerator, torch.ones(44), torch.arange(44), strata, weights)
        widths.append(high - low)
    assert widths[1] > 1.3 * widths[0]
