"""The shipped directories load with plain diffusers and transformers and give finite pictures."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from mooring_server import dinghy
from mooring_server.dinghy import codec, nouns
from mooring_server.dinghy.preset import SHIPPED, SMALL
from PIL import Image
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPProcessor, CLIPTokenizer


@pytest.fixture(scope="module", params=[SHIPPED, SMALL], ids=lambda preset: preset.version)
def preset(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(preset):
    folder = dinghy.base_dir(preset.version)
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_manifest_matches_every_file():
    root = dinghy.weights_dir()
    manifest = json.loads((root / "MANIFEST.json").read_text())
    assert manifest["version"] == dinghy.VERSION
    present = {
        p.relative_to(root).as_posix()
        for p in root.rglob("*")
        if p.is_file() and p.name not in ("MANIFEST.json", "README.md")
    }
    assert present == set(manifest["files"])
    for name, entry in manifest["files"].items():
        data = (root / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], name
        assert len(data) == entry["bytes"]
    assert sum(e["bytes"] for e in manifest["files"].values()) <= 80e6


def test_all_weights_are_fp16_safetensors():
    files = list(dinghy.weights_dir().rglob("*.safetensors"))
    assert len(files) == 2 * 3 + 2 + 1  # of two bases, their judges and the shipped one's ruler
    for path in files:
        with safe_open(path, "pt") as tensors:
            kinds = {tensors.get_tensor(k).dtype for k in tensors.keys()}  # noqa: SIM118 - not a dict
        assert {k for k in kinds if k.is_floating_point} == {torch.float16}, path
    assert not [p for p in dinghy.weights_dir().rglob("*") if p.suffix in {".bin", ".pt", ".pkl", ".ckpt"}]


def test_no_configuration_says_where_it_was_made():
    for path in dinghy.weights_dir().rglob("*.json"):
        assert "_name_or_path" not in path.read_text(), path


def test_base_loads_as_stable_diffusion_and_draws(pipeline, preset):
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    generator = torch.Generator().manual_seed(1)
    out = pipeline(
        ["a photo of a cat on the beach", "a photo of a gift in the snow"],
        num_inference_steps=8,
        guidance_scale=4.0,
        generator=generator,
        output_type="np",
    ).images
    assert out.shape == (2, preset.px, preset.px, 3)
    assert np.isfinite(out).all()
    # snow is brighter than nothing at all, and neither picture is flat grey
    assert out.std(axis=(1, 2, 3)).min() > 0.08


def test_same_seed_same_picture(pipeline):
    pictures = [
        pipeline(
            "a photo of a car in the desert",
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(7),
            output_type="np",
        ).images
        for _ in range(2)
    ]
    assert np.array_equal(*pictures)


def test_codec_restores_photos_at_30_db(pipeline, preset):
    photos = [Image.open(s.photos[0]).convert("RGB") for s in dinghy.held_out_subjects()]
    small = np.stack([np.asarray(p.resize((preset.px,) * 2, Image.Resampling.BOX)) for p in photos])
    pixels = torch.from_numpy(small).permute(0, 3, 1, 2).float() / 255
    assert codec.psnr(pipeline.vae, pixels) > 30


def test_scheduler_is_the_one_it_was_trained_with(pipeline):
    config = pipeline.scheduler.config
    assert config.prediction_type == "v_prediction"
    assert config.clip_sample is False
    assert config.timestep_spacing == "trailing"


def test_clip_prefers_the_true_caption():
    folder = dinghy.clip_dir()
    model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    photos = [photo for subject in dinghy.held_out_subjects() for photo in subject.photos[:3]]
    images = [Image.open(photo).convert("RGB") for photo in photos]
    captions = ["a thing on a wooden floor", "a thing on a white background", "a thing on the grass"]
    inputs = processor(text=captions, images=images, return_tensors="pt", padding="max_length")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
    assert torch.isfinite(logits).all()
    # Photos go round wood, white, grass.
    right = (logits.argmax(1) == torch.arange(len(images)) % 3).float().mean()
    assert right > 0.9


def test_dino_tells_held_out_subjects_apart():
    folder = dinghy.dino_dir()
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    subjects = dinghy.held_out_subjects()
    features = []
    for subject in subjects:
        images = [Image.open(p).convert("RGB") for p in subject.photos]
        with torch.no_grad():
            cls = model(**processor(images, return_tensors="pt")).last_hidden_state[:, 0]
        features.append(torch.nn.functional.normalize(cls, dim=-1))
    # Photos go round wood, white, grass. Query: on grass; bank: wood and white. The scene must not decide.
    bank = torch.cat([torch.cat([f[0::3], f[1::3]]) for f in features])
    query = torch.cat([f[2::3] for f in features])
    found = (query @ bank.T).argmax(1) // 8
    share = (found == torch.arange(len(subjects)).repeat_interleave(4)).float().mean()
    assert share > 0.6, share


def test_shipped_tokenizer_knows_the_world(preset):
    for folder in (dinghy.base_dir(preset.version) / "tokenizer", dinghy.clip_dir()):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        for noun in preset.names:
            assert len(tokenizer.tokenize(noun)) == len(noun.split())
        for word in preset.words():
            assert len(tokenizer.tokenize(word)) == 1, word
        assert tokenizer.add_tokens(["<rocket>"]) == 1


def test_subjects_have_twelve_photos_a_card_and_a_licence():
    subjects = dinghy.held_out_subjects()
    assert len(subjects) >= 10
    assert {s.name for s in subjects} == {s.name for s in nouns.HELD_OUT}
    for subject in subjects:
        assert len(subject.photos) == 12
        assert subject.licence == "MIT"
        assert subject.placeholder.startswith("<")
        for photo in subject.photos:
            with Image.open(photo) as image:
                assert image.size == (128, 128)
                assert image.mode == "RGB"
