"""The layout: no overlap, no copy, the same on every process."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mooring_kernels.arena import ArenaLayout, LayerShape
from mooring_kernels.arena.layout import ALIGNMENT

dimension = st.sampled_from([1, 3, 8, 17, 64])
# the layout's rank is 9; a layer has that, or one of its own
layouts = st.builds(
    lambda shapes: ArenaLayout([LayerShape(f"layer.{i}", *shape) for i, shape in enumerate(shapes)], 9),
    st.lists(st.tuples(dimension, dimension, st.none() | st.integers(1, 9)), min_size=1, max_size=12),
)


@given(layouts)
def test_views_cover_distinct_elements_at_aligned_offsets(layout):
    owner = torch.arange(layout.size)
    seen = torch.zeros(layout.size, dtype=torch.long)
    for name, (a, b) in layout.views(owner).items():
        a_at, b_at = layout.offsets[name]
        assert a_at % ALIGNMENT == 0
        assert b_at % ALIGNMENT == 0
        assert a.flatten()[0] == a_at
        assert b.flatten()[0] == b_at
        seen[a.flatten()] += 1
        seen[b.flatten()] += 1
    assert seen.max() == 1
    layers = zip(layout.layers, layout.ranks, strict=True)
    factors = sum(rank * (layer.out + layer.in_) for layer, rank in layers)
    assert seen.sum() == factors
    assert layout.size - factors < 2 * ALIGNMENT * len(layout.layers)


@given(layouts)
def test_group_views_are_the_layers_views_in_order(layout):
    bank = torch.arange(3 * layout.size).view(3, -1)
    views = layout.views(bank)
    covered = []
    for group in layout.groups:
        a, b = group.views(bank)
        for k, index in enumerate(group.indices):
            name = layout.layers[index].name
            assert torch.equal(a[:, k], views[name][0])
            assert torch.equal(b[:, k], views[name][1])
            covered.append(index)
    assert sorted(covered) == list(range(len(layout.layers)))


@given(layouts)
def test_json_round_trip(layout):
    again = ArenaLayout.from_json(layout.to_json())
    assert again == layout
    assert again.offsets == layout.offsets
    assert again.digest == layout.digest
    assert again.ranks == layout.ranks


@given(layouts, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_factors_of_every_slot_begin_at_16_byte_boundaries(layout, dtype):
    bank = torch.empty(3, layout.size, dtype=dtype)
    start = bank.data_ptr()
    for a, b in layout.views(bank).values():
        for slot in range(3):
            assert (a[slot].data_ptr() - start) % 16 == 0
            assert (b[slot].data_ptr() - start) % 16 == 0


@given(layouts)
def test_writing_one_factor_changes_no_other_element(layout):
    flat = torch.zeros(layout.size)
    for name, (a, b) in layout.views(flat).items():
        flat.zero_()
        a.fill_(1.0)
        assert flat.sum() == a.numel(), name
        b.fill_(1.0)
        assert flat.sum() == a.numel() + b.numel(), name


@given(layouts)
def test_a_copy_does_not_take_the_cache_along(layout):
    layout.cache["table"] = torch.zeros(3)
    again = pickle.loads(pickle.dumps(layout))
    assert again == layout
    assert again.cache == {}


def test_a_layer_of_smaller_rank_takes_less_room_and_the_same_digest_without_one():
    plain = [LayerShape("a", 64, 64), LayerShape("b", 64, 64)]
    mixed = [LayerShape("a", 64, 64), LayerShape("b", 64, 64, 2)]
    one, two = ArenaLayout(plain, 8), ArenaLayout(mixed, 8)
    assert two.size == one.size // 2 + one.size // 8
    assert two.ranks == (8, 2)
    assert [tuple(t.shape) for t in two.views(torch.zeros(two.size))["b"]] == [(2, 64), (64, 2)]
    assert one.to_json() == '{"rank":8,"layers":[["a",64,64],["b",64,64]]}'
    assert two.digest != one.digest


def test_writing_a_view_writes_the_buffer():
    layout = ArenaLayout([LayerShape("q", 6, 4)], 2)
    flat = torch.zeros(layout.size)
    layout.views(flat)["q"][1].fill_(3.0)
    assert flat.sum() == 3.0 * 12


def test_the_layout_does_not_depend_on_the_order_of_groups_only_on_names():
    shapes = [LayerShape("a", 8, 16), LayerShape("b", 4, 4)]
    one, two = ArenaLayout(shapes, 2), ArenaLayout(shapes[::-1], 2)
    assert one.offsets == two.offsets
    assert one.names != two.names


@pytest.mark.parametrize(
    ("layers", "rank", "message"),
    [
        ([], 1, "at least one layer"),
        ([LayerShape("a", 1, 1), LayerShape("a", 2, 2)], 1, "repeated: a"),
        ([LayerShape("a", 0, 1)], 1, "positive"),
        ([LayerShape("a", 1, 1)], 0, "rank"),
        ([LayerShape("a", 1, 1, 0)], 4, "a: rank must be between 1 and 4, not 0"),
        ([LayerShape("a", 1, 1, 5)], 4, "a: rank must be between 1 and 4, not 5"),
    ],
)
def test_impossible_layouts_are_refused(layers, rank, message):
    with pytest.raises(ValueError, match=message):
        ArenaLayout(layers, rank)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"rank":1}', '{"rank":1,"layers":[["a",1]]}', '{"rank":"x","layers":[]}']
)
def test_from_json_refuses_other_documents(text):
    with pytest.raises(ValueError, match=r"layout|layer"):
        ArenaLayout.from_json(text)


def test_a_foreign_buffer_is_refused():
    layout = ArenaLayout([LayerShape("a", 4, 4)], 2)
    with pytest.raises(ValueError, match="elements"):
        layout.views(torch.zeros(layout.size + 8))
