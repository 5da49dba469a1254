"""What an evaluation draws and measures: prompts, seeds, sampling, probe."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.evaluation.prompts import article, without_placeholder

SUBJECT = "{}"
"""Stands for "placeholder and class noun" in a prompt, as in "a photo of a {} in the snow"."""

NEW_SCENES = (
    "a photo of a {} on the beach",
    "a photo of a {} in the snow",
    "a photo of a {} in the jungle",
    "a photo of a {} in the city",
    "a photo of a {} in the desert",
    "a photo of a {} at night",
)
"""Subject prompts where a caller gives none."""


@dataclass(frozen=True)
class EvaluationConfig:
    """One evaluation. Everything that decides its figures is here, besides base, judges, adapter and photos.

    Attributes:
        prompts: subject prompts; `{}` or the placeholder marks the subject. The base draws the same prompt
            with the class noun alone, so that pairs of one seed compare.
        generic_prompts: prompts without the subject, drawn for CLIP-T and picture changes beside the base.
        probe_prompts: generic prompts of the drift probe, at best others than training was steered on;
            `generic_prompts` where there are none.
        class_noun: what kind of thing the subject is, "dog".
        placeholder: the learned token; empty for an adapter without one.
        seeds: every subject prompt is drawn with each; generic prompts with the first.
        steps: denoising steps.
        guidance_scale: classifier-free guidance scale of all pictures.
        adapter_scale: strength of the adapter.
        class_samples: pictures of "a photo of a <class noun>" for PRES and of the plain subject for DIV;
            0 leaves both out.
        sampler: name of the sampler.
        probe_points: points of the drift probe.
        probe_seed: of the probe's noise and timesteps; another seed than training's control probe uses, so
            that the controller is not graded on the points it steered by.
        budget: the drift budget that training was given, for certificate and report.
    """

    prompts: tuple[str, ...] = NEW_SCENES
    generic_prompts: tuple[str, ...] = ()
    probe_prompts: tuple[str, ...] = ()
    class_noun: str = ""
    placeholder: str = ""
    seeds: tuple[int, ...] = (0,)
    steps: int = 25
    guidance_scale: float = 4.0
    adapter_scale: float = 1.0
    class_samples: int = 8
    sampler: str = "ddim"
    probe_points: int = 288
    probe_seed: int = 1000
    budget: float | None = None

    def validate(self) -> None:
        """Check every field.

        Raises:
            MooringError: EMPTY_PROMPT, STEPS_OUT_OF_RANGE or INVALID_FIELD, naming each faulty field.
        """
        found: list[tuple[Reason, str, str]] = []

        def need(ok: bool, field: str, text: str, reason: Reason = Reason.INVALID_FIELD) -> None:
            if not ok:
                found.append((reason, field, text))

        for name in _PROMPTS:
            prompts = getattr(self, name)
            need(len(prompts) <= 200, name, f"has {len(prompts)} entries, at most 200")
            for i, prompt in enumerate(prompts):
                need(bool(prompt.strip()), f"{name}[{i}]", "is empty", Reason.EMPTY_PROMPT)
        need(
            bool(self.prompts) or bool(self.generic_prompts), "prompts", "and generic_prompts are both empty"
        )
        need(
            len(set(self.generic_prompts)) >= 2, "generic_prompts", "must hold at least two different prompts"
        )
        need(len(set(self.probe_prompts)) != 1, "probe_prompts", "must hold at least two different prompts")
        need(bool(self.class_noun.strip()), "class_noun", "is empty")
        need(1 <= len(self.seeds) <= 16, "seeds", f"must be 1 to 16 numbers, not {len(self.seeds)}")
        need(all(0 <= seed < 2**63 for seed in self.seeds), "seeds", "must lie between 0 and 2^63 - 1")
        need(
            1 <= self.steps <= 150, "steps", f"must be 1 to 150, not {self.steps}", Reason.STEPS_OUT_OF_RANGE
        )
        need(
            _within(self.guidance_scale, 1, 30),
            "guidance_scale",
            f"must be 1 to 30, not {self.guidance_scale}",
        )
        need(_within(self.adapter_scale, 0, 2), "adapter_scale", f"must be 0 to 2, not {self.adapter_scale}")
        need(
            self.class_samples == 0 or 2 <= self.class_samples <= 200,
            "class_samples",
            f"must be 0 or 2 to 200, not {self.class_samples}",
        )
        need(2 <= self.probe_points <= 4096, "probe_points", f"must be 2 to 4096, not {self.probe_points}")
        need(self.budget is None or _within(self.budget, 0, 100), "budget", f"must not be {self.budget}")
        if found:
            raise MooringError(
                found[0][0],
                "the evaluation cannot start: "
                + "; ".join(f"{field} {text}" for _, field, text in found)
                + ".",
                remedy="Correct the named fields; leave a field out to get its default.",
                metadata={"minimum": "1", "maximum": "150"}
                if found[0][0] is Reason.STEPS_OUT_OF_RANGE
                else None,
                fields=[FieldViolation(field, text) for _, field, text in found],
            )

    def adapted_prompt(self, prompt: str) -> str:
        """The prompt as the adapted model gets it: `{}` becomes placeholder and class noun."""
        subject = f"{self.placeholder} {self.class_noun}".strip()
        # "a {}" becomes "an animal" without a placeholder, as the prompt with one does when it loses it
        prompt = re.sub(rf"\ban?\s+{re.escape(SUBJECT)}", f"{article(subject)} {SUBJECT}", prompt)
        return prompt.replace(SUBJECT, subject)

    def base_prompt(self, prompt: str) -> str:
        """The prompt as the base and the judges' text tower get it: the class noun alone."""
        return without_placeholder(self.adapted_prompt(prompt), self.placeholder)

    @property
    def class_prompt(self) -> str:
        """The bare class prompt of PRES."""
        return self.base_prompt(f"a photo of {article(self.class_noun)} {SUBJECT}")

    def to_json(self) -> dict[str, Any]:
        """The attributes by name."""
        return asdict(self) | {key: list(getattr(self, key)) for key in _TUPLES}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> EvaluationConfig:
        """The inverse of `to_json`; absent fields take their defaults.

        Raises:
            MooringError: INVALID_FIELD for a field that does not exist.
        """
        known = {field.name for field in fields(EvaluationConfig)}
        unknown = sorted(set(content) - known)
        if unknown:
            raise MooringError(
                Reason.INVALID_FIELD,
                f"an evaluation has no field {unknown[0]!r}.",
                remedy=f"Known fields: {', '.join(sorted(known))}.",
                fields=[FieldViolation(name, "is not known") for name in unknown],
            )
        values: dict[str, Any] = {
            key: tuple(value) if key in _TUPLES else value for key, value in content.items()
        }
        return EvaluationConfig(**values)


_PROMPTS = ("prompts", "generic_prompts", "probe_prompts")
_TUPLES = (*_PROMPTS, "seeds")


def _within(value: float, low: float, high: float) -> bool:
    return math.isfinite(value) and low <= value <= high
