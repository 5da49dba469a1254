"""A classifier as a directory, with tiny random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mooring_server.errors import MooringError, Reason
from mooring_server.safety.images import ClassifierCheck
from tiny_judges import save_tiny_classifier


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_classifier(tmp_path_factory.mktemp("classifier"))


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (32, 40, 3), dtype=np.uint8)


def test_the_probability_of_the_labels_decides(directory: Path) -> None:
    for seed in range(3):
        strict = ClassifierCheck.load(directory, ["nsfw"], 1e-6).judge(pixels(seed))
        lax = ClassifierCheck.load(directory, ["NSFW"], 0.999).judge(pixels(seed))
        both = ClassifierCheck.load(directory, ["nsfw", "normal"], 0.99).judge(pixels(seed))
        assert (strict.allowed, strict.category) == (False, "nsfw")
        assert (lax.allowed, lax.category) == (True, "")
        assert 0 < strict.score == lax.score < 1
        assert both.score == pytest.approx(1)
        assert not both.allowed


def test_the_score_is_what_transformers_gives(directory: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(directory)
    inputs = AutoImageProcessor.from_pretrained(directory)(images=[pixels(1)], return_tensors="pt")
    with torch.no_grad():
        expected = float(model(**inputs).logits[0].softmax(-1)[1])
    assert ClassifierCheck.load(directory, ["nsfw"], 0.5).judge(pixels(1)).score == pytest.approx(expected)


@pytest.mark.parametrize("refuse", [["porn"], []])
def test_labels_that_it_does_not_have_are_said(directory: Path, refuse: list[str]) -> None:
    with pytest.raises(MooringError, match="normal, nsfw"):
        ClassifierCheck.load(directory, refuse, 0.5)


def test_a_name_is_never_looked_for_on_a_hub() -> None:
    with pytest.raises(MooringError, match="no directory"):
        ClassifierCheck.load("someone/nsfw", ["nsfw"], 0.5)


def test_a_pickle_is_refused(directory: Path, tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(MooringError) as caught:
        ClassifierCheck.load(tmp_path, ["nsfw"], 0.5)
    assert caught.value.reason is Reason.INVALID_FIELD
