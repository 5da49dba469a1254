"""The two judges: a CLIP for text and image agreement, a self-distilled ViT (DINO) for the subject's looks.

Any local transformers directories do: a CLIPModel (`dinghy-clip`, `openai/clip-vit-base-patch32`) and a
ViTModel or Dinov2Model (`dinghy-dino`, `facebook/dino-vits16`). Pictures are prepared by the directories'
own preprocessor settings through transformers' Pillow backend, so no torchvision is needed and scores do
not depend on whether it is installed.

The judges run in float32: half precision moves a cosine by about 1e-3, which is the size of the effects
that are compared.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mooring_server.errors import MooringError, Reason

Picture = Image.Image | NDArray[np.uint8]
IMAGES_PER_PASS = 16


@dataclass(frozen=True)
class Judges:
    """Two frozen encoders with their preprocessing. Build with `load`.

    Attributes:
        digest: over both directories' files; figures of different judges do not compare.
    """

    clip: Any
    tokenizer: Any
    clip_processor: Any
    vit: Any
    vit_processor: Any
    device: torch.device
    digest: str

    @staticmethod
    def load(clip_dir: str | Path, dino_dir: str | Path, *, device: str = "cpu") -> Judges:
        """Load both judges from local directories.

        Raises:
            MooringError: JUDGES_NOT_AVAILABLE, naming the directory and what is wrong with it.
        """
        from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPTokenizer

        clip_path, dino_path = Path(clip_dir), Path(dino_dir)
        local: Any = {"local_files_only": True}
        processors: Any = AutoImageProcessor
        with _named(clip_path, "a CLIPModel with its tokenizer and preprocessor_config.json"):
            clip: Any = CLIPModel.from_pretrained(clip_path, **local)
            tokenizer = CLIPTokenizer.from_pretrained(clip_path, **local)
            clip_processor = processors.from_pretrained(clip_path, backend="pil", **local)
        with _named(dino_path, "a ViTModel or Dinov2Model with its preprocessor_config.json"):
            vit: Any = AutoModel.from_pretrained(dino_path, **local)
            vit_processor = processors.from_pretrained(dino_path, backend="pil", **local)
        return Judges(
            clip=clip.float().eval().requires_grad_(requires_grad=False).to(device),
            tokenizer=tokenizer,
            clip_processor=clip_processor,
            vit=vit.float().eval().requires_grad_(requires_grad=False).to(device),
            vit_processor=vit_processor,
            device=torch.device(device),
            digest=_files_digest(clip_path, dino_path),
        )

    def clip_image(self, images: Sequence[Picture]) -> Tensor:
        """CLIP image features [N,d] of unit length, on the CPU."""
        return self._encode(
            images, self.clip_processor, lambda x: self.clip.get_image_features(x).pooler_output
        )

    @torch.no_grad()
    def clip_text(self, prompts: Sequence[str]) -> Tensor:
        """CLIP text features [N,d] of unit length, on the CPU; longer prompts are cut at the model's end."""
        limit = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(self.device)
        features = self.clip.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask)
        return _unit(features.pooler_output)

    def dino(self, images: Sequence[Picture]) -> Tensor:
        """DINO CLS features [N,d] of unit length, on the CPU."""
        return self._encode(images, self.vit_processor, lambda x: self.vit(x).last_hidden_state[:, 0])

    @torch.no_grad()
    def _encode(
        self, images: Sequence[Picture], processor: Any, encode: Callable[[Tensor], Tensor]
    ) -> Tensor:
        features = []
        for first in range(0, len(images), IMAGES_PER_PASS):
            batch = [_rgb(image) for image in images[first : first + IMAGES_PER_PASS]]
            pixels = processor(images=batch, return_tensors="pt")["pixel_values"].to(self.device)
            features.append(_unit(encode(pixels)))
        return torch.cat(features)


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


def _rgb(picture: Picture) -> Image.Image:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    return image.convert("RGB")


@contextmanager
def _named(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever transformers raises about a directory into one sentence that names it."""
    try:
        os.scandir(path).close()  # transformers would take a missing directory for a hub id
        yield
    except Exception as error:  # the loaders raise OSError, ValueError, KeyError, SafetensorError, …
        why = str(error).partition("\n")[0] or type(error).__name__
        raise MooringError(
            Reason.JUDGES_NOT_AVAILABLE,
            f"cannot load a judge from {str(path)!r}: {why}.",
            remedy=f"Give a local directory that holds {expected}.",
        ) from error


def _files_digest(*directories: Path) -> str:
    """Over names and contents of all settings and weights, directory by directory."""
    digest = hashlib.sha256()
    for directory in directories:
        for file in sorted(directory.iterdir()):
            if file.suffix in {".json", ".txt", ".safetensors", ".bin"}:
                digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return "sha256:" + digest.hexdigest()
