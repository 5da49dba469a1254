"""Write trained models in their public layouts, fp16 safetensors, with digests."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import text
from .classifier import Classifier, save_ruler
from .preset import Preset

FLOAT32 = "float32"
WORDS_FILE = "trained_words.json"


def _declare_float32(folder: Path) -> None:
    """Say float32 in a transformers config whose file holds fp16.

    transformers loads in the declared precision by default and diffusers in float32; a text
    encoder left in fp16 beside a float32 UNet fails on its first product.
    """
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = FLOAT32
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _tidy(path: Path) -> None:
    """Take out of a diffusers config what says nothing about the model."""
    config: dict[str, Any] = json.loads(path.read_text())
    config.pop("_name_or_path", None)  # where on this machine a part was loaded from
    if config["_class_name"] == "AutoencoderTiny":
        # it derives this entry itself and warns when it reads it back
        config.pop("block_out_channels", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_codec(folder: Path, vae: Any) -> None:
    """Write ``folder/vae`` alone, in the codec's own precision."""

    def write(part: Path) -> None:
        vae.save_pretrained(part)
        _tidy(part / "config.json")

    _replace(folder / "vae", write)


def export_base(out: Path, preset: Preset, unet: Any, encoder: Any, vae: Any) -> None:
    """Write a StableDiffusionPipeline directory, and beside it the words that captions held.

    The models are left in fp16 on the CPU.
    """
    from diffusers import StableDiffusionPipeline

    from .t2i import build_scheduler

    kind: Any = StableDiffusionPipeline  # diffusers ships no types
    pipeline = kind(
        vae=vae.cpu(),
        text_encoder=encoder.cpu(),
        tokenizer=text.build_tokenizer(preset),
        unet=unet.cpu(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16)

    def write(folder: Path) -> None:
        pipeline.save_pretrained(folder, safe_serialization=True)
        _declare_float32(folder / "text_encoder")
        words = sorted(preset.words())
        for part in ("vae", "unet"):
            _tidy(folder / part / "config.json")
        (folder / WORDS_FILE).write_text(json.dumps(words, indent=0) + "\n")

    _replace(out, write)


def _replace(out: Path, write: Callable[[Path], None]) -> None:
    """Call ``write(folder)`` on a fresh folder, then put it in ``out``'s place."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def export_ruler(out: Path, model: Classifier) -> None:
    """Write the ruler's weights (fp16)."""
    _replace(out, partial(save_ruler, model=model))


def export_judge(out: Path, model: Any, parts: list[Any]) -> None:
    """Write a transformers model (fp16 file, float32 when loaded) and its tokenizer or processor."""

    def write(folder: Path) -> None:
        model.cpu().half().save_pretrained(folder, safe_serialization=True)
        for part in parts:
            part.save_pretrained(folder)
        _declare_float32(folder)

    _replace(out, write)
    model.float()


def write_manifest(root: Path, preset: Preset, figures: dict[str, Any]) -> None:
    """``MANIFEST.json``: version, size and SHA-256 of every file, training figures and measurements."""
    files = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.name not in ("MANIFEST.json", "README.md"):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            files[path.relative_to(root).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    manifest = {"version": preset.version, "files": files, "figures": figures}
    part = root / "MANIFEST.part"
    part.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    part.rename(root / "MANIFEST.json")


def read_figures(root: Path) -> dict[str, Any]:
    """The figures of ``MANIFEST.json``; empty where there is none."""
    path = root / "MANIFEST.json"
    found: dict[str, Any] = json.loads(path.read_text())["figures"] if path.exists() else {}
    return found
