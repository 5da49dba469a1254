from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from mooring_server.errors import MooringError, Reason
from mooring_server.evaluation.judges import Judges
from PIL import Image


def test_features_equal_those_of_plain_transformers(judges, judge_dirs, photos):
    from transformers import CLIPImageProcessorPil, CLIPModel, ViTImageProcessorPil, ViTModel

    clip_dir, dino_dir = judge_dirs
    with torch.no_grad():
        pixels = CLIPImageProcessorPil.from_pretrained(clip_dir)(photos, return_tensors="pt")
        expected = CLIPModel.from_pretrained(clip_dir).get_image_features(**pixels).pooler_output
        assert torch.allclose(judges.clip_image(photos), torch.nn.functional.normalize(expected), atol=1e-6)
        pixels = ViTImageProcessorPil.from_pretrained(dino_dir)(photos, return_tensors="pt")
        vit = ViTModel.from_pretrained(dino_dir, add_pooling_layer=False)
        expected = vit(**pixels).last_hidden_state[:, 0]
        assert torch.allclose(judges.dino(photos), torch.nn.functional.normalize(expected), atol=1e-6)


def test_features_are_unit_vectors_one_a_picture_whatever_its_form(judges, photos):
    alpha = photos[0].convert("RGBA")
    grey = photos[1].convert("L")
    array = np.asarray(photos[2])
    for features in (judges.clip_image([alpha, grey, array]), judges.dino([alpha, grey, array])):
        assert features.shape[0] == 3
        assert torch.allclose(features.norm(dim=-1), torch.ones(3), atol=1e-5)
    assert judges.clip_text(["a duck", "a red car on the beach"]).shape == (2, 12)


def test_a_text_feature_does_not_depend_on_its_neighbours_or_padding(judges):
    alone = judges.clip_text(["a duck"])
    beside = judges.clip_text(["a duck", "a photo of a red car on the beach"])
    assert torch.allclose(alone[0], beside[0], atol=1e-5)
    too_long = " ".join(["duck"] * 50)
    assert bool(torch.isfinite(judges.clip_text([too_long])).all())


def test_more_pictures_than_one_pass_keep_their_order(judges):
    pictures = [np.full((24, 24, 3), value, np.uint8) for value in range(0, 240, 12)]
    together = judges.dino(pictures)
    assert torch.allclose(together[17], judges.dino([pictures[17]])[0], atol=1e-5)


def test_the_digest_follows_the_weights(judges, judge_dirs, tmp_path):
    clip_dir, dino_dir = judge_dirs
    copy = tmp_path / "clip"
    shutil.copytree(clip_dir, copy)
    assert Judges.load(copy, dino_dir).digest == judges.digest
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert Judges.load(copy, dino_dir).digest != judges.digest


@pytest.mark.parametrize("fault", ["missing", "file", "empty", "no processor"])
def test_a_directory_that_is_no_judge_is_named(judge_dirs, tmp_path, fault):
    clip_dir, dino_dir = judge_dirs
    broken = tmp_path / "broken"
    if fault == "file":
        broken.write_text("x")
    elif fault == "empty":
        broken.mkdir()
    elif fault == "no processor":
        shutil.copytree(clip_dir, broken)
        (broken / "preprocessor_config.json").unlink(missing_ok=True)
        (broken / "processor_config.json").unlink(missing_ok=True)
    with pytest.raises(MooringError) as caught:
        Judges.load(broken, dino_dir)
    assert caught.value.reason is Reason.JUDGES_NOT_AVAILABLE
    assert str(broken) in caught.value.message


def test_real_world_layout_of_dinov2_works_too(judge_dirs, tmp_path, photos):
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(5)
    Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    ).save_pretrained(tmp_path)
    BitImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_center_crop=True
    ).save_pretrained(tmp_path)
    features = Judges.load(judge_dirs[0], tmp_path).dino([*photos, Image.new("RGB", (512, 300))])
    assert features.shape == (4, 16)
