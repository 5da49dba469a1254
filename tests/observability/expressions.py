"""Prometheus' own programs, and the expressions that rules and dashboards use.

Without the programs these tests are skipped, unless MOORING_TEST_PROMETHEUS=require (CI): then they fail.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules"
RULE_TESTS = ROOT / "deploy" / "prometheus" / "tests"
DASHBOARDS = ROOT / "deploy" / "grafana"


@dataclass(frozen=True)
class Expression:
    """One expression, and where it is."""

    where: str
    text: str

    @property
    def concrete(self) -> str:
        """With Grafana's variables filled in."""
        text = self.text.replace("$__rate_interval", "30s").replace("$job", ".*").replace("$instance", ".*")
        assert "$" not in text, text
        return text

    @property
    def metrics(self) -> set[str]:
        """Names that the expression reads."""
        text = re.sub(r'"[^"]*"', "", self.text)
        text = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", text)
        text = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", text)
        return {
            name
            for name in re.findall(r"[a-zA-Z_:][\w:]*(?!\s*\()\b", text)
            if re.match(r"(mooring_|grpc_|process_|job|up\b)", name)
        }


def program(name: str) -> str:
    """The path of a program of Debian's package `prometheus`."""
    found = shutil.which(name)
    if found:
        return found
    message = f"{name} is not on this machine: apt-get install prometheus"
    if os.environ.get("MOORING_TEST_PROMETHEUS", "require" if os.environ.get("CI") else "") == "require":
        pytest.fail(message)
    pytest.skip(message)


def rules() -> Iterator[dict[str, Any]]:
    """Every rule of every file."""
    for path in sorted(RULES.glob("*.yaml")):
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]:
            yield from group["rules"]


def rule_expressions() -> list[Expression]:
    return [Expression(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()]


def panels(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(dashboard: panel, target) of the targets that a kind of data source answers."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        board = json.loads(path.read_text(encoding="utf-8"))
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                if target["datasource"]["type"] == source:
                    yield f"{path.stem}: {panel['title']}", target


def panel_expressions() -> list[Expression]:
    return [Expression(where, target["expr"]) for where, target in panels("prometheus")]
