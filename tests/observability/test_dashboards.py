"""Dashboards: the committed JSON is what the code makes."""

from __future__ import annotations

import json
import re

import pytest
from expressions import DASHBOARDS

from tools.dashboards.all import rendered

BOARDS = rendered()


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_the_committed_dashboard_is_what_the_code_makes(name):
    committed = (DASHBOARDS / name).read_text(encoding="utf-8")
    assert committed == BOARDS[name], "run python -m tools.dashboards"


def test_no_dashboard_is_left_over():
    assert {path.name for path in DASHBOARDS.glob("*.json")} == set(BOARDS)


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_a_dashboard_is_complete(name):
    board = json.loads(BOARDS[name])
    assert board["uid"].startswith("mooring-")
    variables = {variable["name"] for variable in board["templating"]["list"]}
    for panel in board["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["description"]
        assert panel["type"] == "logs" or panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]
        for target in panel["targets"]:
            used = set(re.findall(r"\$\{?(\w+)", target["expr"] + target["datasource"]["uid"]))
            assert used - {"__rate_interval", "__range"} <= variables
