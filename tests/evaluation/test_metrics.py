from __future__ import annotations

import pytest
import torch
from mooring_server.evaluation import metrics


def unit(*rows):
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


def test_clip_t_pairs_each_image_with_its_own_prompt():
    images, texts = unit([1, 0], [0, 1], [1, 1]), unit([1, 0], [1, 0], [1, 0])
    assert metrics.clip_t(images, texts).tolist() == pytest.approx([1.0, 0.0, 0.5**0.5])


def test_photo_similarity_is_the_mean_over_all_photos():
    assert metrics.photo_similarity(unit([1, 0]), unit([1, 0], [0, 1], [-1, 0])).tolist() == pytest.approx(
        [0.0]
    )


def test_div_is_zero_for_equal_samples_and_one_for_orthogonal_ones():
    assert metrics.div(unit([1, 2], [1, 2], [1, 2])) == pytest.approx(0.0, abs=1e-6)
    assert metrics.div(unit([1, 0, 0], [0, 1, 0], [0, 0, 1])) == pytest.approx(1.0)
    assert metrics.div(unit([1, 0])) is None


def test_same_seed_distance_is_zero_where_nothing_changed():
    features = unit([3, 1], [1, 2])
    assert metrics.same_seed_distance(features, features).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert metrics.same_seed_distance(features, -features).tolist() == pytest.approx([2.0, 2.0])


def test_prompts_weigh_the_same_however_many_images_they_have():
    mean, low, high = metrics.mean_over_prompts([("a", 1.0), ("a", 1.0), ("a", 1.0), ("b", 0.0)])
    assert mean == pytest.approx(0.5)
    assert low <= 0.5 <= high
    assert metrics.mean_over_prompts([]) is None
    assert metrics.per_prompt([("b", 0.5), ("a", 1.0), ("b", 1.5)]) == {"b": 1.0, "a": 1.0}
