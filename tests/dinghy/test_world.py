"""The world is deterministic, holds its subjects out, and says what it draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mooring_server.dinghy import generic_prompts, new_scene_prompts, nouns, scenes, unknown_words
from mooring_server.dinghy.sources import SPRITE_PX
from mooring_server.dinghy.text import trained_words
from mooring_server.dinghy.world import (
    TRAIN_STYLES,
    Placement,
    World,
    caption,
    compose,
    scene_words,
    tint_sprite,
)


def test_sample_depends_on_seed_and_index_only(sprites):
    one, other = World(seed=3, sprites=sprites), World(seed=3, sprites=sprites)
    for i in (5, 0, 17, 5):
        a = one.sample(i)
        b = other.sample(i)
        assert np.array_equal(a.image, b.image)
        assert (a.caption, a.scene, a.sprite) == (b.caption, b.scene, b.sprite)
    assert not np.array_equal(one.sample(5).image, World(seed=4, sprites=sprites).sample(5).image)


def test_held_out_subjects_and_style_are_never_drawn(sprites):
    world = World(seed=0, sprites=sprites)
    for i in range(700):
        sample = world.sample(i)
        assert sprites.role[sample.sprite] != "held"
        if sprites.role[sample.sprite] == "named":
            assert sample.style in TRAIN_STYLES


def test_held_out_codes_are_in_no_other_list():
    held = {s.code for s in nouns.HELD_OUT}
    assert not held & {code for code, _ in nouns.NAMED.values()}
    assert not held & set(nouns.EXTRA_HYPERNYM)
    assert not {s.name for s in nouns.HELD_OUT} & set(nouns.NAMED)


def test_every_class_noun_is_a_word_the_base_has_learnt():
    assert {s.class_noun for s in nouns.HELD_OUT} <= trained_words()


def test_captions_hold_only_trained_words(sprites):
    world = World(seed=1, sprites=sprites)
    for i in range(250):
        assert unknown_words(world.sample(i).caption) == []


def test_caption_names_what_is_drawn():
    rng = np.random.default_rng(0)
    for _ in range(200):
        words = caption("cat", "snow", "red", "3d", rng)
        assert "red cat" in words
        assert "drawing" not in words


@pytest.mark.parametrize("scene", list(nouns.SCENES))
@pytest.mark.parametrize("px", [64, 128])
def test_scenes_draw_at_any_size_and_vary(scene, px):
    one = scenes.draw_scene(scene, px, np.random.default_rng(1))
    two = scenes.draw_scene(scene, px, np.random.default_rng(2))
    assert one.shape == (px, px, 3)
    assert one.std() > 5
    assert not np.array_equal(one, two)


@given(
    size=st.floats(20, 60), angle=st.floats(-30, 30), dx=st.floats(-20, 20), dy=st.floats(-20, 20),
    flip=st.booleans(), aspect=st.floats(0.6, 1.6), shear=st.floats(-0.4, 0.4),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_compose_stays_in_bounds_and_draws_something(size, angle, dx, dy, flip, aspect, shear):
    background = np.zeros((64, 64, 3), np.uint8)
    sprite = np.full((SPRITE_PX, SPRITE_PX, 4), 255, np.uint8)
    image = compose(background, sprite, Placement(size, angle, dx, dy, flip, aspect, shear))
    assert image.shape == (64, 64, 3)
    assert image.max() == 255


@pytest.mark.parametrize("tint", list(nouns.TINTS))
def test_tint_keeps_the_outline_and_takes_the_hue(tint):
    sprite = np.zeros((SPRITE_PX, SPRITE_PX, 4), np.uint8)
    sprite[20:100, 20:100] = (120, 90, 60, 255)
    sprite[40:60, 40:60, :3] = 250
    out = tint_sprite(sprite, tint)
    assert np.array_equal(out[..., 3], sprite[..., 3])
    mean = out[out[..., 3] > 0][:, :3].astype(float).mean(0)
    distances = {
        name: np.abs(mean - np.asarray(rgb) * mean.sum() / sum(rgb)).sum()
        for name, rgb in nouns.TINTS.items()
    }
    assert sorted(distances, key=distances.get).index(tint) < 2


def test_evaluation_prompts_use_known_words_and_new_scenes():
    assert len(set(generic_prompts(60))) == 60
    assert all(not unknown_words(p) for p in generic_prompts(93))
    prompts = new_scene_prompts("toy", "<rocket>")
    assert all("<rocket> toy" in p and not unknown_words(p, ("<rocket>",)) for p in prompts)
    seen = [scene_words(s) for s in ("wood", "grass")]
    assert not any(p.endswith(tuple(seen)) for p in prompts)
