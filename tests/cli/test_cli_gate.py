"""Publishing from the command line, against a scripted server."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest
from mooring.v1 import adapter_pb2 as pb
from mooring.v1 import gate_pb2, subject_pb2
from mooring_server.cli import app
from mooring_server.cli_gate import MEANINGS, THRESHOLDS
from mooring_server.evaluation.gate import RANGES
from scripted_server import ScriptedServer, abort_with
from typer.testing import CliRunner, Result

REX = "tenants/local/adapters/rex"
AT_LEAST, AT_MOST = gate_pb2.GATE_COMPARISON_AT_LEAST, gate_pb2.GATE_COMPARISON_AT_MOST


def run(server: ScriptedServer, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["adapters", *arguments, "--server", server.target])


def decided(verdict: str = "PASSED", *, gain: float = 0.36) -> gate_pb2.GateDecision:
    return gate_pb2.GateDecision(
        name="tenants/local/gateDecisions/d1",
        adapter=f"{REX}@3",
        alias="live",
        verdict=gate_pb2.GateVerdict.Value(f"GATE_VERDICT_{verdict}"),
        checks=[
            gate_pb2.GateCheck(
                figure="rights", comparison=gate_pb2.GATE_COMPARISON_PRESENT, passed=True, detail="owned"
            ),
            gate_pb2.GateCheck(
                figure="dino_gain", comparison=AT_LEAST, value=gain, threshold=0.05, passed=gain >= 0.05
            ),
            gate_pb2.GateCheck(
                figure="drift_over_budget",
                comparison=AT_MOST,
                value=1.25,
                measured=1.04,
                threshold=1.5,
                passed=True,
                detail="upper end of the 95 % interval, of the evaluation",
            ),
        ],
        evaluation="tenants/local/jobs/e1",
        actor="ann",
    )


def test_publish_shows_each_figure_beside_its_threshold(server: ScriptedServer) -> None:
    asked: list[pb.PublishAdapterRequest] = []

    def answer(request: Any, _context: Any) -> pb.PublishAdapterResponse:
        asked.append(request)
        alias = gate_pb2.AdapterAlias(name=f"{REX}@live", adapter=f"{REX}@3", previous_adapter=f"{REX}@2")
        return pb.PublishAdapterResponse(alias=alias, decision=decided())

    server.answers["PublishAdapter"] = answer
    result = run(server, "publish", "rex@3")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[1] == ["rights", "declared", "owned", "yes", "✓"]
    assert lines[2] == ["likeness", "gained", "over", "the", "base", "0.36", "≥", "0.05", "✓"]
    assert lines[3] == [
        "drift",
        "÷",
        "its",
        "budget,",
        "upper",
        "end",
        "1.25",
        "≤",
        "1.5",
        "✓",
        "measured",
        "1.04",
    ]
    assert lines[4][:2] == ["gate", "passed"]
    assert lines[-1] == ["rex@live", "→", "rex@3,", "before", "rex@2"]
    assert (asked[0].name, asked[0].alias) == ("tenants/-/adapters/rex@3", "live")
    assert asked[0].request_id
    result = run(server, "publish", "rex@3", "--alias", "canary", "--dry-run", "--json")
    assert json.loads(result.stdout)["decision"]["verdict"] == "GATE_VERDICT_PASSED"
    assert (asked[1].alias, asked[1].validate_only) == ("canary", True)


def refuse(_request: Any, context: Any) -> None:
    abort_with(
        context,
        grpc.StatusCode.FAILED_PRECONDITION,
        "The gate does not let rex@3 be published as 'live'.",
        reason="GATE_REFUSED",
        remedy="Train it differently.",
        fields={"gate.dino_gain": "0.01, must be at least 0.05"},
        metadata={"decision": "tenants/local/gateDecisions/d1"},
    )


def test_a_refusal_shows_the_whole_table(server: ScriptedServer) -> None:
    server.answers["PublishAdapter"] = refuse
    decision = decided("REFUSED", gain=0.01)
    server.answers["ListGateDecisions"] = lambda *_: pb.ListGateDecisionsResponse(decisions=[decision])
    for name in ("rex@3", "rex", "rex@canary"):
        result = run(server, "publish", name)
        assert result.exit_code == 4
        assert ["likeness", "gained", "over", "the", "base", "0.01", "≥", "0.05", "✗"] in [
            line.split() for line in result.stdout.splitlines()
        ]
        assert "gate refused of rex@3 as live, by ann" in " ".join(result.stdout.split())
        assert "→ Train it differently." in result.stderr
    result = run(server, "publish", "rex@3", "--json")
    assert (result.exit_code, json.loads(result.stdout)["decision"]["verdict"]) == (4, "GATE_VERDICT_REFUSED")


def test_a_refusal_that_was_not_kept_shows_its_fields(server: ScriptedServer) -> None:
    server.answers["PublishAdapter"] = lambda _, context: abort_with(
        context,
        grpc.StatusCode.FAILED_PRECONDITION,
        "The gate does not let rex@3 be published as 'live'.",
        reason="GATE_REFUSED",
        fields={"gate.dino_gain": "0.01, must be at least 0.05"},
    )
    result = run(server, "publish", "rex@3", "--dry-run")
    assert result.exit_code == 4
    assert "gate.dino_gain: 0.01, must be at least 0.05" in result.stderr


def test_rollback_unpublish_and_aliases(server: ScriptedServer) -> None:
    alias = gate_pb2.AdapterAlias(name=f"{REX}@live", adapter=f"{REX}@2", previous_adapter=f"{REX}@1")
    asked: dict[str, Any] = {}

    def note(name: str, answer: Any) -> Any:
        def method(request: Any, _context: Any) -> Any:
            asked[name] = request
            return answer

        return method

    move = gate_pb2.AliasMove(
        alias=f"{REX}@live",
        kind=gate_pb2.ALIAS_MOVE_KIND_ROLL_BACK,
        adapter=f"{REX}@2",
        previous_adapter=f"{REX}@3",
        actor="ann",
    )
    server.answers["RollBackAdapter"] = note("roll", pb.RollBackAdapterResponse(alias=alias))
    server.answers["DeleteAlias"] = note("delete", pb.DeleteAliasResponse())
    server.answers["ListAliases"] = note("list", pb.ListAliasesResponse(aliases=[alias]))
    server.answers["ListAliasMoves"] = note("moves", pb.ListAliasMovesResponse(moves=[move]))
    assert run(server, "rollback", "rex").stdout.strip() == "rex@live → rex@2; before that rex@1"
    assert (asked["roll"].name, asked["roll"].alias) == ("tenants/-/adapters/rex", "live")
    assert "deleted alias rex@live" in run(server, "unpublish", "rex").stdout
    assert asked["delete"].name == "tenants/-/adapters/rex@live"
    assert run(server, "aliases").stdout.splitlines()[1].split()[:3] == ["rex@live", "rex@2", "rex@1"]
    assert asked["list"].adapter == ""
    shown = run(server, "aliases", "rex", "--history").stdout.splitlines()[1].split()
    assert shown == ["rex@live", "roll", "back", "rex@2", "rex@3", "ann"]
    assert run(server, "aliases", "--history").exit_code == 2


def test_gate_set_sends_what_was_named(server: ScriptedServer) -> None:
    asked: list[pb.UpdateGatePolicyRequest] = []

    def answer(request: Any, _context: Any) -> pb.UpdateGatePolicyResponse:
        asked.append(request)
        policy = gate_pb2.GatePolicy(
            mode=gate_pb2.GATE_MODE_WARN, require_evaluation=True, max_drift=0.3, revision=2, updated_by="ann"
        )
        return pb.UpdateGatePolicyResponse(policy=policy)

    server.answers["UpdateGatePolicy"] = answer
    result = run(
        server, "gate", "set", "--preset", "strict", "--max-drift", "0.3", "--no", "min-dino",
        "--mode", "warn", "--allow-rights", "owned", "--no-rights",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    request = asked[0]
    assert request.preset == gate_pb2.GATE_PRESET_STRICT
    assert set(request.update_mask.paths) == {
        "max_drift", "min_dino", "mode", "allowed_rights", "require_rights",
    }  # fmt: skip
    policy = request.policy
    assert (policy.max_drift, policy.HasField("min_dino"), policy.mode) == (
        0.3,
        False,
        gate_pb2.GATE_MODE_WARN,
    )
    assert policy.HasField("require_rights")
    assert list(policy.allowed_rights) == [subject_pb2.RightsDeclaration.BASIS_OWNED]
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["max_drift", "drift,", "upper", "end", "≤", "0.3"] in rows
    assert ["min_dino", "likeness", "to", "the", "photos", "(DINO)", "not", "checked"] in rows
    assert "revision 2, by ann" in result.stdout
    run(server, "gate", "set", "--allow-rights", "any")
    assert (list(asked[1].policy.allowed_rights), list(asked[1].update_mask.paths)) == (
        [],
        ["allowed_rights"],
    )


@pytest.mark.parametrize(
    "arguments", [[], ["--no", "revision"], ["--no", "min-dino", "--min-dino", "0.5"], ["--mode", "often"]]
)
def test_gate_set_refuses_what_makes_no_sense(server: ScriptedServer, arguments: list[str]) -> None:
    assert run(server, "gate", "set", *arguments).exit_code == 2


def test_show_has_aliases_and_the_last_decision(server: ScriptedServer) -> None:
    adapter = pb.Adapter(
        name=f"{REX}@3", method="spectral", rank=8, aliases=["canary", "live"], gate_decision=decided()
    )
    server.answers["GetAdapter"] = lambda *_: pb.GetAdapterResponse(adapter=adapter)
    shown = run(server, "show", "rex@live").stdout
    assert "alias   canary, live" in shown
    assert "gate    passed of rex@3 as live, by ann" in shown
    assert "from    evaluation job e1" in shown


def test_list_shows_aliases_and_tombstones(server: ScriptedServer) -> None:
    live = pb.Adapter(name=f"{REX}@3", aliases=["live"])
    gone = pb.Adapter(name=f"{REX}@2")
    gone.delete_time.FromSeconds(1_700_000_000)
    asked: list[bool] = []

    def answer(request: Any, _context: Any) -> pb.ListAdaptersResponse:
        asked.append(request.show_deleted)
        return pb.ListAdaptersResponse(adapters=[live, gone] if request.show_deleted else [live])

    server.answers["ListAdapters"] = answer
    assert run(server, "list").stdout.splitlines()[1].split()[:2] == ["rex@3", "live"]
    assert "2023-11-" in run(server, "list", "--deleted").stdout
    assert asked == [False, True]


def test_decisions_are_listed(server: ScriptedServer) -> None:
    decisions = [decided("REFUSED", gain=0.01), decided()]
    server.answers["ListGateDecisions"] = lambda *_: pb.ListGateDecisionsResponse(decisions=decisions)
    rows = [line.split() for line in run(server, "gate", "decisions", "rex").stdout.splitlines()]
    assert rows[1] == ["rex@3", "live", "refused", "dino_gain", "ann"]
    assert rows[2] == ["rex@3", "live", "passed", "ann"]


def test_every_threshold_of_the_gate_is_an_option_and_has_words() -> None:
    assert set(THRESHOLDS) == set(RANGES)
    assert {figure for figure, _ in THRESHOLDS.values()} <= set(MEANINGS)
