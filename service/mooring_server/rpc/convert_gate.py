"""Gate policies, decisions and aliases as messages of the contract, and a refusal as an error. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mooring.v1 import adapter_pb2, gate_pb2, subject_pb2

from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.evaluation.gate import PRESETS, RANGES, GatePolicy, Mode
from mooring_server.rpc import names
from mooring_server.rpc.times import timestamp
from mooring_server.storage.models import (
    Alias,
    AliasMove,
    Document,
    GateDecision,
    GatePolicyRow,
    Verdict,
)

_FLAGS = ("require_evaluation", "require_rights")
_FIELDS = ("mode", *_FLAGS, "allowed_rights", *RANGES)
_BASIS = subject_pb2.RightsDeclaration.Basis


def policy(tenant: str, document: Document | None) -> gate_pb2.GatePolicy:
    """A policy from its JSON form (`GatePolicy.to_json`); None is the default."""
    found = GatePolicy.from_json(document)
    return gate_pb2.GatePolicy(
        name=names.gate_policy(tenant),
        mode=gate_pb2.GateMode.Value(f"GATE_MODE_{found.mode.upper()}"),
        allowed_rights=[_BASIS.Value(f"BASIS_{basis.upper()}") for basis in found.allowed_rights],
        **{name: getattr(found, name) for name in (*_FLAGS, *RANGES)},
    )


def policy_row(row: GatePolicyRow) -> gate_pb2.GatePolicy:
    """A tenant's policy with its provenance."""
    made = policy(row.tenant, row.policy)
    made.revision, made.updated_by = row.revision, row.actor
    if row.update_time is not None:
        made.update_time.CopyFrom(timestamp(row.update_time))
    return made


def changed_policy(request: adapter_pb2.UpdateGatePolicyRequest, document: Document | None) -> Document:
    """The policy in force with a request's changes.

    Args:
        request: preset, values and mask.
        document: the policy in force; None is the default.

    Raises:
        MooringError: INVALID_FIELD.
    """
    if request.preset not in gate_pb2.GatePreset.values():
        raise _invalid("preset", f"must be one of {', '.join(PRESETS)}, not {request.preset}")
    start = GatePolicy.from_json(document)
    if request.preset:
        start = PRESETS[gate_pb2.GatePreset.Name(request.preset).removeprefix("GATE_PRESET_").lower()]
    given = request.policy
    wanted = list(request.update_mask.paths)
    if not wanted:
        wanted = [field.name for field, _ in given.ListFields() if field.name in _FIELDS]
    elif wanted == ["*"]:
        wanted = list(_FIELDS)
    unknown = [path for path in wanted if path not in _FIELDS]
    if unknown:
        raise _invalid("update_mask", f"names {unknown[0]!r}; known: {', '.join(_FIELDS)}")
    made = replace(start, **{name: _value(given, name) for name in wanted})
    made.validate()
    return made.to_json()


def _value(given: gate_pb2.GatePolicy, name: str) -> Any:
    """A field of the message as `GatePolicy` has it."""
    if name == "mode":
        if given.mode not in gate_pb2.GateMode.values():
            raise _invalid("policy.mode", f"must be one of {', '.join(Mode)}, not {given.mode}")
        word = gate_pb2.GateMode.Name(given.mode).removeprefix("GATE_MODE_").lower()
        return Mode.ENFORCE if word == "unspecified" else Mode(word)
    if name == "allowed_rights":
        if any(basis not in _BASIS.values() or not basis for basis in given.allowed_rights):
            raise _invalid("policy.allowed_rights", "holds a value that is no basis of rights")
        words = (_BASIS.Name(basis).removeprefix("BASIS_").lower() for basis in given.allowed_rights)
        return tuple(dict.fromkeys(words))
    if name in _FLAGS:
        return bool(getattr(given, name))
    return getattr(given, name) if given.HasField(name) else None  # type: ignore[arg-type]


def decision(record: GateDecision, *, kept: bool = True) -> gate_pb2.GateDecision:
    """A decision.

    Args:
        record: as it was written down, or would be.
        kept: whether it was.
    """
    made = gate_pb2.GateDecision(
        name=names.gate_decision(record.tenant, record.decision_id) if kept else "",
        adapter=names.adapter(record.tenant, f"{record.adapter_id}@{record.version}"),
        adapter_digest=record.digest,
        base_digest=record.base_digest,
        alias=record.alias,
        verdict=gate_pb2.GateVerdict.Value(f"GATE_VERDICT_{record.verdict}"),
        checks=[_check(document) for document in record.checks],
        policy=policy(record.tenant, record.policy),
        evaluation=names.job(record.tenant, record.evaluation_job_id) if record.evaluation_job_id else "",
        actor=record.actor,
        create_time=timestamp(record.create_time),
    )
    made.policy.revision = record.policy_revision
    return made


def _check(document: Document) -> gate_pb2.GateCheck:
    return gate_pb2.GateCheck(
        figure=document["figure"],
        value=document["value"],
        threshold=document["threshold"],
        comparison=gate_pb2.GateComparison.Value(f"GATE_COMPARISON_{document['comparison'].upper()}"),
        passed=document["passed"],
        measured=document["measured"],
        detail=document["detail"],
    )


def alias(record: Alias) -> gate_pb2.AdapterAlias:
    """An alias."""
    return gate_pb2.AdapterAlias(
        name=names.adapter(record.tenant, f"{record.adapter_id}@{record.alias}"),
        adapter=_version(record.tenant, record.adapter_id, record.version),
        adapter_digest=record.digest,
        previous_adapter=_version(record.tenant, record.adapter_id, record.previous_version),
        update_time=timestamp(record.update_time),
        actor=record.actor,
    )


def move(record: AliasMove) -> gate_pb2.AliasMove:
    """An entry of an alias's history."""
    return gate_pb2.AliasMove(
        alias=names.adapter(record.tenant, f"{record.adapter_id}@{record.alias}"),
        kind=gate_pb2.AliasMoveKind.Value(f"ALIAS_MOVE_KIND_{record.kind}"),
        adapter=_version(record.tenant, record.adapter_id, record.version),
        previous_adapter=_version(record.tenant, record.adapter_id, record.previous_version),
        gate_decision=names.gate_decision(record.tenant, record.decision_id) if record.decision_id else "",
        actor=record.actor,
        create_time=timestamp(record.create_time),
    )


def refusal(record: GateDecision, *, kept: bool) -> MooringError:
    """What a caller is told whose version the gate refused: every failing figure beside its threshold.

    Args:
        record: the decision.
        kept: whether it was written down.
    """
    assert record.verdict is Verdict.REFUSED
    failed = [check for check in record.checks if not check["passed"]]
    by_figure = {check["figure"]: _said(check) for check in failed}
    name = f"{record.adapter_id}@{record.version}"
    unevaluated = "evaluation" in by_figure
    remedy = (
        f"Evaluate it first: mooring evaluate {name}."
        if unevaluated
        else "Train it differently (drift budget, steps, photos), or change what the gate asks for."
    )
    return MooringError(
        Reason.GATE_NEEDS_EVALUATION if unevaluated else Reason.GATE_REFUSED,
        f"The gate does not let {name} be published as {record.alias!r}: {'; '.join(_sentences(by_figure))}.",
        remedy=remedy,
        metadata={
            **by_figure,
            **({"decision": names.gate_decision(record.tenant, record.decision_id)} if kept else {}),
        },
        fields=[FieldViolation(f"gate.{figure}", text) for figure, text in by_figure.items()],
    )


def _said(check: Document) -> str:
    """A failing check's figure and threshold in words."""
    if check["comparison"] == "present":
        return str(check["detail"])
    bound = "at least" if check["comparison"] == "at_least" else "at most"
    value = "not measured" if check["value"] is None else f"{check['value']:.4g}"
    return f"{value}, must be {bound} {check['threshold']:.4g}"


def _sentences(by_figure: dict[str, str]) -> Iterable[str]:
    return (f"{figure.replace('_', ' ')}: {text}" for figure, text in by_figure.items())


def _version(tenant: str, adapter_id: str, version: int | None) -> str:
    return "" if version is None else names.adapter(tenant, f"{adapter_id}@{version}")


def _invalid(field: str, problem: str) -> MooringError:
    return MooringError(Reason.INVALID_FIELD, f"{field} {problem}.", fields=[FieldViolation(field, problem)])
