"""Tiny judges, a tiny base with its bank, a random adapter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mooring_server.engine.adapters import AdapterWeights, LayerFactors, LearnedEmbeddings, layer_shapes
from mooring_server.engine.bank import AdapterBank
from mooring_server.engine.base import load_base
from mooring_server.evaluation.config import EvaluationConfig
from mooring_server.evaluation.judges import Judges
from PIL import Image
from tiny_judges import save_tiny_clip, save_tiny_vit


@pytest.fixture(scope="session")
def base(tiny_sd15):
    return load_base(tiny_sd15)


@pytest.fixture(scope="session")
def bank(base):
    return AdapterBank(base, slots=4, rank=4)


@pytest.fixture(scope="session")
def judge_dirs(tmp_path_factory, base):
    root = tmp_path_factory.mktemp("judges")
    return save_tiny_clip(root / "clip", base.tokenizers[0]), save_tiny_vit(root / "dino")


@pytest.fixture(scope="session")
def judges(judge_dirs):
    return Judges.load(*judge_dirs)


@pytest.fixture(scope="session")
def photos():
    noise = np.random.default_rng(0).integers(0, 255, (3, 40, 30, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


@pytest.fixture(scope="session")
def adapter(base):
    generator = torch.Generator().manual_seed(7)
    layers = {
        name: LayerFactors(
            torch.randn(2, in_, generator=generator) / in_**0.5, torch.randn(out, 2, generator=generator) / 4
        )
        for name, (out, in_) in layer_shapes(base).items()
        if name.endswith(("to_q", "to_v"))
    }
    width = base.text_encoders[0].config.hidden_size
    learned = LearnedEmbeddings({"<duck>": (torch.randn(1, width, generator=generator),)})
    return AdapterWeights(base.digest, 2, layers, learned, {})


@pytest.fixture(scope="session")
def config():
    return EvaluationConfig(
        prompts=("a photo of a {} on the beach", "a {} in the snow"),
        generic_prompts=("a red car", "a blue cat on the grass", "a dog in the city"),
        class_noun="duck",
        placeholder="<duck>",
        seeds=(3, 4),
        steps=2,
        class_samples=2,
        probe_points=12,
        budget=0.1,
    )
