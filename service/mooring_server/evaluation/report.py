"""The report: one self-contained HTML page over one or several arms, for a person who decides.

Order of the page is the order of the questions: is the adapter within its budget, what do the figures say
beside the base, do the pictures say the same, what is certified. Everything is inline (styles, pictures as
data URIs, charts as SVG); no script, no font, no address is fetched, and it follows the reader's light or
dark setting.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mooring_server.evaluation.arms import Arm, arms_of
from mooring_server.evaluation.grid import grid
from mooring_server.evaluation.metrics import HIGHER_IS_BETTER
from mooring_server.evaluation.result import CLASS, GENERIC, PLAIN, SUBJECT, EvaluationResult, png

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["grid", "render"]

LARGEST_PNG_SIDE = 256
"""Larger pictures are inlined as JPEG, or a report of 512 px pictures would have tens of megabytes."""

CHART_WIDTH = 240

EXPLAINED = {
    "dino": ("DINO", "likeness to the subject's photos"),
    "clip_i": ("CLIP-I", "likeness to the photos, by CLIP"),
    "clip_t": ("CLIP-T", "new scenes: the picture does what the prompt says"),
    "generic_clip_t": ("CLIP-T generic", "the same for prompts without the subject"),
    "generic_change": ("change generic", "how far those pictures moved from the base's, same seed"),
    "pres": ("PRES", "bare class pictures that look like the subject"),
    "div": ("DIV", "spread among pictures of the bare subject"),
    "drift": ("drift", "share of the base's guidance energy"),
}
"""Row order of the table, with names as the field uses them and what they say in plain words."""

SECTIONS = {
    SUBJECT: ("The subject in new scenes", (("DINO", "dino"), ("CLIP-T", "clip_t"))),
    GENERIC: ("Prompts without the subject", (("CLIP-T", "clip_t"), ("change", "change"))),
    PLAIN: ("The bare subject", ()),
    CLASS: ("The bare class", (("DINO", "pres"),)),
}


@dataclass(frozen=True)
class _Axis:
    """A linear axis of a small chart, in pixels of its width."""

    low: float
    high: float
    width: int = CHART_WIDTH

    def at(self, value: float) -> float:
        span = self.high - self.low or 1.0
        return round(6 + (self.width - 12) * (value - self.low) / span, 1)


def render(
    results: Sequence[tuple[str, EvaluationResult]],
    *,
    photos: Sequence[Image.Image] = (),
    title: str = "Evaluation",
) -> str:
    """Render the page.

    Args:
        results: (label, evaluation) of each arm, all of the same prompts, seeds, base and judges. The base's
            column is added from the first evaluation unless an evaluation of the base alone is among them.
        photos: subject photos to show.
        title: heading.

    Returns:
        HTML text.

    Raises:
        MooringError: INVALID_FIELD when the evaluations do not compare.
    """
    arms = arms_of(results)
    first = results[0][1]
    return _template().render(
        title=title,
        arms=arms,
        photos=[_data_uri(_thumbnail(photo)) for photo in photos],
        gauges=_gauges(arms),
        rows=[_metric_row(name, arms) for name in EXPLAINED if any(name in arm.metrics for arm in arms)],
        sections=[_section(first, arms, kind) for kind in SECTIONS if first.of_kind(kind)],
        certificates=[_certificate(i, arm) for i, arm in enumerate(arms) if arm.certificate is not None],
        config=first.config,
        base_digest=first.base_digest,
        judges_digest=first.judges_digest,
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mooring_server.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def _gauges(arms: Sequence[Arm]) -> dict[str, Any]:
    """Drift of every adapter on one axis from 0, with interval and budget."""
    found = [(i, arm) for i, arm in enumerate(arms) if arm.drift is not None]
    largest = max(
        [0.0, *(arm.drift.high for _, arm in found if arm.drift), *(arm.budget or 0.0 for _, arm in found)]
    )
    axis = _Axis(0.0, largest * 1.05 or 1.0, width=560)
    items = []
    for i, arm in found:
        assert arm.drift is not None
        share = None if not arm.budget else arm.drift.value / arm.budget
        items.append(
            {
                "arm": i,
                "label": arm.label,
                "figure": arm.drift,
                "x": axis.at(arm.drift.value),
                "low": axis.at(arm.drift.low),
                "high": axis.at(arm.drift.high),
                "budget": arm.budget,
                "budget_x": None if not arm.budget else axis.at(arm.budget),
                "share": share,
                "verdict": _verdict(arm.budget, arm.drift.low, arm.drift.value),
            }
        )
    return {"items": items, "zero": axis.at(0.0), "width": axis.width}


def _verdict(budget: float | None, low: float, value: float) -> str:
    if not budget:
        return "no budget"
    if value <= budget:
        return "within budget"
    return "within the interval of its budget" if low <= budget else "over budget"


def _metric_row(name: str, arms: Sequence[Arm]) -> dict[str, Any]:
    """One figure over all arms, with a chart of values and intervals on an axis of its own."""
    values = [arm.metrics.get(name) for arm in arms]
    ends = [arm.intervals.get(name) for arm in arms]
    known = [x for x in values if x is not None] + [x for pair in ends if pair for x in pair]
    axis = _Axis(min(known), max(known))
    base = values[0]
    cells = [
        {
            "value": value,
            "interval": interval,
            "delta": None if value is None or base is None or i == 0 else value - base,
            "x": None if value is None else axis.at(value),
            "low": axis.at(interval[0]) if interval else None,
            "high": axis.at(interval[1]) if interval else None,
        }
        for i, (value, interval) in enumerate(zip(values, ends, strict=True))
    ]
    label, meaning = EXPLAINED[name]
    return {
        "label": label,
        "meaning": meaning,
        "arrow": "↑" if HIGHER_IS_BETTER[name] else "↓",
        "cells": cells,
        "width": CHART_WIDTH,
        "height": 8 + 9 * len(arms),
    }


def _section(first: EvaluationResult, arms: Sequence[Arm], kind: str) -> dict[str, Any]:
    """Pictures of one kind: a row for each prompt and seed, a column for each arm."""
    heading, shown = SECTIONS[kind]
    rows = [
        {
            "prompt": pair.base_prompt if kind in {CLASS, GENERIC} else pair.prompt,
            "seed": pair.seed,
            "cells": [
                {
                    "arm": arm.label,
                    "uri": _data_uri(arm.images[i]),
                    "scores": [(name, arm.scores[i][key]) for name, key in shown if key in arm.scores[i]],
                }
                for arm in arms
            ],
        }
        for i, pair in enumerate(first.pairs)
        if pair.kind == kind
    ]
    return {"kind": kind, "heading": heading, "rows": rows, "open": kind in {SUBJECT, GENERIC}}


def _certificate(index: int, arm: Arm) -> dict[str, Any]:
    certificate = arm.certificate
    assert certificate is not None
    widest = max((layer.relative or 0.0 for layer in certificate.layers), default=0.0) or 1.0
    return {
        "arm": index,
        "label": arm.label,
        "certificate": certificate,
        "layers": [(layer, 100 * (layer.relative or 0.0) / widest) for layer in certificate.layers],
    }


def _data_uri(image: NDArray[np.uint8]) -> str:
    if max(image.shape[:2]) <= LARGEST_PNG_SIDE:
        return "data:image/png;base64," + base64.b64encode(png(image)).decode()
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _thumbnail(photo: Image.Image) -> NDArray[np.uint8]:
    small = photo.convert("RGB")
    small.thumbnail((LARGEST_PNG_SIDE, LARGEST_PNG_SIDE))
    return np.asarray(small)
