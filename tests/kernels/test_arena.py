"""The layout: no overlap, no copy, the same on every process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mooring_kernels.arena import ArenaLayout, LayerShape
from mooring_kernels.arena.layout import ALIGNMENT

dimension = st.sampled_from([1, 3, 8, 17, 64])
layouts = st.builds(
    lambda shapes, rank: ArenaLayout(
        [LayerShape(f"layer.{i}", o, n) for i, (o, n) in enumerate(shapes)], rank
    ),
    st.lists(st.tuples(dimension, dimension), min_size=1, max_size=12),
    st.integers(1, 9),
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
    factors = sum(layout.rank * (layer.out + layer.in_) for layer in layout.layers)
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
