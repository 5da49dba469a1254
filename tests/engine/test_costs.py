from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mooring_server.engine.bank import AdapterBank
from mooring_server.engine.base import BaseModel
from mooring_server.engine.costs import MAX_SHAPES, NEAR_BEST, CostTable, cached, measure

NATIVE = (8, 8)
shapes = st.tuples(st.integers(1, 64), st.integers(1, 64))
figures = st.dictionaries(st.integers(1, 40), st.floats(1e-4, 10.0), min_size=1, max_size=8)
passes = st.lists(st.tuples(shapes, st.integers(1, 40), st.floats(1e-5, 10.0)), max_size=40)


def table_of(seconds: dict[int, float], ran, bound: float = math.inf) -> CostTable:
    table = CostTable(NATIVE, seconds, max_step_seconds=bound)
    for shape, rows, taken in ran:
        table.observe(shape, rows, taken)
    return table


@given(figures, passes, shapes)
def test_more_rows_never_cost_less(seconds, ran, shape) -> None:
    table = table_of(seconds, ran)
    costs = [table.seconds(shape, rows) for rows in range(1, 100)]
    assert all(0 < a <= b * (1 + 1e-12) for a, b in pairwise(costs))


@given(figures, passes, shapes, st.floats(1e-4, 10.0))
def test_the_limit_is_in_time_near_the_best_and_no_larger_than_needed(seconds, ran, shape, bound) -> None:
    table = table_of(seconds, ran, bound)
    limit = table.limit(shape)
    assert limit >= 2
    if limit == 2:
        return
    assert table.seconds(shape, limit) <= bound
    largest = max([*seconds, *(rows for _, rows, _ in ran)])
    rates = {
        rows: rows / table.seconds(shape, rows)
        for rows in range(1, largest + 1)
        if table.seconds(shape, rows) <= bound
    }
    assert limit <= largest
    assert all(rate < rates[limit] / NEAR_BEST * (1 + 1e-9) for rows, rate in rates.items() if rows <= limit)
    assert not any(rates[rows] >= max(rates[r] for r in rates if r <= limit) for rows in range(1, limit))


@given(figures, st.floats(1e-3, 10.0) | st.just(math.inf), shapes)
def test_json_keeps_a_table(seconds, bound, shape) -> None:
    table = CostTable(NATIVE, seconds, max_step_seconds=bound)
    again = CostTable.from_json(json.loads(json.dumps(table.to_json(), allow_nan=False)))
    assert again.to_json() == table.to_json()
    assert again.limit(shape) == table.limit(shape)
    assert again.seconds(shape, 7) == table.seconds(shape, 7)


def test_figures_are_interpolated_extrapolated_and_scaled_by_pixels() -> None:
    table = CostTable(NATIVE, {1: 1.0, 3: 2.0}, max_step_seconds=math.inf)
    assert [table.seconds(NATIVE, rows) for rows in (1, 2, 3, 6)] == [1.0, 1.5, 2.0, 4.0]
    assert table.seconds((16, 8), 2) == 3.0


def test_the_limit_follows_the_throughput() -> None:
    assert CostTable(NATIVE, {1: 1.0, 32: 32.0}, max_step_seconds=math.inf).limit(NATIVE) == 2
    assert CostTable(NATIVE, {1: 1.0, 32: 1.0}, max_step_seconds=math.inf).limit(NATIVE) == 31
    assert CostTable(NATIVE, {1: 1.0, 8: 8.0}, max_step_seconds=0.1).limit(NATIVE) == 2


def test_passes_that_ran_correct_their_shape_but_one_slow_pass_does_not() -> None:
    table = CostTable(NATIVE, {1: 1.0, 8: 2.0}, max_step_seconds=math.inf)
    for taken in (3.0, 3.0, 300.0):
        table.observe((16, 16), 8, taken)
    assert table.seconds((16, 16), 8) == 3.0  # scaled by pixels: 8
    assert table.seconds((16, 16), 1) == 1.5  # the same correction
    assert table.seconds(NATIVE, 8) == 2.0


def test_shapes_that_ran_long_ago_are_forgotten() -> None:
    table = CostTable(NATIVE, {1: 1.0}, max_step_seconds=math.inf)
    for width in range(1, 2 * MAX_SHAPES):
        for _ in range(3):
            table.observe((1, width), 1, 5.0)
    assert table.seconds((1, 1), 1) == 1 / 64
    assert table.seconds((1, 2 * MAX_SHAPES - 1), 1) == 5.0


@pytest.mark.parametrize("seconds", [{}, {1: 0.0}, {1: math.nan}, {1: math.inf}, {0: 1.0}])
def test_figures_that_cannot_be_are_refused(seconds) -> None:
    with pytest.raises(ValueError, match="no cost table"):
        CostTable(NATIVE, seconds, max_step_seconds=1.0)


class Making:
    """Counts how often a table was measured."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> CostTable:
        self.times += 1
        return CostTable(NATIVE, {1: float(self.times)}, max_step_seconds=1.0)


def test_a_table_is_measured_once_for_a_key(tmp_path: Path) -> None:
    make, path = Making(), tmp_path / "state" / "costs.json"
    first = cached(path, {"device": "cpu", "threads": 1}, make)
    assert cached(path, {"threads": 1, "device": "cpu"}, make).to_json() == first.to_json()
    assert make.times == 1
    assert cached(path, {"device": "cpu", "threads": 2}, make).seconds(NATIVE, 1) == 2.0
    assert [entry.name for entry in path.parent.iterdir()] == ["costs.json"]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"format": 1}',
        b'{"format": 1, "key": {"a": 1}, "table": {"native": [8], "seconds": {}, "max_step_seconds": 1}}',
        (
            b'{"format": 1, "key": {"a": 1}, "table": {"native": [8, 8], "seconds": {"1": -1}, '
            b'"max_step_seconds": 1}}'
        ),
        b'{"format": 1, "key": {"a": 1}, "table": {"native": [8, 8], "seconds": [1], "max_step_seconds": 1}}',
    ],
)
def test_a_damaged_file_is_measured_anew(tmp_path: Path, damage: bytes) -> None:
    make, path = Making(), tmp_path / "costs.json"
    path.write_bytes(damage)
    assert cached(path, {"a": 1}, make).seconds(NATIVE, 1) == 1.0
    assert cached(path, {"a": 1}, make).seconds(NATIVE, 1) == 1.0
    assert make.times == 1


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_measurement(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert cached(tmp_path / "file" / "costs.json", {}, Making()).seconds(NATIVE, 1) == 1.0


def test_measuring_times_passes_with_an_adapter_and_gives_the_slot_back(
    base: BaseModel, make_bank: Callable[..., AdapterBank]
) -> None:
    bank = make_bank(base, slots=2, rank=4)
    seen: list[int] = []
    table = measure(
        base, bank, max_rows=4, max_step_seconds=60.0, progress=lambda rows, _seconds: seen.append(rows)
    )
    side = base.native_size // base.vae_scale_factor
    assert table.native == (side, side)
    assert seen[:2] == [1, 2]
    assert list(table.to_json()["seconds"]) == [str(rows) for rows in seen]
    assert torch.count_nonzero(bank.arena) == 0
    bank.release(bank.reserve())


def test_measuring_ends_with_passes_that_take_too_long(
    base: BaseModel, make_bank: Callable[..., AdapterBank]
) -> None:
    table = measure(base, make_bank(base, slots=2, rank=4), max_step_seconds=1e-9)
    assert list(table.to_json()["seconds"]) == ["1", "2"]
