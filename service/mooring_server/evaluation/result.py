"""What an evaluation found, as values that go through JSON unchanged (pictures as PNG)."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mooring_server.errors import MooringError, Reason
from mooring_server.evaluation.certificate import Certificate
from mooring_server.evaluation.config import EvaluationConfig
from mooring_server.evaluation.metrics import per_prompt
from mooring_server.evaluation.probe import DriftFigure

VERSION = 1

SUBJECT, GENERIC, CLASS, PLAIN = "subject", "generic", "class", "plain"
"""Kinds of pairs: subject in a new scene, no subject, bare class prompt, bare subject prompt."""


@dataclass(frozen=True, eq=False)
class ImagePair:
    """One prompt and seed, drawn by the base and by the adapted model.

    Attributes:
        kind: `SUBJECT`, `GENERIC`, `CLASS` or `PLAIN`.
        prompt: as the adapted model got it.
        base_prompt: as the base got it, without the placeholder.
        seed: of both.
        base: [H,W,3] uint8.
        adapted: [H,W,3] uint8; None in an evaluation of the base alone.
        scores: the pair's figures by metric name; those of the base's picture with the prefix `base_`.
    """

    kind: str
    prompt: str
    base_prompt: str
    seed: int
    base: NDArray[np.uint8]
    adapted: NDArray[np.uint8] | None
    scores: Mapping[str, float]

    @property
    def image(self) -> NDArray[np.uint8]:
        """The picture under evaluation: the adapted one, or the base's own."""
        return self.base if self.adapted is None else self.adapted


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Figures, pictures and certificate of one adapter (or of the base alone).

    Attributes:
        adapter_digest: None for the base alone.
        base_digest: of the base.
        judges_digest: figures of different judges do not compare.
        config: what was asked for.
        metrics: figure by name (see `metrics.HIGHER_IS_BETTER`), `base_…` of the untouched base beside it.
            A figure that was not measured is absent.
        intervals: 95 % bootstrap interval over prompts, for the figures that are means over prompts.
        pairs: every picture.
        drift: with interval and provenance; None for the base alone, whose drift is 0 by definition.
        certificate: None for the base alone.
        seconds: wall time.
    """

    adapter_digest: str | None
    base_digest: str
    judges_digest: str
    config: EvaluationConfig
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    pairs: tuple[ImagePair, ...]
    drift: DriftFigure | None
    certificate: Certificate | None
    seconds: float

    def of_kind(self, *kinds: str) -> list[ImagePair]:
        """The pairs of some kinds, in drawing order."""
        return [pair for pair in self.pairs if pair.kind in kinds]

    @property
    def per_prompt(self) -> list[dict[str, Any]]:
        """One row a prompt: kind, prompt, and the mean over seeds of each of its scores."""
        rows: list[dict[str, Any]] = []
        for kind, prompt in dict.fromkeys((pair.kind, pair.prompt) for pair in self.pairs):
            pairs = [pair for pair in self.pairs if (pair.kind, pair.prompt) == (kind, prompt)]
            names = dict.fromkeys(name for pair in pairs for name in pair.scores)
            means = {
                name: per_prompt([(prompt, pair.scores[name]) for pair in pairs if name in pair.scores])[
                    prompt
                ]
                for name in names
            }
            rows.append({"kind": kind, "prompt": prompt, **means})
        return rows

    def to_json(self, *, images: bool = True) -> dict[str, Any]:
        """Everything by name; pictures as base64 PNG, or left out."""
        return {
            "version": VERSION,
            "adapter_digest": self.adapter_digest,
            "base_digest": self.base_digest,
            "judges_digest": self.judges_digest,
            "config": self.config.to_json(),
            "metrics": dict(self.metrics),
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "per_prompt": self.per_prompt,
            "pairs": [_pair_to_json(pair, images=images) for pair in self.pairs],
            "drift": None if self.drift is None else self.drift.to_json(),
            "certificate": None if self.certificate is None else self.certificate.to_json(),
            "seconds": self.seconds,
        }

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> EvaluationResult:
        """The inverse of `to_json`; pairs whose pictures were left out are left out.

        Raises:
            MooringError: INVALID_FIELD when the content is not an evaluation of this version.
        """
        if content.get("version") != VERSION:
            raise MooringError(
                Reason.INVALID_FIELD,
                f"evaluation version {content.get('version')!r} is not known here (known: {VERSION}).",
                remedy="Evaluate the adapter again.",
            )
        drift, certificate = content["drift"], content["certificate"]
        return EvaluationResult(
            adapter_digest=content["adapter_digest"],
            base_digest=content["base_digest"],
            judges_digest=content["judges_digest"],
            config=EvaluationConfig.from_json(content["config"]),
            metrics=dict(content["metrics"]),
            intervals={name: (low, high) for name, (low, high) in content["intervals"].items()},
            pairs=tuple(_pair_from_json(pair) for pair in content["pairs"] if "base" in pair),
            drift=None if drift is None else DriftFigure.from_json(drift),
            certificate=None if certificate is None else Certificate.from_json(certificate),
            seconds=content["seconds"],
        )


def png(image: NDArray[np.uint8] | Image.Image) -> bytes:
    """A picture as PNG bytes, the same bytes for the same picture."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "PNG")
    return buffer.getvalue()


def _pair_to_json(pair: ImagePair, *, images: bool) -> dict[str, Any]:
    content = asdict(pair)
    for name in ("base", "adapted"):
        picture = content.pop(name)
        if images:
            content[name] = None if picture is None else base64.b64encode(png(picture)).decode()
    return content


def _pair_from_json(content: Mapping[str, Any]) -> ImagePair:
    pictures = {
        name: None
        if content[name] is None
        else np.asarray(Image.open(io.BytesIO(base64.b64decode(content[name]))).convert("RGB"))
        for name in ("base", "adapted")
    }
    return ImagePair(**{**content, **pictures})
