"""The ruler's file: written, read back, refused when it is not what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mooring_server import dinghy
from mooring_server.dinghy.classifier import WEIGHTS_FILE, Classifier, load_ruler, read, save_ruler
from mooring_server.dinghy.preset import SHIPPED, SMALL
from PIL import Image
from safetensors.torch import load_file, save_file


def _fresh(preset) -> Classifier:
    torch.manual_seed(0)
    return Classifier(preset).eval()


def test_a_ruler_reads_the_same_after_a_round_trip(tmp_path):
    model = _fresh(SMALL)
    save_ruler(tmp_path, model)
    again = load_ruler(tmp_path, SMALL)
    assert {value.dtype for value in load_file(tmp_path / WEIGHTS_FILE).values()} == {torch.float16}
    pictures = np.random.default_rng(0).integers(0, 256, (3, SMALL.px, SMALL.px, 3), np.uint8)
    assert read(again, pictures) == read(model.half().float(), pictures)


def test_a_missing_ruler_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="dinghy ruler --preset dinghy-1"):
        load_ruler(tmp_path, SMALL)


def test_another_presets_ruler_is_refused(tmp_path):
    save_ruler(tmp_path, _fresh(SMALL))
    with pytest.raises(ValueError, match="no ruler of dinghy-4"):
        load_ruler(tmp_path, SHIPPED)


def test_a_ruler_with_values_that_are_not_finite_is_refused(tmp_path):
    save_ruler(tmp_path, _fresh(SMALL))
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="not finite"):
        load_ruler(tmp_path, SMALL)


def test_the_shipped_ruler_reads_scenes_of_subjects_that_it_never_saw():
    model = load_ruler(dinghy.ruler_dir(), SHIPPED)
    for subject in dinghy.held_out_subjects():
        photos = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in subject.photos])
        scenes = [reading.scene for reading in read(model, photos)]
        wanted = [dinghy.PHOTO_SCENES[k % 3] for k in range(len(photos))]
        assert sum(a == b for a, b in zip(scenes, wanted, strict=True)) >= 11, subject.name
