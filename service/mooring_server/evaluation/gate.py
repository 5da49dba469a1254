"""The gate: whether an adapter version may be published, from its evaluation, its certificate and its rights.

Pure: facts and policy in, checks and verdict out, so that the store can judge inside the transaction that
publishes. A figure is held against its threshold with the end of its interval that is worse where a bound on
harm is meant (drift); likeness and prompt agreement are compared as they were measured, because their
intervals over a dozen prompts are wider than any difference worth a threshold.

What counts as an evaluation: the newest successful one of exactly this adapter digest on this base, at
adapter scale 1 and, where the version knows its subject, against that subject's photos. Anything else says
nothing about what would be served.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any

from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.evaluation.metrics import mean_over_prompts
from mooring_server.evaluation.result import GENERIC, SUBJECT, EvaluationResult


class Mode(StrEnum):
    """What the gate does with a version that fails: refuse it, publish it all the same, or not look."""

    ENFORCE = "enforce"
    WARN = "warn"
    OFF = "off"


class Comparison(StrEnum):
    """How a figure is held against its threshold."""

    AT_LEAST = "at_least"
    AT_MOST = "at_most"
    PRESENT = "present"


@dataclass(frozen=True)
class GatePolicy:
    """What a version must show. None, for a threshold: not checked.

    Attributes:
        mode: see `Mode`.
        require_evaluation: refuse a version without an evaluation that counts.
        require_rights: refuse a version without a rights declaration.
        allowed_rights: the only bases that pass, such as "owned" and "consent"; empty: any.
        min_dino: least likeness to the photos in new scenes, a cosine.
        min_dino_gain: least gain of it over the untouched base on the same prompts and seeds.
        max_generic_clip_t_drop: most that CLIP-T may fall below the base's on prompts without the subject.
        max_drift: largest upper end of the drift's interval, as a share of the base's guidance energy.
        max_drift_over_budget: the same as a multiple of the budget of the training; only where there was one.
        max_sigma: largest σ_max(ΔW) of any layer.
        max_relative_sigma: largest σ_max(ΔW)/‖W₀‖₂ of any layer.
        min_prompts: fewest different subject prompts of the evaluation.
        min_generic_prompts: fewest different prompts without the subject.
    """

    mode: Mode = Mode.ENFORCE
    require_evaluation: bool = True
    require_rights: bool = True
    allowed_rights: tuple[str, ...] = ()
    min_dino: float | None = None
    min_dino_gain: float | None = 0.05
    max_generic_clip_t_drop: float | None = 0.02
    max_drift: float | None = 0.5
    max_drift_over_budget: float | None = 1.5
    max_sigma: float | None = None
    max_relative_sigma: float | None = 0.5
    min_prompts: int | None = 4
    min_generic_prompts: int | None = 8

    def validate(self) -> None:
        """Check every threshold's range.

        Raises:
            MooringError: INVALID_FIELD, naming each faulty field as `policy.<field>`.
        """
        found = []
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                found.append(FieldViolation(f"policy.{name}", f"must be {low:,} to {high:,}, not {value}"))
        if found:
            raise MooringError(
                Reason.INVALID_FIELD,
                "; ".join(f"{violation.field} {violation.description}" for violation in found) + ".",
                remedy="Correct the named thresholds; leave one out to check nothing there.",
                fields=found,
            )

    def to_json(self) -> dict[str, Any]:
        """The attributes by name."""
        return asdict(self) | {"allowed_rights": list(self.allowed_rights)}

    @staticmethod
    def from_json(content: Mapping[str, Any] | None) -> GatePolicy:
        """The inverse of `to_json`; None is the default, as is a field that an older server did not know."""
        known = {field.name for field in fields(GatePolicy)}
        values = {name: value for name, value in (content or {}).items() if name in known}
        if "mode" in values:
            values["mode"] = Mode(values["mode"])
        return GatePolicy(**{**values, "allowed_rights": tuple(values.get("allowed_rights", ()))})


RANGES: Mapping[str, tuple[float, float]] = {
    "min_dino": (-1, 1),
    "min_dino_gain": (-2, 2),
    "max_generic_clip_t_drop": (0, 2),
    "max_drift": (0, 100),
    "max_drift_over_budget": (0, 100),
    "max_sigma": (0, 1_000_000),
    "max_relative_sigma": (0, 1_000_000),
    "min_prompts": (0, 200),
    "min_generic_prompts": (0, 200),
}
"""What thresholds may be."""

BALANCED = GatePolicy()
PRESETS: Mapping[str, GatePolicy] = {
    "strict": replace(
        BALANCED,
        min_dino_gain=0.1,
        max_generic_clip_t_drop=0.01,
        max_drift=0.25,
        max_drift_over_budget=1.3,
        max_relative_sigma=0.1,
        min_prompts=6,
        min_generic_prompts=24,
    ),
    "balanced": BALANCED,
    "lenient": replace(
        BALANCED,
        min_dino_gain=0.0,
        max_generic_clip_t_drop=0.05,
        max_drift=1.0,
        max_drift_over_budget=2.0,
        max_relative_sigma=1.0,
        min_prompts=1,
        min_generic_prompts=2,
    ),
}
"""Complete policies by name."""


@dataclass(frozen=True)
class Check:
    """One figure beside its threshold.

    Attributes:
        figure: its name.
        comparison: see `Comparison`.
        value: what is compared; None when it was not measured (which fails) or is no number.
        threshold: the policy's; None for a check without a number.
        passed: whether it passed.
        measured: the figure itself where `value` is an end of its interval.
        detail: in words, what was found.
    """

    figure: str
    comparison: Comparison
    value: float | None
    threshold: float | None
    passed: bool
    measured: float | None = None
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """The attributes by name."""
        return asdict(self)


@dataclass(frozen=True)
class Facts:
    """What is known about a version.

    Attributes:
        rights: its declaration; empty for none.
        certificate: its certificate's JSON; empty for none.
        budget: drift budget of its training; None for none.
        evaluation: `figures` of the evaluation that counts; None for none.
    """

    rights: Mapping[str, Any]
    certificate: Mapping[str, Any]
    budget: float | None
    evaluation: Mapping[str, Any] | None


def figures(result: EvaluationResult, subject_id: str) -> dict[str, Any]:
    """What the gate reads of an evaluation, to be kept with its job.

    Args:
        result: the evaluation.
        subject_id: whose photos it compared with.
    """
    pairs = result.of_kind(GENERIC)
    drops = [
        (pair.prompt, pair.scores["base_clip_t"] - pair.scores["clip_t"])
        for pair in pairs
        if {"base_clip_t", "clip_t"} <= pair.scores.keys()
    ]
    drop = mean_over_prompts(drops)
    return {
        "adapter_digest": result.adapter_digest,
        "base_digest": result.base_digest,
        "judges_digest": result.judges_digest,
        "subject": subject_id,
        "adapter_scale": result.config.adapter_scale,
        "prompts": len({pair.prompt for pair in result.of_kind(SUBJECT)}),
        "generic_prompts": len({pair.prompt for pair in pairs}),
        "dino": result.metrics.get("dino"),
        "base_dino": result.metrics.get("base_dino"),
        "generic_clip_t_drop": None if drop is None else list(drop),
        "drift": None if result.drift is None else result.drift.to_json(),
    }


def counts(evaluation: Mapping[str, Any], subject_id: str) -> bool:
    """Whether an evaluation of the right digests says something about what would be served.

    Args:
        evaluation: its `figures`.
        subject_id: the version's own subject; "" when it has none.
    """
    return evaluation["adapter_scale"] == 1.0 and subject_id in {"", evaluation["subject"]}


def judge(policy: GatePolicy, facts: Facts) -> list[Check]:
    """Every check that the policy asks for, in the order of the report; none for a gate that is off."""
    if policy.mode is Mode.OFF:
        return []
    evaluation = facts.evaluation
    checks = []
    if policy.require_evaluation:
        found = evaluation is not None
        detail = (
            "found"
            if found
            else "no successful evaluation of exactly this adapter at scale 1 with its own subject"
        )
        checks.append(Check("evaluation", Comparison.PRESENT, None, None, found, detail=detail))
    checks += _rights(policy, facts.rights)
    if evaluation is not None:
        dino, base_dino = evaluation["dino"], evaluation["base_dino"]
        gain = None if dino is None or base_dino is None else dino - base_dino
        drop = evaluation["generic_clip_t_drop"]
        checks += _bounded(
            ("prompts", Comparison.AT_LEAST, evaluation["prompts"], policy.min_prompts),
            (
                "generic_prompts",
                Comparison.AT_LEAST,
                evaluation["generic_prompts"],
                policy.min_generic_prompts,
            ),
            ("dino", Comparison.AT_LEAST, dino, policy.min_dino),
            ("dino_gain", Comparison.AT_LEAST, gain, policy.min_dino_gain),
            (
                "generic_clip_t_drop",
                Comparison.AT_MOST,
                None if drop is None else drop[0],
                policy.max_generic_clip_t_drop,
            ),
        )
    return checks + _drift(policy, facts) + _sigma(policy, facts.certificate)


def _rights(policy: GatePolicy, rights: Mapping[str, Any]) -> list[Check]:
    basis = str(rights.get("basis", "")).lower()
    if not policy.require_rights and not policy.allowed_rights:
        return []
    passed = bool(basis) if policy.require_rights else True
    detail = basis or "none declared"
    if policy.allowed_rights and (basis or policy.require_rights) and basis not in policy.allowed_rights:
        passed, detail = False, f"{detail}; allowed: {', '.join(policy.allowed_rights)}"
    return [Check("rights", Comparison.PRESENT, None, None, passed, detail=detail)]


def _drift(policy: GatePolicy, facts: Facts) -> list[Check]:
    """The upper end of the interval: it is what cannot be ruled out."""
    measured = facts.evaluation["drift"] if facts.evaluation is not None else facts.certificate.get("drift")
    if facts.evaluation is None and measured is None and policy.require_evaluation:
        return []  # the missing evaluation is what is wrong
    source = "of the evaluation" if facts.evaluation is not None else "of the certificate"
    detail = f"upper end of the 95 % interval, {source}" if measured else "not measured"
    high, value = (measured["high"], measured["value"]) if measured else (None, None)
    budget = facts.budget
    checks = _bounded(("drift", Comparison.AT_MOST, high, policy.max_drift))
    if budget:
        checks += _bounded(
            (
                "drift_over_budget",
                Comparison.AT_MOST,
                None if high is None else high / budget,
                policy.max_drift_over_budget,
            )
        )
    return [
        replace(
            check,
            measured=value / budget if check.figure == "drift_over_budget" and value and budget else value,
            detail=detail,
        )
        for check in checks
    ]


def _sigma(policy: GatePolicy, certificate: Mapping[str, Any]) -> list[Check]:
    checks = _bounded(
        ("sigma", Comparison.AT_MOST, certificate.get("sigma_max"), policy.max_sigma),
        ("relative_sigma", Comparison.AT_MOST, certificate.get("relative_max"), policy.max_relative_sigma),
    )
    return [
        replace(check, detail="exact bound" if check.value is not None else "no certificate")
        for check in checks
    ]


def _bounded(*wanted: tuple[str, Comparison, float | None, float | None]) -> list[Check]:
    """Checks of (figure, comparison, value, threshold); none where there is no threshold."""
    checks = []
    for figure, comparison, value, threshold in wanted:
        if threshold is None:
            continue
        # NaN fails both ways
        within = value is not None and (
            value >= threshold if comparison is Comparison.AT_LEAST else value <= threshold
        )
        detail = "" if value is not None else "not measured"
        checks.append(Check(figure, comparison, value, threshold, within, detail=detail))
    return checks


def failing(checks: Iterable[Check]) -> list[Check]:
    """The checks that did not pass."""
    return [check for check in checks if not check.passed]
