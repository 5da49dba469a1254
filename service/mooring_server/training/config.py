"""What a training run is told: method, budget or strength, and the usual LoRA hyper-parameters.

The budget ρ is a share of the base's own guidance energy (method.md §3). The presets are calibrated on the
embedded base: see docs/method.md for the measurements behind each number.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, Literal, get_args

from mooring_server.errors import FieldViolation, MooringError, Reason

Targets = Literal["attention", "attention+ff"]
Framing = Literal["crop", "letterbox"]

PRESETS: Mapping[str, float] = {"conservative": 0.05, "balanced": 0.12, "adaptive": 0.25}
"""Drift budgets ρ by name."""

MAX_STEPS = 20_000
"""Most optimiser steps of one training."""


class Method(StrEnum):
    """How the base is protected while the subject is learnt; method.md §2 has the formulas."""

    NONE = "none"
    L2 = "l2"
    FACTOR_DECAY = "factor_decay"
    SPECTRAL = "spectral"
    PRIOR_PRESERVATION = "prior_preservation"

    @property
    def penalised(self) -> bool:
        """Whether the method is a penalty on the factors, whose strength a drift budget can steer."""
        return self in (Method.L2, Method.FACTOR_DECAY, Method.SPECTRAL)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Everything that decides the resulting bits is here, besides photos and base.

    Args:
        method: protection of the base.
        budget: drift budget ρ > 0; the controller finds the strength. Penalised methods only, instead of
            `strength`; when both are absent such a method takes the preset `balanced`.
        strength: fixed λ ≥ 0 of the penalty (penalised methods), or the weight of the class-image loss
            (`prior_preservation`, default 1).
        rank: rank r of the factors, 1–128.
        learning_rate: peak AdamW step for the factors.
        embedding_learning_rate: peak step for the placeholder's embedding, relative to the RMS of the
            embedding table, so that it means the same for every text encoder.
        steps: optimiser steps.
        batch_size: photo views per step.
        seed: of initialisation, noise, timesteps, batches and class images.
        targets: which layers are adapted.
        learn_embedding: learn the placeholder's token embedding(s), started from the class noun's.
        framing: how a photo becomes a square: centre `crop`, or `letterbox` on its mean border colour.
        views: encoded variants per photo (the first is the photo itself, others are slightly shifted and
            zoomed).
        flip: mirror every second view; off by default because products and logos carry text.
        prior_images: class images the base draws for `prior_preservation`.
        checkpoint_every: steps between checkpoints.
        preview_every: steps between preview images; 0 for none.
        probe_every: steps between drift measurements on the control subset; the first ones come sooner.
        probe_points: points of the full drift probe, rounded to whole rounds over its prompts.
        control_points: points of the control subset.
    """

    method: Method = Method.SPECTRAL
    budget: float | None = None
    strength: float | None = None
    rank: int = 8
    learning_rate: float = 1e-3
    embedding_learning_rate: float = 2e-2
    steps: int = 400
    batch_size: int = 4
    seed: int = 0
    targets: Targets = "attention"
    learn_embedding: bool = True
    framing: Framing = "crop"
    views: int = 4
    flip: bool = False
    prior_images: int = 32
    checkpoint_every: int = 50
    preview_every: int = 100
    probe_every: int = 5
    probe_points: int = 96
    control_points: int = 12

    @property
    def target_drift(self) -> float | None:
        """The budget the controller steers to, or None when the strength is fixed or there is none."""
        if not self.method.penalised or self.strength is not None:
            return None
        return self.budget if self.budget is not None else PRESETS["balanced"]

    @property
    def digest(self) -> str:
        """`sha256:…` of every field; a checkpoint of another configuration is refused."""
        return "sha256:" + hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def validate(self) -> None:
        """Check every field.

        Raises:
            MooringError: INVALID_FIELD or STEPS_OUT_OF_RANGE, naming each faulty field.
        """
        found = [FieldViolation(name, text) for name, text in self._violations()]
        if not found:
            return
        only_steps = [v.field for v in found] == ["steps"]
        raise MooringError(
            Reason.STEPS_OUT_OF_RANGE if only_steps else Reason.INVALID_FIELD,
            "The training configuration is not valid: "
            + "; ".join(f"{v.field} {v.description}" for v in found),
            remedy="Correct the named fields; leave a field out to get its default.",
            metadata={"minimum": "1", "maximum": str(MAX_STEPS)} if only_steps else None,
            fields=found,
        )

    def _violations(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []

        def need(ok: bool, field: str, text: str) -> None:
            if not ok:
                found.append((field, f"{text}, not {getattr(self, field)!r}"))

        def within(field: str, low: float, high: float) -> None:
            at = getattr(self, field)
            need(math.isfinite(at) and low <= at <= high, field, f"must be between {low:g} and {high:g}")

        within("steps", 1, MAX_STEPS)
        within("rank", 1, 128)
        within("learning_rate", 1e-7, 1.0)
        within("embedding_learning_rate", 0.0, 10.0)
        within("batch_size", 1, 256)
        within("seed", 0, 2**63 - 1)
        within("views", 1, 64)
        within("prior_images", 1, 1000)
        within("checkpoint_every", 1, 20_000)
        within("preview_every", 0, 20_000)
        within("probe_every", 1, 20_000)
        within("probe_points", 2, 10_000)
        within("control_points", 2, 10_000)
        need(self.targets in get_args(Targets), "targets", f"must be one of {get_args(Targets)}")
        need(self.framing in get_args(Framing), "framing", f"must be one of {get_args(Framing)}")
        if self.budget is not None:
            within("budget", 1e-6, 1e6)
            if not self.method.penalised:
                found.append(("budget", f"cannot be kept by method '{self.method}', which has no penalty"))
            elif self.strength is not None:
                found.append(("budget", "and strength exclude each other: the controller finds the strength"))
        if self.strength is not None:
            within("strength", 0.0, 1e9)
            if self.method is Method.NONE:
                found.append(("strength", "has no meaning under method 'none'; leave it out"))
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values, every field present."""
        return {**asdict(self), "method": str(self.method)}

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> TrainConfig:
        """Read a configuration; absent fields take their defaults. The result is validated.

        Args:
            document: field name → value. `budget` may also be the name of a preset.

        Raises:
            MooringError: INVALID_FIELD on an unknown field, preset or method, or a value out of range.
        """
        known = {field.name: field.default for field in fields(TrainConfig)}
        values = dict(document)
        violations = [FieldViolation(key, "is not a training field") for key in values if key not in known]
        if isinstance(values.get("budget"), str):
            preset = PRESETS.get(values["budget"])
            if preset is None:
                names = ", ".join(PRESETS)
                violations.append(FieldViolation("budget", f"must be a number or one of {names}"))
            values["budget"] = preset
        if "method" in values:
            try:
                values["method"] = Method(values["method"])
            except ValueError:
                names = ", ".join(Method)
                violations.append(FieldViolation("method", f"must be one of {names}"))
        for key, default in known.items():
            given = values.get(key)
            if key in values and given is not None and not _same_kind(given, default):
                violations.append(FieldViolation(key, f"has the wrong type: {given!r}"))
        if violations:
            raise MooringError(
                Reason.INVALID_FIELD,
                "The training configuration cannot be read: "
                + "; ".join(f"{v.field} {v.description}" for v in violations),
                remedy="Correct the named fields.",
                fields=violations,
            )
        config = TrainConfig(**values)
        config.validate()
        return config


def _same_kind(given: object, default: object) -> bool:
    if isinstance(default, bool):
        return isinstance(given, bool)
    if isinstance(default, int):
        return isinstance(given, int) and not isinstance(given, bool)
    if isinstance(default, float) or default is None:
        return isinstance(given, (int, float)) and not isinstance(given, bool)
    return isinstance(given, str)
