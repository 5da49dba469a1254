"""A generation request, its checks, and the events that answer it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mooring_server.engine.adapters import AdapterWeights, LearnedEmbeddings
from mooring_server.engine.model import SAMPLERS, BaseModel
from mooring_server.errors import FieldViolation, MooringError, Reason

MAX_COUNT = 16
MAX_STEPS = 150
MAX_GUIDANCE = 30.0
MAX_ADAPTER_SCALE = 2.0
MAX_ADAPTERS = 4
MAX_SIZE_FACTOR = 2
"""Largest side, as a multiple of the base's native size."""

_PLACEHOLDER_LIKE = re.compile(r"<[\w-]+>")


@dataclass(frozen=True, eq=False)
class AdapterUse:
    """An adapter and how strongly it acts.

    Args:
        weights: the adapter.
        scale: factor on its ΔW, 0 to 2. Learned tokens are not scaled.
    """

    weights: AdapterWeights
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """Images of one prompt. The same request gives the same images.

    Args:
        prompt: what to show; at most the base's token limit.
        adapters: up to 4, whose changes add up; none for the base.
        negative_prompt: what to steer away from.
        steps: denoising steps, 1 to 150.
        guidance_scale: classifier-free guidance, 0 to 30; 1 and below means none.
        height: pixels; None is the base's native size.
        width: pixels; None is the base's native size.
        seed: of the first image; image i has seed + i.
        count: images, 1 to 16.
        sampler: one of `model.SAMPLERS`.
        preview_interval: steps between previews; 0 for none.
    """

    prompt: str
    adapters: tuple[AdapterUse, ...] = ()
    negative_prompt: str = ""
    steps: int = 25
    guidance_scale: float = 4.0
    height: int | None = None
    width: int | None = None
    seed: int = 0
    count: int = 1
    sampler: str = "ddim"
    preview_interval: int = 0

    def validate(self, base: BaseModel) -> None:
        """Check the request against a base, before it is queued.

        Raises:
            MooringError: EMPTY_PROMPT, PROMPT_TOO_LONG, UNKNOWN_PLACEHOLDER, STEPS_OUT_OF_RANGE,
                SIZE_NOT_SUPPORTED, BASE_DIGEST_MISMATCH or INVALID_FIELD, with the field's name.
        """
        self._validate_adapters(base)
        self._validate_prompts(base)
        limit = min(MAX_STEPS, base.num_train_timesteps)
        if not 1 <= self.steps <= limit:
            raise _refused(
                Reason.STEPS_OUT_OF_RANGE,
                "steps",
                f"steps must lie in 1 to {limit}, not {self.steps}.",
                metadata={"minimum": "1", "maximum": str(limit)},
            )
        require_within("guidance_scale", self.guidance_scale, MAX_GUIDANCE)
        for index, use in enumerate(self.adapters):
            require_within(f"adapters[{index}].scale", use.scale, MAX_ADAPTER_SCALE)
        if not 1 <= self.count <= MAX_COUNT:
            raise _refused(
                Reason.INVALID_FIELD, "count", f"count must lie in 1 to {MAX_COUNT}, not {self.count}."
            )
        if not 0 <= self.seed < 2**63 - MAX_COUNT:
            raise _refused(Reason.INVALID_FIELD, "seed", f"seed must lie in 0 to 2^63 - 17, not {self.seed}.")
        if self.preview_interval < 0:
            message = f"preview_interval must be 0 or more, not {self.preview_interval}."
            raise _refused(Reason.INVALID_FIELD, "preview_interval", message)
        if self.sampler not in SAMPLERS:
            message = f"There is no sampler “{self.sampler}”; choose one of {', '.join(SAMPLERS)}."
            raise _refused(Reason.INVALID_FIELD, "sampler", message)
        self._validate_size(base)

    def require_slots(self, slots: int) -> None:
        """Refuse a request for more adapters than a bank has slots for: it would wait for ever.

        Args:
            slots: of the bank, the zero slot included.

        Raises:
            MooringError: INVALID_FIELD.
        """
        if len(self.adapters) > slots - 1:
            message = (
                f"The request names {len(self.adapters)} adapters, and this server has {slots - 1} slots."
            )
            raise _refused(Reason.INVALID_FIELD, "more_adapters", message)

    @cached_property
    def embeddings(self) -> LearnedEmbeddings | None:
        """The learned tokens of all its adapters; None when they have none."""
        tokens = {
            name: vectors
            for use in self.adapters
            if use.weights.embeddings is not None
            for name, vectors in use.weights.embeddings.tokens.items()
        }
        return LearnedEmbeddings(tokens) if tokens else None

    def _validate_adapters(self, base: BaseModel) -> None:
        if len(self.adapters) > MAX_ADAPTERS:
            message = f"A request takes up to {MAX_ADAPTERS} adapters, not {len(self.adapters)}."
            raise _refused(Reason.INVALID_FIELD, "adapters", message)
        names: set[str] = set()
        digests: set[str] = set()
        for index, use in enumerate(self.adapters):
            field, weights = f"adapters[{index}]", use.weights
            if weights.base_digest != base.digest:
                message = (
                    f"The adapter belongs to base {weights.base_digest}, this server runs {base.digest}."
                )
                raise _refused(Reason.BASE_DIGEST_MISMATCH, field, message)
            if weights.digest in digests:
                message = "The same adapter is named twice; name it once with the sum of the scales."
                raise _refused(Reason.INVALID_FIELD, field, message)
            digests.add(weights.digest)
            mine = {name.lower() for name in weights.embeddings.tokens} if weights.embeddings else set()
            if names & mine:
                message = (
                    f"Two of the adapters bring their own {min(names & mine)}; a prompt could mean either."
                )
                raise _refused(Reason.INVALID_FIELD, field, message)
            names |= mine

    def _validate_prompts(self, base: BaseModel) -> None:
        if not self.prompt.strip():
            raise _refused(
                Reason.EMPTY_PROMPT, "prompt", "The prompt is empty; say what the picture shall show."
            )
        embeddings = self.embeddings
        known = {name.lower() for name in embeddings.tokens} if embeddings else set()
        for field, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            base.require_prompt_fits(text, embeddings, field=field)
            strangers = [word for word in _PLACEHOLDER_LIKE.findall(text) if word.lower() not in known]
            if strangers:
                offered = f"it knows {', '.join(sorted(known))}" if known else "it knows none"
                whose = ("the base model", "this adapter", "these adapters")[min(2, len(self.adapters))]
                message = f"{strangers[0]} is no placeholder of {whose}; {offered}."
                raise _refused(Reason.UNKNOWN_PLACEHOLDER, field, message)

    def _validate_size(self, base: BaseModel) -> None:
        largest, step = base.native_size * MAX_SIZE_FACTOR, base.vae_scale_factor
        for name, value in (("height", self.height), ("width", self.width)):
            if value is not None and (value < step or value > largest or value % step):
                message = (
                    f"{name} must be a multiple of {step} up to {largest} pixels, not {value}; "
                    f"this base was trained at {base.native_size}."
                )
                raise _refused(Reason.SIZE_NOT_SUPPORTED, name, message)


@dataclass(frozen=True)
class Queued:
    """The request waits; `position` others of its class stand before it.

    It can grow: later requests with an earlier deadline, or of a tenant with less running, go first.
    """

    position: int


@dataclass(frozen=True, eq=False)
class Progress:
    """A denoising step is done.

    Args:
        step: steps done, over all images of the request.
        steps: steps in all.
        preview: uint8 `[h, w, 3]` of the first image being made, when one was asked for at this step.
    """

    step: int
    steps: int
    preview: NDArray[np.uint8] | None = None


@dataclass(frozen=True, eq=False)
class ImageReady:
    """An image is finished.

    Args:
        index: from 0.
        seed: its seed; a request with this seed and count 1 gives it again.
        image: uint8 `[h, w, 3]`.
    """

    index: int
    seed: int
    image: NDArray[np.uint8]


GenerationEvent = Queued | Progress | ImageReady


def require_within(field: str, value: float, largest: float) -> None:
    """Refuse a number that is not finite or not in 0 to `largest`. Raises INVALID_FIELD with the field."""
    if not math.isfinite(value) or not 0 <= value <= largest:
        raise _refused(Reason.INVALID_FIELD, field, f"{field} must lie in 0 to {largest:g}, not {value:g}.")


def _refused(
    reason: Reason, field: str, message: str, *, metadata: Mapping[str, str] | None = None
) -> MooringError:
    return MooringError(reason, message, metadata=metadata, fields=[FieldViolation(field, message)])
