"""Stand-in artwork, so that dinghy's tests need no download."""

from __future__ import annotations

import numpy as np
import pytest
from mooring_server.dinghy import nouns
from mooring_server.dinghy.sources import SPRITE_PX, Sprites
from mooring_server.dinghy.world import TRAIN_STYLES


def disc(seed: int) -> np.ndarray:
    """A coloured disc, uint8 ``[128, 128, 4]``."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SPRITE_PX, :SPRITE_PX] - SPRITE_PX / 2
    sprite = np.zeros((SPRITE_PX, SPRITE_PX, 4), np.uint8)
    sprite[x**2 + y**2 < (SPRITE_PX * 0.45) ** 2] = [*rng.integers(30, 226, 3), 255]
    return sprite


@pytest.fixture(scope="session")
def sprites() -> Sprites:
    rows = []
    for noun, (code, hyper) in nouns.NAMED.items():
        rows += [(noun, hyper, style, code, "named") for style in (*TRAIN_STYLES, "noto")]
    rows += [("", hyper, "3d", f"X{i}", "extra") for i, hyper in enumerate(nouns.HYPERNYMS)]
    rows += [(s.name, s.class_noun, "3d", s.code, "held") for s in nouns.HELD_OUT]
    pixels = np.stack([disc(i) for i in range(len(rows))])
    columns = [list(c) for c in zip(*rows, strict=True)]
    return Sprites(pixels, *columns)
