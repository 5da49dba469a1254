"""Several evaluations of one prompt set side by side: what report and grid show as columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.evaluation.certificate import Certificate
from mooring_server.evaluation.metrics import HIGHER_IS_BETTER
from mooring_server.evaluation.probe import DriftFigure
from mooring_server.evaluation.result import EvaluationResult

BASE_LABEL = "base"


@dataclass(frozen=True, eq=False)
class Arm:
    """One column: the untouched base, or one adapter.

    Attributes:
        label: what the reader calls it.
        is_base: whether it is the untouched base.
        metrics: figure by name, without prefixes.
        intervals: 95 % interval by name.
        images: one picture for each pair of the evaluation, in its order.
        scores: the scores of each picture.
        drift: None for the base.
        certificate: None for the base.
        budget: the drift budget of its training, if it had one.
    """

    label: str
    is_base: bool
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    images: Sequence[NDArray[np.uint8]]
    scores: Sequence[Mapping[str, float]]
    drift: DriftFigure | None
    certificate: Certificate | None
    budget: float | None


def arms_of(results: Sequence[tuple[str, EvaluationResult]]) -> list[Arm]:
    """The base first, then the adapters in the order given.

    Args:
        results: (label, evaluation). An evaluation of the base alone gives the base's column its label;
            without one, the base's pictures come from the first evaluation.

    Raises:
        MooringError: INVALID_FIELD when the evaluations do not compare: other base, judges, prompts, seeds
            or sampling.
    """
    if not results:
        raise _not_comparable("there is no evaluation")
    first = results[0][1]
    for label, result in results[1:]:
        for what, mine, its in (
            ("base", first.base_digest, result.base_digest),
            ("judges", first.judges_digest, result.judges_digest),
            ("pictures", _drawn(first), _drawn(result)),
        ):
            if mine != its:
                raise _not_comparable(f"{label!r} was evaluated with other {what} than {results[0][0]!r}")
    alone = [(label, result) for label, result in results if result.adapter_digest is None]
    label, source = alone[0] if alone else (BASE_LABEL, first)
    return [
        _base_arm(label, source),
        *(_arm(*item) for item in results if item[1].adapter_digest is not None),
    ]


def _drawn(result: EvaluationResult) -> tuple[object, ...]:
    config = result.config
    pictures = tuple((pair.kind, pair.base_prompt, pair.seed) for pair in result.pairs)
    return config.steps, config.guidance_scale, config.sampler, pictures


def _base_arm(label: str, source: EvaluationResult) -> Arm:
    prefix = "base_"
    own = {name.removeprefix(prefix): x for name, x in source.metrics.items() if name.startswith(prefix)}
    ends = {name.removeprefix(prefix): x for name, x in source.intervals.items() if name.startswith(prefix)}
    return Arm(
        label=label,
        is_base=True,
        metrics=own | {"drift": 0.0, "generic_change": 0.0},
        intervals=ends,
        images=[pair.base for pair in source.pairs],
        scores=[
            {n.removeprefix(prefix): x for n, x in pair.scores.items() if n.startswith(prefix)}
            for pair in source.pairs
        ],
        drift=None,
        certificate=None,
        budget=None,
    )


def _arm(label: str, result: EvaluationResult) -> Arm:
    return Arm(
        label=label,
        is_base=False,
        metrics={name: result.metrics[name] for name in HIGHER_IS_BETTER if name in result.metrics},
        intervals=result.intervals,
        images=[pair.image for pair in result.pairs],
        scores=[{n: x for n, x in pair.scores.items() if not n.startswith("base_")} for pair in result.pairs],
        drift=result.drift,
        certificate=result.certificate,
        budget=result.config.budget,
    )


def _not_comparable(why: str) -> MooringError:
    return MooringError(
        Reason.INVALID_FIELD,
        f"these evaluations cannot be shown side by side: {why}.",
        remedy="Evaluate all of them with the same prompts, seeds and sampling on the same base and judges.",
        fields=[FieldViolation("evaluations", why)],
    )
