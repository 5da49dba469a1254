"""The world is deterministic, holds its subjects out, and says what it draws."""

from __future__ import annotations

import numpy as np
import pytest
from mooring_server.dinghy import (
    generic_prompts,
    new_scene_prompts,
    nouns,
    packaged,
    scenes,
    unknown_words,
)
from mooring_server.dinghy.preset import LARGE, PRESETS, SHIPPED, SMALL
from mooring_server.dinghy.world import (
    TRAIN_STYLES,
    World,
    caption,
    scene_words,
)


def test_sample_depends_on_seed_and_index_only(sprites):
    first, other = World(LARGE, 3, sprites), World(LARGE, 3, sprites)
    for i in (5, 0, 17, 5):
        assert first.sample(i) == other.sample(i)
    assert first.sample(5) != World(LARGE, 4, sprites).sample(5)


def test_held_out_subjects_and_style_are_never_drawn(sprites):
    world = World(LARGE, 0, sprites)
    for i in range(700):
        sample = world.sample(i)
        for piece in sample.pieces:
            assert sprites.role[piece.sprite] != "held"
            if sprites.role[piece.sprite] == "named":
                assert sprites.style[piece.sprite] in TRAIN_STYLES
    assert not {sprites.role[i] for i in world.training_sprites()} & {"held"}


def test_groups_and_pairs_show_what_they_say(sprites):
    world = World(LARGE, 2, sprites)
    rng = np.random.default_rng(0)
    group = world.group("cat", 3, "snow", rng)
    assert "three cats" in group.caption
    assert len(group.pieces) == group.count == 3
    assert len({p.sprite for p in group.pieces}) == 1
    pair = world.pair("car", "lion", "beach", rng)
    assert pair.nouns == ("car", "lion")
    assert pair.caption.index("car") < pair.caption.index("lion")
    left, right = pair.pieces
    assert left.place.dx < 0 < right.place.dx
    assert [sprites.noun[p.sprite] for p in pair.pieces] == ["car", "lion"]


def test_held_out_codes_are_in_no_other_list():
    held = {s.code for s in nouns.HELD_OUT}
    assert not held & {code for code, _ in nouns.NAMED.values()}
    assert not held & set(nouns.EXTRA_HYPERNYM)
    assert not {s.name for s in nouns.HELD_OUT} & set(nouns.NAMED)


def test_every_class_noun_is_a_word_the_base_has_learnt():
    assert {s.class_noun for s in nouns.HELD_OUT} <= SHIPPED.words()


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_captions_hold_only_the_words_of_the_preset(sprites, preset):
    world = World(preset, 1, sprites)
    for i in range(400):
        assert set(world.sample(i).caption.split()) <= preset.words()


def test_the_small_world_names_its_own_nouns_only(sprites):
    world = World(SMALL, 1, sprites)
    seen = {noun for i in range(2000) for noun in world.sample(i).nouns}
    assert seen <= set(SMALL.names)
    assert len(seen) > 80
    assert max(len(world.sample(i).pieces) for i in range(300)) == 1


def test_single_objects_lie_as_the_preset_says(sprites):
    for preset in (SMALL, LARGE):
        pose, world = preset.pose, World(preset, 1, sprites)
        places = [
            s.pieces[0].place for s in map(world.sample, range(600)) if len(s.nouns) == 1 == len(s.pieces)
        ]
        assert all(pose.size[0] <= p.size <= pose.size[1] and abs(p.angle) <= pose.angle for p in places)
        assert all(abs(p.dx) <= pose.dx and pose.dy[0] <= p.dy <= pose.dy[1] for p in places)
        assert not any(p.flip for p in places)


def test_two_of_three_named_objects_are_drawn_in_3d(sprites):
    world = World(SMALL, 1, sprites)
    styles = [sprites.style[s.pieces[0].sprite] for s in map(world.sample, range(2000)) if s.nouns]
    assert styles.count("3d") / len(styles) == pytest.approx(2 / 3, abs=0.04)


def test_a_sample_takes_the_scene_it_is_asked_for(sprites):
    world = World(LARGE, 1, sprites)
    assert {world.sample(i, "snow").scene for i in range(60)} == {"snow"}


def test_caption_names_what_is_drawn():
    rng = np.random.default_rng(0)
    for _ in range(200):
        words = caption(LARGE.one("cat", "red"), "snow", "3d", rng)
        assert "red cat" in words
        assert "drawing" not in words


def test_every_noun_has_a_right_article_and_at_most_one_plural():
    assert [LARGE.one(n) for n in ("apple", "unicorn", "hourglass", "umbrella", "cat")] == [
        "an apple", "a unicorn", "an hourglass", "an umbrella", "a cat",
    ]  # fmt: skip
    for noun in nouns.NAMED:
        assert nouns.plural(noun) != noun or noun.endswith(("fish", "sheep", "deer", "dice"))
    assert (LARGE.one("grapes"), SMALL.one("grapes")) == ("some grapes", "a grapes")
    assert nouns.plural("grapes") == ""


@pytest.mark.parametrize("scene", list(nouns.SCENES))
@pytest.mark.parametrize("px", [64, 128])
def test_scenes_draw_at_any_size_and_vary(scene, px):
    one = scenes.draw_scene(scene, px, np.random.default_rng(1))
    two = scenes.draw_scene(scene, px, np.random.default_rng(2))
    assert one.shape == (px, px, 3)
    assert one.std() > 5
    assert not np.array_equal(one, two)


def test_evaluation_prompts_use_known_words_and_new_scenes():
    assert len(set(generic_prompts(60))) == 60
    assert all(not unknown_words(p) for p in generic_prompts(93))
    prompts = new_scene_prompts("toy", "<rocket>")
    assert all("<rocket> toy" in p and not unknown_words(p, ("<rocket>",)) for p in prompts)
    seen = [scene_words(s) for s in ("wood", "grass")]
    assert not any(p.endswith(tuple(seen)) for p in prompts)


@pytest.mark.parametrize("preset", [SHIPPED, SMALL], ids=lambda preset: preset.version)
def test_each_presets_generic_prompts_hold_its_own_words_only(preset):
    assert all(set(prompt.split()) <= preset.words() for prompt in generic_prompts(168, preset))


def test_a_server_is_told_a_packaged_base_by_its_name():
    assert (packaged(""), packaged("dinghy-4"), packaged("dinghy-1")) == (SHIPPED, SHIPPED, SMALL)
    assert packaged("dinghy-3") is None
    assert packaged("./dinghy-1") is None


def test_generic_prompts_dealt_out_by_turns_cover_every_scene_twice_over():
    prompts = generic_prompts(168)
    assert len(set(prompts)) == 168
    for half in (prompts[::2], prompts[1::2]):
        for place in nouns.SCENES.values():
            assert sum(prompt.endswith(place) for prompt in half) in (5, 6), place
