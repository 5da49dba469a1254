"""Prometheus rules: valid, tested both ways, each alert with a runbook, every metric exported."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml
from expressions import ROOT, RULE_TESTS, RULES, panel_expressions, rule_expressions, rules
from mooring_server.telemetry.metrics import Metrics
from prometheus_client import generate_latest

RUNBOOKS = (ROOT / "docs" / "runbooks.md").read_text(encoding="utf-8")
ALERTS = [rule for rule in rules() if "alert" in rule]
RECORDED = {rule["record"] for rule in rules() if "record" in rule}


def exported() -> set[str]:
    """Sample names of everything that a server exports."""
    metrics = Metrics("0")
    metrics.watch_jobs(dict, list, dict, list)
    names = set()
    for line in generate_latest(metrics.registry).decode().splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            suffixes = {"histogram": ("_bucket", "_sum", "_count")}.get(kind, ("",))
            names.update(name + suffix for suffix in suffixes)
    return names


def test_the_rules_are_valid(promtool):
    checked = subprocess.run(
        [promtool, "check", "rules", *sorted(RULES.glob("*.yaml"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "SUCCESS" in checked.stdout


@pytest.mark.parametrize("path", sorted(RULE_TESTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_alerts_fire_when_they_must_and_only_then(promtool, path):
    tested = subprocess.run([promtool, "test", "rules", path], capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_alert_has_a_case_that_must_fire_and_one_that_must_not():
    cases = {
        (case["alertname"], bool(case["exp_alerts"]))
        for path in RULE_TESTS.glob("*.yaml")
        for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]
        for case in test["alert_rule_test"]
    }
    assert cases == {(alert["alert"], fires) for alert in ALERTS for fires in (True, False)}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_tells_what_to_do(alert):
    assert alert["labels"]["severity"] in {"page", "ticket"}
    notes = alert["annotations"]
    assert notes["summary"]
    assert notes["description"]
    document, _, anchor = notes["runbook_url"].partition("#")
    assert document == "docs/runbooks.md"
    headings = {heading.lower() for heading in re.findall(r"^## (\w+)$", RUNBOOKS, re.MULTILINE)}
    assert anchor in headings
    assert alert["alert"].lower().startswith(anchor)


def test_no_runbook_is_left_without_its_alert():
    headings = set(re.findall(r"^## (Mooring\w+)$", RUNBOOKS, re.MULTILINE))
    assert headings == {
        heading for heading in headings if any(a["alert"].startswith(heading) for a in ALERTS)
    }
    assert len(headings) >= len(ALERTS) - 2  # fast and slow burns share one


@pytest.mark.parametrize(
    "expression", [*rule_expressions(), *panel_expressions()], ids=lambda expression: expression.where
)
def test_every_metric_that_is_used_is_exported(expression):
    known = exported() | RECORDED | {"up"}
    assert expression.metrics, expression.text
    assert expression.metrics <= known, expression.metrics - known


def test_a_name_that_nobody_exports_would_be_noticed():
    assert "mooring_ready" in exported()
    assert "mooring_images_total" in exported()
    assert "mooring_training_drift" in exported()
    assert "mooring_nothing" not in exported()
    wrong = type(rule_expressions()[0])(
        "x", 'sum by (le) (rate(mooring_nothing_total{a="b"}[5m])) > mooring_ready'
    )
    assert wrong.metrics == {"mooring_nothing_total", "mooring_ready"}
