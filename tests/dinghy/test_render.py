"""Pictures are what the samples say: in place, in colour, mirrored, on their background."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mooring_server.dinghy import nouns
from mooring_server.dinghy.preset import LARGE
from mooring_server.dinghy.render import Renderer, lay_out, to_uint8
from mooring_server.dinghy.sources import SPRITE_PX, Sprites
from mooring_server.dinghy.world import Ground, Piece, Placement, Sample, World

BLACK = Ground("plain-black", 0, 0.5, 0.5, flip=False)


def _sprites(pixels: np.ndarray) -> Sprites:
    return Sprites(pixels[None], ["cat"], ["animal"], ["3d"], ["1F431"], ["named"])


@pytest.fixture(scope="module")
def square() -> Renderer:
    """Draws an opaque square whose left half is white and right half dark grey."""
    pixels = np.full((SPRITE_PX, SPRITE_PX, 4), 255, np.uint8)
    pixels[:, SPRITE_PX // 2 :, :3] = 60
    return Renderer(_sprites(pixels), 64)


def _draw(renderer: Renderer, *pieces: Piece) -> np.ndarray:
    return renderer.pictures([Sample(BLACK, pieces, "", ("cat",), "animal")])[0]


def test_an_upright_square_lies_where_it_was_put(square):
    image = _draw(square, Piece(0, Placement(20, 0, 10, -5, flip=False)))
    rows, columns = np.nonzero(image.min(-1) > 40)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (32, 51, 17, 36)
    assert image[20, 34].min() == 255
    assert image[20, 50].tolist() == [60, 60, 60]


def test_coverage_is_where_objects_lie(square):
    under, over = Placement(20, 0, 10, -5, flip=False), Placement(10, 0, -20, 20, flip=False)
    empty = Sample(BLACK, (), "", (), "")
    layout = lay_out([Sample(BLACK, (Piece(0, under), Piece(0, over)), "", ("cat",), "animal"), empty])
    pixels, cover = square.draw_covered(layout)
    assert torch.equal(pixels, square.draw(layout))
    assert cover.shape == (2, 1, 64, 64)
    assert cover[0].sum() == pytest.approx(20 * 20 + 10 * 10, rel=0.02)
    assert cover[0, 0, 17:37, 32:52].min() > 0.5
    assert not cover[1].any()


def test_mirroring_swaps_the_halves(square):
    image = _draw(square, Piece(0, Placement(20, 0, 10, -5, flip=True)))
    assert image[20, 50].min() == 255
    assert image[20, 34].tolist() == [60, 60, 60]


def test_later_objects_cover_earlier_ones(square):
    under, over = Placement(30, 0, 0, 0, flip=False), Placement(10, 0, 0, 0, flip=False)
    red = Piece(0, over, colour=(1, 0, 0, 0, 0, 0, 0, 0, 0))
    image = _draw(square, Piece(0, under), red)
    assert image[32, 29].tolist() == [255, 0, 0]
    assert image[32, 20].min() == 255


@given(
    size=st.floats(20, 60), angle=st.floats(-30, 30), dx=st.floats(-20, 20), dy=st.floats(-20, 20),
    flip=st.booleans(), aspect=st.floats(0.6, 1.6), shear=st.floats(-0.4, 0.4), bend=st.floats(-0.2, 0.2),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_placement_draws_something_and_stays_in_range(
    square, size, angle, dx, dy, flip, aspect, shear, bend
):
    piece = Piece(0, Placement(size, angle, dx, dy, flip, aspect, shear), warp=(bend, 3, 0, bend, 2, 1))
    pixels = square.draw(lay_out([Sample(BLACK, (piece,), "", ("cat",), "animal")]))
    assert pixels.shape == (1, 3, 64, 64)
    assert torch.isfinite(pixels).all()
    assert pixels.max() > 0.2


def test_transparent_edges_take_no_colour_from_outside():
    pixels = np.zeros((SPRITE_PX, SPRITE_PX, 4), np.uint8)
    pixels[..., 1] = 255  # green, but invisible
    pixels[32:96, 32:96] = (200, 0, 0, 255)
    renderer = Renderer(_sprites(pixels), 64)
    image = _draw(renderer, Piece(0, Placement(41.3, 7, 0.4, 0.2, flip=False)))
    ground = _draw(renderer)
    assert (image[..., 1] <= ground[..., 1]).all()


@pytest.mark.parametrize("tint", list(nouns.TINTS))
def test_a_tint_gives_the_hue_and_keeps_the_shading(tint):
    pixels = np.zeros((SPRITE_PX, SPRITE_PX, 4), np.uint8)
    pixels[20:100, 20:100] = (120, 90, 60, 255)
    pixels[40:60, 40:60, :3] = 250
    renderer = Renderer(_sprites(pixels), 64)
    image = _draw(renderer, Piece(0, Placement(64, 0, 0, 0, flip=False), tint)).astype(float)
    inside = image[12:48, 12:48]
    mean = inside.reshape(-1, 3).mean(0)
    distances = {
        name: np.abs(mean - np.asarray(rgb) * mean.sum() / sum(rgb)).sum()
        for name, rgb in nouns.TINTS.items()
    }
    assert sorted(distances, key=distances.get).index(tint) < 2
    assert image[25, 25].sum() > image[40, 40].sum()


def test_a_batch_draws_what_single_pictures_draw(sprites):
    world, renderer = World(LARGE, 1, sprites), Renderer(sprites, 64)
    samples = [world.sample(i) for i in range(24)]
    assert max(len(s.pieces) for s in samples) > 1
    together = to_uint8(renderer.draw(lay_out(samples)))
    for k in range(0, 24, 5):
        assert np.array_equal(together[k], renderer.pictures([samples[k]])[0])
