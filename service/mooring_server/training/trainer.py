"""One training run as a generator: each `yield` ends one tick, so serving goes on between any two steps.

Everything random is drawn by counter (seed, purpose, step), so a run that was interrupted and resumed from a
checkpoint ends with the same bits as one that was not. No gradient mode, autocast or adapter context is held
over a yield. Closing the generator (cancel) frees the slot at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mooring_kernels.spectral import Kind, SpectralState, add_gradient_, penalty
from PIL import Image
from torch import Tensor

from mooring_server.engine.adapters import AdapterWeights, adaptable_layers
from mooring_server.engine.bank import AdapterBank, TrainingSlot
from mooring_server.engine.base import BaseModel, PromptEmbeds
from mooring_server.engine.sampling import SampleRow, sample
from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.evaluation.base_samples import SampleCache
from mooring_server.evaluation.probe import DriftProbe, DriftResult
from mooring_server.evaluation.prompts import class_prompts
from mooring_server.training.budget import BudgetController
from mooring_server.training.checkpoint import Checkpoint, CheckpointStore, not_usable
from mooring_server.training.config import Method, TrainConfig
from mooring_server.training.control import DriftGauge, back_off, calibration_steps, early_steps
from mooring_server.training.data import batch_indices, cache_latents, subject_prompts
from mooring_server.training.objectives import denoising_loss, draw
from mooring_server.training.optimiser import FlatAdam, clip_, schedule
from mooring_server.training.placeholder import PlaceholderEmbedding

__all__ = ["TrainProgress", "TrainResult", "train"]

PENALTY: dict[Method, Kind] = {
    Method.L2: "l2",
    Method.FACTOR_DECAY: "factor_decay",
    Method.SPECTRAL: "spectral",
}
LARGEST_GRADIENT = 1.0
SETPOINT = 1.04
"""The controller steers a little above the budget: the end can scale an update down to it, never up."""
SMOOTHING = 0.1
"""Weight of the newest step in the moving averages of loss, gradient norm and step time."""
PREVIEW_STEPS = 12
PREVIEW_GUIDANCE = 4.0
PRIOR_STEPS = 20
PRIOR_GUIDANCE = 4.0


@dataclass(frozen=True)
class TrainProgress:
    """What a watcher sees.

    Args:
        phase: "caching", "prior", "probe", "training" or "measuring".
        step: optimiser steps done.
        steps: optimiser steps in all.
        loss: moving average of the denoising loss.
        sigma_max: largest operator norm of any layer's update.
        layer_sigma: operator norm of each trained layer's update, by the layer's path; empty while unknown.
        drift: last estimate, share of the base's guidance energy.
        budget: ρ that is steered to, or None.
        strength: λ now.
        seconds_left: estimate of wall time to the end, or None before the first steps.
        previews: uint8 `[H, W, 3]` pictures of the subject, made now; usually none.
    """

    phase: str
    step: int
    steps: int
    loss: float | None = None
    sigma_max: float | None = None
    layer_sigma: Mapping[str, float] = field(default_factory=dict)
    drift: float | None = None
    budget: float | None = None
    strength: float | None = None
    seconds_left: float | None = None
    previews: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class TrainResult:
    """What a run yields.

    Args:
        weights: the adapter, immutable, with its metadata.
        drift: of exactly these weights, on the whole probe.
        history: one row per drift measurement: step, loss, sigma_max, drift, strength.
        scale: factor by which the update was scaled down to keep the budget; 1 when it was not.
    """

    weights: AdapterWeights
    drift: DriftResult
    history: list[dict[str, float]]
    scale: float = 1.0


def train(
    base: BaseModel,
    bank: AdapterBank,
    photos: Sequence[Image.Image],
    config: TrainConfig,
    *,
    class_noun: str,
    placeholder: str,
    generic_prompts: Sequence[str],
    checkpoint: CheckpointStore,
    on_progress: Callable[[TrainProgress], None],
    samples: SampleCache | None = None,
) -> Generator[None, None, TrainResult]:
    """Teach the base a subject, within a drift budget.

    Args:
        base: the resident base.
        bank: its bank; one slot is used while the run lasts.
        photos: RGB photos of the subject.
        config: see `TrainConfig`; validated here.
        class_noun: what the subject is, in a word the base knows.
        placeholder: the token that will mean the subject.
        generic_prompts: prompts unlike the subject, for the drift probe.
        checkpoint: loaded at the start, saved every `config.checkpoint_every` steps.
        on_progress: called from the thread that runs the ticks.
        samples: keeps what the base drew for the probe for the next run.

    Raises:
        MooringError: INVALID_FIELD, SUBJECT_HAS_NO_PHOTOS, PROMPT_TOO_LONG, CHECKPOINT_NOT_USABLE,
            ADAPTER_RANK_TOO_LARGE or QUEUE_FULL at the start; TRAINING_DIVERGED later.
    """
    config.validate()
    _require_targets(bank, config)
    run = _Run(
        base, bank, config, class_noun, placeholder, tuple(generic_prompts), checkpoint, on_progress, samples
    )
    run.slot = bank.training_slot(rank=config.rank, seed=config.seed, targets=config.targets)
    try:
        yield from run.prepare(photos)
        while run.step < config.steps:
            yield from run.advance()
        return (yield from run.finish())
    finally:
        run.slot.close()


@dataclass
class _Run:
    """The state of one run; `prepare`, `advance` per step, `finish`."""

    base: BaseModel
    bank: AdapterBank
    config: TrainConfig
    class_noun: str
    placeholder: str
    generic_prompts: tuple[str, ...]
    checkpoints: CheckpointStore
    on_progress: Callable[[TrainProgress], None]
    samples: SampleCache | None = None
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    controller: BudgetController | None = None
    slot: TrainingSlot = field(init=False)
    adam: FlatAdam = field(init=False)
    embedding: PlaceholderEmbedding = field(init=False)
    gauge: DriftGauge = field(init=False)
    latents: Tensor = field(init=False)
    prompts: list[str] = field(init=False)
    embeds: PromptEmbeds | None = None
    prior_latents: Tensor | None = None
    prior_embeds: PromptEmbeds | None = None
    prior_prompt: str = ""
    run_digest: str = ""
    averages: dict[str, float] = field(default_factory=dict)
    norms: SpectralState | None = None
    drift: float | None = None
    step_seconds: float | None = None
    correction: float = 1.0

    # ------------------------------------------------------------------ before the first step

    def prepare(self, photos: Sequence[Image.Image]) -> Generator[None, None, None]:
        config = self.config
        self._report("caching")
        self.adam = FlatAdam.create(self.slot.flat)
        self.embedding = PlaceholderEmbedding(
            self.base, self.placeholder, self.class_noun, learn=config.learn_embedding
        )
        self.prompts = subject_prompts(self.base, self.placeholder, self.class_noun, self.embedding.learned)
        self.latents = yield from cache_latents(self.base, photos, config)
        classes = class_prompts(self.base, self.class_noun)
        self.run_digest = self._identity(photos)
        if config.target_drift is not None:
            self.controller = BudgetController(config.target_drift * SETPOINT)
        self._resume()
        if not config.learn_embedding:
            with torch.no_grad():
                self.embeds = self.base.encode_prompt(self.prompts, self.embedding.learned)
        if config.method is Method.PRIOR_PRESERVATION:
            yield from self._draw_class_images(classes)
        self._report("probe")
        probe = yield from DriftProbe.build(
            self.base,
            self.bank,
            generic_prompts=self.generic_prompts,
            class_prompts=classes,
            points=config.probe_points,
            samples=self.samples,
        )
        self.gauge = DriftGauge(probe, config.control_points, self.correction)

    def _draw_class_images(self, classes: Sequence[str]) -> Generator[None, None, None]:
        self._report("prior")
        self.prior_prompt = classes[0]
        with torch.no_grad():
            self.prior_embeds = self.base.encode_prompt([self.prior_prompt])
        if self.prior_latents is not None:  # from the checkpoint
            return
        rows = [
            SampleRow(self.prior_prompt, seed=_seed(self.config.seed, i))
            for i in range(self.config.prior_images)
        ]
        images = yield from sample(
            self.base, self.bank, rows, steps=PRIOR_STEPS, guidance_scale=PRIOR_GUIDANCE, batch=8
        )
        latents = []
        for chunk in torch.split(images, 16):
            # contiguous: strides choose the convolution's algorithm, and a checkpoint does not keep them
            pixels = chunk.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0
            latents.append(self.base.encode_images(pixels))
            yield
        self.prior_latents = torch.cat(latents).contiguous()

    def _identity(self, photos: Sequence[Image.Image]) -> str:
        """Digest of everything the result is a function of."""
        content = hashlib.sha256()
        for photo in photos:
            content.update(f"{photo.size}".encode())
            content.update(photo.convert("RGB").tobytes())
        document = {
            "config": self.config.digest,
            "target": self.config.target_drift,
            "base": self.base.digest,
            "layout": self.slot.layout.digest,
            "photos": content.hexdigest(),
            "class_noun": self.class_noun,
            "placeholder": self.placeholder,
            "prompts": self.prompts,
            "generic_prompts": self.generic_prompts,
        }
        return "sha256:" + hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    # ------------------------------------------------------------------ steps

    def advance(self) -> Generator[None, None, None]:
        """One optimiser step, and what is due after it.

        Checkpoints are taken at its end only, so that λ has the same history as without an interruption.
        """
        started = time.perf_counter()
        self._descend()
        self.step += 1
        yield
        if self._due():
            yield from self._measure()
        previews: tuple[Tensor, ...] = ()
        if self.config.preview_every and self.step % self.config.preview_every == 0:
            previews = yield from self._previews()
        self._smooth_seconds(time.perf_counter() - started)
        self._report("training", previews=previews)
        periodic = self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps
        if periodic or self.checkpoints.wanted():
            self.checkpoints.save(self._checkpoint().to_bytes())
            yield

    def _descend(self) -> None:
        config, slot = self.config, self.slot
        rows = batch_indices(len(self.latents), config.batch_size, config.seed, self.step)
        latents = self.latents[rows]
        slot.flat_grad.zero_()
        self.embedding.zero_grad()
        with torch.enable_grad(), slot.active():
            loss = denoising_loss(
                self.base,
                latents,
                self._subject_embeds(len(rows)),
                draw(self.base, latents, config.seed, self.step),
            )
            torch.autograd.backward(loss)
        total = float(loss.detach())
        if config.method is Method.PRIOR_PRESERVATION:
            self._add_prior_gradient()
        norm = clip_(slot.flat_grad, LARGEST_GRADIENT)
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise self._diverged(f"the loss is {total} and its gradient's norm {norm}")
        self._average("loss", total)
        self._average("gradient", min(norm, LARGEST_GRADIENT))
        kind = PENALTY.get(config.method)
        if kind is not None:
            self.norms = add_gradient_(slot.layout, slot.flat, slot.flat_grad, self.strength, kind=kind)
        factor = schedule(self.step, config.steps)
        self.adam.step(slot.flat_grad, config.learning_rate * factor, self.step + 1)
        self.embedding.step(config.embedding_learning_rate * factor, self.step + 1)

    def _subject_embeds(self, rows: int) -> PromptEmbeds:
        first = self.step * rows
        chosen = [(first + row) % len(self.prompts) for row in range(rows)]
        if self.embeds is not None:
            return self.embeds.rows(chosen)
        needed = sorted(set(chosen))
        encoded = self.base.encode_prompt([self.prompts[i] for i in needed], self.embedding.learned)
        return encoded.rows([needed.index(i) for i in chosen])

    def _add_prior_gradient(self) -> None:
        """DreamBooth's second loss, in a backward pass of its own to halve the memory."""
        assert self.prior_latents is not None
        assert self.prior_embeds is not None
        config = self.config
        weight = 1.0 if config.strength is None else config.strength
        rows = batch_indices(
            len(self.prior_latents), config.batch_size, config.seed, self.step, "prior-batch"
        )
        latents = self.prior_latents[rows]
        with torch.enable_grad(), self.slot.active():
            loss = denoising_loss(
                self.base,
                latents,
                self.prior_embeds.rows([0] * len(rows)),
                draw(self.base, latents, config.seed, self.step, "prior-step"),
            )
            torch.autograd.backward(weight * loss)

    @property
    def strength(self) -> float:
        """λ now."""
        if self.controller is not None:
            return self.controller.strength
        return self.config.strength or 0.0

    # ------------------------------------------------------------------ drift

    def _due(self) -> bool:
        """Whether drift is measured after this step."""
        every = self.config.probe_every
        steered = self.controller is not None
        return self.step % every == 0 or (steered and self.step in early_steps(every))

    def _balance(self, kind: Kind) -> float:
        """The strength at which the penalty's gradient is as long as the loss's; 0 where it has none."""
        slot = self.slot
        gradient = slot.flat_grad.zero_()  # free between two steps
        add_gradient_(slot.layout, slot.flat, gradient, 1.0, kind=kind)
        norm = float(gradient.norm())
        return self.averages["gradient"] / norm if norm > 0 else 0.0

    def _measure(self) -> Generator[None, None, None]:
        """Estimate the drift, steer λ by it and log."""
        if not bool(torch.isfinite(self.slot.flat).all()):
            raise self._diverged("the factors are not finite")
        if self.step in calibration_steps(self.config.steps, self.config.probe_every):
            self.drift = yield from self.gauge.calibrate(self.slot)
        else:
            self.drift = yield from self.gauge.estimate(self.slot)
        kind = PENALTY.get(self.config.method)
        self.norms = penalty(self.slot.layout, self.slot.flat)
        if self.controller is not None and kind is not None:
            since = self.step - (int(self.history[-1]["step"]) if self.history else 0)
            self.controller.update(self.drift, self._balance(kind), since / self.config.probe_every)
        self.history.append(
            {
                "step": self.step,
                "loss": self.averages["loss"],
                "sigma_max": self.norms.sigma_max,
                "drift": self.drift,
                "strength": self.strength,
            }
        )

    def finish(self) -> Generator[None, None, TrainResult]:
        """Measure on the whole probe, back off when above the budget, and publish."""
        self._report("measuring")
        probe, slot, budget = self.gauge.probe, self.slot, self.config.target_drift
        scale = 1.0
        if budget is None:
            drift = yield from probe.measure(slot)
        else:
            scale, drift = yield from back_off(lambda s: probe.measure(slot, scale=s), budget)
            if scale < 1.0:
                with torch.no_grad():
                    for _, b in slot.params.values():
                        b.mul_(scale)
                drift = yield from probe.measure(slot)
        self.drift = drift.drift
        weights = slot.weights(self._metadata(drift, scale), self.embedding.frozen())
        self._report("measuring")
        return TrainResult(weights, drift, self.history, scale)

    def _metadata(self, drift: DriftResult, scale: float) -> dict[str, str]:
        return {
            "method": str(self.config.method),
            "class_noun": self.class_noun,
            "placeholder": self.placeholder,
            "config": json.dumps(self.config.to_json(), sort_keys=True),
            "budget": json.dumps(self.config.target_drift),
            "strength": json.dumps(self.strength),
            "scaled_down_by": json.dumps(scale),
            "drift": json.dumps(drift.to_json(), sort_keys=True),
            "run_digest": self.run_digest,
        }

    # ------------------------------------------------------------------ around the steps

    def _previews(self) -> Generator[None, None, tuple[Tensor, ...]]:
        rows = [
            SampleRow(
                self.prompts[0],
                mix=[(self.slot.slot, 1.0)],
                seed=seed,
                embeddings=self.embedding.frozen(),
            )
            for seed in range(2)
        ]
        images = yield from sample(
            self.base, self.bank, rows, steps=PREVIEW_STEPS, guidance_scale=PREVIEW_GUIDANCE
        )
        return tuple(images)

    def _checkpoint(self) -> Checkpoint:
        tensors = {
            "flat": self.slot.flat,
            "flat.first": self.adam.first,
            "flat.second": self.adam.second,
            **self.embedding.state(),
        }
        if self.prior_latents is not None:
            tensors["prior"] = self.prior_latents
        scalars: dict[str, Any] = {
            "averages": self.averages,
            "correction": self.gauge.correction,
            "drift": self.drift,
            "history": self.history,
            "controller": None if self.controller is None else self.controller.state_dict(),
        }
        return Checkpoint(self.step, self.run_digest, tensors, scalars)

    @torch.no_grad()
    def _resume(self) -> None:
        data = self.checkpoints.load()
        if data is None:
            return
        saved = Checkpoint.from_bytes(data)
        if saved.run_digest != self.run_digest:
            raise not_usable("The checkpoint belongs to another run (other photos, configuration or base).")
        self.step = saved.step
        self.slot.flat.copy_(saved.tensors["flat"])
        self.adam.first.copy_(saved.tensors["flat.first"])
        self.adam.second.copy_(saved.tensors["flat.second"])
        self.embedding.restore(saved.tensors)
        self.prior_latents = saved.tensors.get("prior")
        self.averages = dict(saved.scalars["averages"])
        self.correction = float(saved.scalars["correction"])
        self.drift = saved.scalars["drift"]
        self.history = list(saved.scalars["history"])
        if saved.scalars["controller"] is not None:
            self.controller = BudgetController.from_state(saved.scalars["controller"])

    def _average(self, name: str, newest: float) -> None:
        before = self.averages.get(name)
        self.averages[name] = newest if before is None else SMOOTHING * newest + (1 - SMOOTHING) * before

    def _smooth_seconds(self, seconds: float) -> None:
        before = self.step_seconds
        self.step_seconds = seconds if before is None else SMOOTHING * seconds + (1 - SMOOTHING) * before

    def _layer_sigma(self) -> dict[str, float]:
        """Of the layers that are trained: one read of all norms, which are there already."""
        if self.norms is None:
            return {}
        names, sigma = self.slot.layout.names, self.norms.sigma2.clamp_min(0.0).sqrt().tolist()
        return {name: s for name, s in zip(names, sigma, strict=True) if name in self.slot.params}

    def _report(self, phase: str, *, previews: tuple[Tensor, ...] = ()) -> None:
        sigma = self._layer_sigma()
        left = None if self.step_seconds is None else self.step_seconds * (self.config.steps - self.step)
        self.on_progress(
            TrainProgress(
                phase=phase,
                step=self.step,
                steps=self.config.steps,
                loss=self.averages.get("loss"),
                sigma_max=max(sigma.values(), default=None),
                layer_sigma=sigma,
                drift=self.drift,
                budget=self.config.target_drift,
                strength=self.strength,
                seconds_left=left,
                previews=previews,
            )
        )

    def _diverged(self, what: str) -> MooringError:
        return MooringError(
            Reason.TRAINING_DIVERGED,
            f"Training diverged at step {self.step}: {what}.",
            remedy="Train again with a lower learning rate or, with a fixed strength, a lower one.",
            metadata={"step": str(self.step), "learning_rate": f"{self.config.learning_rate:g}"},
        )


def _require_targets(bank: AdapterBank, config: TrainConfig) -> None:
    missing = set(adaptable_layers(bank.base, config.targets)) - set(bank.layout.names)
    if missing:
        text = f"this server adapts the layers “{bank.targets}”, not “{config.targets}”"
        raise MooringError(
            Reason.INVALID_FIELD,
            f"The targets cannot be trained: {text}.",
            remedy="Train the attention layers only, or start the server with targets “attention+ff”.",
            fields=[FieldViolation("targets", text)],
        )


def _seed(seed: int, index: int) -> int:
    return int.from_bytes(hashlib.sha256(f"prior\0{seed}\0{index}".encode()).digest()[:6], "little")
