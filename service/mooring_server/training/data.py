"""From photos to cached latents and prompts.

A photo becomes a square at the base's native size, then a few variants: the photo itself, the others shifted
and zoomed by a few per cent, so that the place of the subject is not learnt with the subject. Colours are
never touched: a tinted variant teaches a tinted product. Every variant is encoded once; training reads
latents only.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mooring_server.engine.adapters import LearnedEmbeddings
from mooring_server.engine.base import BaseModel
from mooring_server.errors import MooringError, Reason
from mooring_server.evaluation.design import counter_generator
from mooring_server.evaluation.prompts import readable
from mooring_server.training.config import Framing, TrainConfig

SUBJECT_TEMPLATES = (
    "a photo of {article} {subject}",
    "a picture of {article} {subject}",
    "{article} {subject}",
    "the {subject}",
)
"""Training prompts; {subject} is "placeholder class-noun". They say nothing about the surroundings."""

MAX_SHIFT = 0.06
"""Largest shift of a variant, as a share of the side."""
ZOOM = (0.92, 1.1)
ENCODE_ROWS = 16


def subject_prompts(
    base: BaseModel, placeholder: str, class_noun: str, learned: LearnedEmbeddings | None
) -> list[str]:
    """Training prompts of the subject that the base reads in full; see `readable`.

    Raises:
        MooringError: PROMPT_TOO_LONG when even the shortest template does not fit.
    """
    noun = f"{placeholder} {class_noun}"
    prompts = [t.format(article="a", subject=noun) for t in SUBJECT_TEMPLATES]
    return readable(base, prompts, known=[*class_noun.split(), placeholder], embeddings=learned)


def square(photo: Image.Image, size: int, framing: Framing) -> Image.Image:
    """A square RGB picture of `size` pixels per side.

    Args:
        photo: any mode and size.
        size: pixels per side.
        framing: centre `crop`, or `letterbox`: the whole photo on the mean colour of its border.
    """
    photo = photo.convert("RGB")
    if framing == "crop":
        side = min(photo.size)
        left, top = (photo.width - side) // 2, (photo.height - side) // 2
        photo = photo.crop((left, top, left + side, top + side))
    elif photo.width != photo.height:
        side = max(photo.size)
        canvas = Image.new("RGB", (side, side), _border_colour(photo))
        canvas.paste(photo, ((side - photo.width) // 2, (side - photo.height) // 2))
        photo = canvas
    return photo.resize((size, size), Image.Resampling.LANCZOS)


def _border_colour(photo: Image.Image) -> tuple[int, int, int]:
    pixels = _pixels(photo)
    edges = torch.cat([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], dim=1)
    red, green, blue = ((edges.mean(1) + 1) * 127.5).round().int().tolist()
    return red, green, blue


def _pixels(photo: Image.Image) -> Tensor:
    """[3, H, W] in [-1, 1]."""
    raw = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8)
    return raw.view(photo.height, photo.width, 3).permute(2, 0, 1).float() / 127.5 - 1.0


def variants(photo: Image.Image, size: int, config: TrainConfig, index: int) -> Tensor:
    """The photo and its shifted, zoomed variants.

    Args:
        photo: RGB photo.
        size: pixels per side.
        config: framing, number of views, flip, seed.
        index: the photo's place, so that no two photos get the same shifts.

    Returns:
        `[views, 3, size, size]` in [-1, 1]; the first row is the photo itself.
    """
    plain = _pixels(square(photo, size, config.framing))
    rows = [plain]
    for view in range(1, config.views):
        g = counter_generator(config.seed, "view", index, view)
        zoom = float(torch.empty(1).uniform_(*ZOOM, generator=g))
        shift = torch.empty(2).uniform_(-2 * MAX_SHIFT, 2 * MAX_SHIFT, generator=g)
        mirror = -1.0 if config.flip and view % 2 else 1.0
        theta = torch.tensor([[mirror / zoom, 0.0, float(shift[0])], [0.0, 1.0 / zoom, float(shift[1])]])
        grid = F.affine_grid(theta[None], [1, 3, size, size], align_corners=False)
        moved = F.grid_sample(
            plain[None], grid, mode="bilinear", padding_mode="reflection", align_corners=False
        )
        rows.append(moved[0])
    return torch.stack(rows)


def cache_latents(
    base: BaseModel, photos: Sequence[Image.Image], config: TrainConfig
) -> Generator[None, None, Tensor]:
    """Encode every variant of every photo. One yield a tick.

    Returns:
        `[photos·views, C, h, w]` scaled latents, photo by photo.

    Raises:
        MooringError: SUBJECT_HAS_NO_PHOTOS without photos.
    """
    if not photos:
        raise MooringError(
            Reason.SUBJECT_HAS_NO_PHOTOS,
            "There are no photos to learn from.",
            remedy="Upload at least one photo; five to twenty from different sides work best.",
        )
    latents: list[Tensor] = []
    per_tick = max(1, ENCODE_ROWS // config.views)
    for first in range(0, len(photos), per_tick):
        chunk = photos[first : first + per_tick]
        pixels = torch.cat([variants(p, base.native_size, config, first + k) for k, p in enumerate(chunk)])
        latents.append(base.encode_images(pixels))
        yield
    return torch.cat(latents).contiguous()


def batch_indices(count: int, batch_size: int, seed: int, step: int, purpose: str = "batch") -> list[int]:
    """Which rows a step trains on: a fresh permutation per pass over the data, chosen by counter.

    Every row comes once per pass; a batch may span two passes.
    """
    chosen: list[int] = []
    position = step * batch_size
    while len(chosen) < batch_size:
        pass_, at = divmod(position, count)
        order = torch.randperm(count, generator=counter_generator(seed, purpose, pass_)).tolist()
        taken = order[at : at + batch_size - len(chosen)]
        chosen += taken
        position += len(taken)
    return chosen
