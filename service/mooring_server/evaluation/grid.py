"""One picture that shows what the table says: rows are arms, columns are prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mooring_server.evaluation.arms import Arm, arms_of
from mooring_server.evaluation.result import GENERIC, SUBJECT, EvaluationResult, ImagePair

T = TypeVar("T")

COLUMNS = 6
GAP = 6
LABEL_WIDTH = 168
MARGIN = 20
INK, FAINT, PAPER, RULE = (24, 28, 36), (104, 112, 124), (255, 255, 255), (222, 226, 232)


def grid(
    results: Sequence[tuple[str, EvaluationResult]],
    *,
    photos: Sequence[Image.Image] = (),
    subject_prompts: int = 12,
    generic_prompts: int = 6,
    cell: int = 128,
) -> Image.Image:
    """Prompts × arms, first the subject in new scenes, then prompts that have nothing to do with it.

    The pictures of a column come from the same noise. Prompts beyond the wanted number are left out evenly,
    never by how they came out.

    Args:
        results: (label, evaluation) of each arm; the base's row comes first by itself.
        photos: subject photos for a first strip.
        subject_prompts: largest number of subject columns.
        generic_prompts: largest number of generic columns.
        cell: pixels a picture's side is shown at.

    Returns:
        RGB picture.

    Raises:
        MooringError: INVALID_FIELD when the evaluations do not compare.
    """
    arms = arms_of(results)
    pairs = results[0][1].pairs
    blocks: list[Image.Image] = []
    if photos:
        strip = [np.asarray(_square(photo)) for photo in _evenly(list(photos), COLUMNS)]
        blocks.append(_block([("photos", "", strip)], [""] * len(strip), cell))
    for kind, wanted in ((SUBJECT, subject_prompts), (GENERIC, generic_prompts)):
        chosen = _evenly(_first_seed(pairs, kind), wanted)
        shared = _shared_start([pairs[i].base_prompt for i in chosen])
        for first in range(0, len(chosen), COLUMNS):
            columns = chosen[first : first + COLUMNS]
            captions = [pairs[i].base_prompt.removeprefix(shared) for i in columns]
            rows = [(arm.label, _figures(arm, kind), [arm.images[i] for i in columns]) for arm in arms]
            blocks.append(_block(rows, captions, cell))
    height = sum(block.height for block in blocks) + MARGIN * (len(blocks) + 1)
    page = Image.new("RGB", (max(block.width for block in blocks) + 2 * MARGIN, height), PAPER)
    top = MARGIN
    for i, block in enumerate(blocks):
        if i:
            line = top - MARGIN // 2
            ImageDraw.Draw(page).line([(MARGIN, line), (page.width - MARGIN, line)], RULE, 1)
        page.paste(block, (MARGIN, top))
        top += block.height + MARGIN
    return page


def _figures(arm: Arm, kind: str) -> str:
    """Small print under a row's label: the figures that the row's pictures stand for."""
    wanted = (
        [("DINO", "dino"), ("CLIP-T", "clip_t")]
        if kind == SUBJECT
        else [("CLIP-T", "generic_clip_t"), ("drift", "drift")]
    )
    return "\n".join(f"{name} {arm.metrics[key]:.3f}" for name, key in wanted if key in arm.metrics)


def _block(
    rows: Sequence[tuple[str, str, Sequence[NDArray[np.uint8]]]], captions: Sequence[str], cell: int
) -> Image.Image:
    lines = [_wrapped(caption, cell) for caption in captions]
    head = max((len(text.splitlines()) for text in lines), default=0) * 18 + (4 if any(lines) else 0)
    width = LABEL_WIDTH + len(captions) * (cell + GAP) - GAP
    block = Image.new("RGB", (width, head + len(rows) * (cell + GAP) - GAP), PAPER)
    draw = ImageDraw.Draw(block)
    for column, text in enumerate(lines):
        x = LABEL_WIDTH + column * (cell + GAP) + cell // 2
        draw.multiline_text((x, head - 6), text, INK, _font(14), anchor="md", align="center", spacing=2)
    for row, (label, figures, images) in enumerate(rows):
        y = head + row * (cell + GAP)
        draw.text((0, y + cell // 2 - 22), label, INK, _font(19), anchor="lm")
        draw.multiline_text((0, y + cell // 2 - 8), figures, FAINT, _font(15), spacing=3)
        for column, image in enumerate(images):
            shown = Image.fromarray(image).resize((cell, cell), _filter(image.shape[0], cell))
            block.paste(shown, (LABEL_WIDTH + column * (cell + GAP), y))
    return block


def _filter(side: int, cell: int) -> Image.Resampling:
    """Small pictures keep their pixels at whole multiples; everything else is resampled well."""
    return Image.Resampling.NEAREST if cell % side == 0 else Image.Resampling.LANCZOS


def _first_seed(pairs: Sequence[ImagePair], kind: str) -> list[int]:
    """Index of the first picture of each prompt of a kind."""
    firsts: dict[str, int] = {}
    for i, pair in enumerate(pairs):
        if pair.kind == kind:
            firsts.setdefault(pair.prompt, i)
    return list(firsts.values())


def _evenly(items: list[T], wanted: int) -> list[T]:
    if len(items) <= wanted:
        return items
    return [items[i * len(items) // wanted] for i in range(wanted)]


def _shared_start(prompts: Sequence[str]) -> str:
    """The words all prompts begin with, so that captions show what differs."""
    if len(prompts) < 2:
        return ""
    words = [prompt.split() for prompt in prompts]
    count = 0
    while all(len(w) > count + 1 and w[count] == words[0][count] for w in words):
        count += 1
    return "".join(word + " " for word in words[0][:count])


def _wrapped(text: str, width: int) -> str:
    lines: list[str] = []
    for word in text.split():
        if lines and _font(14).getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def _square(photo: Image.Image) -> Image.Image:
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return photo.convert("RGB").crop((left, top, left + side, top + side))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font: the same on every machine."""
    return ImageFont.load_default(size)
