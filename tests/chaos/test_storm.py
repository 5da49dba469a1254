"""A short storm in every run of the tests; `python -m tests.chaos` is the long one."""

from __future__ import annotations

import pytest

from chaos import storm


@pytest.mark.parametrize("only", ["kill", "disk"])
def test_a_short_storm_on_sqlite_loses_nothing(only: str) -> None:
    rows = list(storm.storm(3, only=only))
    assert [problem for row in rows for problem in row.problems] == []
    assert all(row.trials for row in rows)
    assert only == "disk" or all(row.acknowledged and row.jobs for row in rows)


@pytest.mark.slow
def test_a_storm_on_postgresql_and_s3_loses_nothing() -> None:
    rows = list(storm.storm(10, only="shared"))
    assert [problem for row in rows for problem in row.problems] == []
    assert [row.trials > 0 for row in rows] == [True] * 4
