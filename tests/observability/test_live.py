"""A real Prometheus scrapes a real server: every expression answers, an alert fires and clears.

An alert's expression answers only while it fires. So its comparisons are asked as `bool`: then the same
selectors, aggregations and matchings must give data, 0 or 1.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from expressions import RULES, Expression, panel_expressions, panels, rule_expressions, rules
from worked_server import DEADLINE

NEEDS_AN_EVENT = {
    "MooringQueueFull": "no queue was full",
    "MooringUnexpectedErrors": "the server met no fault of its own",
    "MooringOutOfMemory": "nothing was too large",
    "MooringAdapterThrashing": "no adapter had to leave its slot",
    "MooringDeviceMemoryHigh": "a CPU has no device memory of its own",
    "MooringJobsFailing": "no job failed",
    "MooringLeasesLost": "no job was taken over",
}
ALERTS = {rule["alert"] for rule in rules() if "alert" in rule}


class Prometheus:
    """A running Prometheus; its address."""

    def __init__(self, address: str) -> None:
        self._address = address

    def get(self, path: str, **parameters: str) -> Any:
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def query(self, expression: str) -> list[Any]:
        return self.get("query", query=expression)["result"]

    def firing(self) -> set[str]:
        return {a["labels"]["alertname"] for a in self.get("alerts")["alerts"] if a["state"] == "firing"}


def until(what: str, condition: Callable[[], Any]) -> Any:
    """Wait for something that must come."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.5)
    pytest.fail(f"waited {DEADLINE} s: {what}")


def hasten(text: str) -> str:
    """The same rules, evaluated every second, without the wait before an alert fires."""
    document = yaml.safe_load(text)
    for group in document["groups"]:
        group["interval"] = "1s"
        for rule in group["rules"]:
            rule.pop("for", None)
    return yaml.safe_dump(document)


@pytest.fixture(scope="module")
def live(prometheus, worked, tmp_path_factory) -> Iterator[Prometheus]:
    folder: Path = tmp_path_factory.mktemp("prometheus")
    (folder / "rules").mkdir()
    for path in RULES.glob("*.yaml"):
        (folder / "rules" / path.name).write_text(hasten(path.read_text(encoding="utf-8")))
    scrape = {"job_name": "mooring", "static_configs": [{"targets": [worked.metrics]}]}
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules/*.yaml"],
        "scrape_configs": [scrape],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        prometheus,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        made = Prometheus(address)

        def answers() -> bool:
            assert process.poll() is None, (folder / "log").read_text()
            try:
                return bool(made.query("mooring_ready == 1"))
            except OSError:
                return False

        until("Prometheus scrapes the server", answers)
        yield made
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder / "data", ignore_errors=True)


def whatever_is_true(expression: Expression) -> str:
    """An alert's expression with its comparisons as `bool`; others as they are."""
    if expression.where not in ALERTS:
        return expression.concrete
    outside = re.split(r'(\{[^}]*\}|"[^"]*")', expression.text)
    asked = [
        re.sub(r"(==|>|<)(?!=)", r"\1 bool", part) if not i % 2 else part for i, part in enumerate(outside)
    ]
    return "".join(asked)


@pytest.mark.parametrize(
    "expression",
    [e for e in (*rule_expressions(), *panel_expressions()) if e.where not in NEEDS_AN_EVENT],
    ids=lambda expression: expression.where,
)
def test_every_expression_returns_data(live, expression):
    asked = whatever_is_true(expression)
    found = until(asked, lambda: live.query(asked))
    assert all(sample["value"][1] not in {"", "+Inf", "-Inf"} for sample in found)


@pytest.mark.parametrize("alert", sorted(NEEDS_AN_EVENT))
def test_an_expression_that_needs_an_event_is_understood_and_silent(live, alert):
    expression = next(e for e in rule_expressions() if e.where == alert)
    assert live.query(expression.text) == []


def test_prometheus_evaluates_every_rule_without_an_error(live):
    def groups() -> list[Any]:
        found = [rule for group in live.get("rules")["groups"] for rule in group["rules"]]
        return found if all(rule["health"] != "unknown" for rule in found) else []

    loaded = until("every rule was evaluated", groups)
    assert {rule["name"] for rule in loaded} == {e.where for e in rule_expressions()}
    assert {rule["health"] for rule in loaded} == {"ok"}, [r for r in loaded if r["health"] != "ok"]


def test_an_alert_fires_and_clears(live, worked):
    until("the server is up", lambda: "MooringDown" not in live.firing())
    os.kill(worked.process.pid, signal.SIGSTOP)
    try:
        until("MooringDown fires", lambda: "MooringDown" in live.firing())
    finally:
        os.kill(worked.process.pid, signal.SIGCONT)
    until("MooringDown clears", lambda: "MooringDown" not in live.firing())


def test_logs_panels_read_fields_that_the_canonical_line_has(canonical_lines):
    fields = set().union(*canonical_lines)
    used = set()
    for where, target in panels("loki"):
        selector, _, pipeline = target["expr"].partition("| json")
        assert '{app="mooring"}' in selector, where
        used |= set(re.findall(r"\| (\w+)\s*(?:=|!=|>)", pipeline)) | set(
            re.findall(r"unwrap (\w+)", pipeline)
        )
        used |= {name for by in re.findall(r"by \(([^)]*)\)", selector) for name in by.split(", ")}
    assert {"tenant", "images", "queue_seconds", "reason", "adapter_digest"} <= used
    assert used <= fields
