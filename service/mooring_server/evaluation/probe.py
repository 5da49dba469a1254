"""Drift probe: how far an adapter moved the base, as a share of the base's own guidance energy.

    D      = E || eps_theta(z_t, t, c) - eps_theta0(z_t, t, c) ||²
    energy = E || eps_theta0(z_t, t, c) - eps_theta0(z_t, t, ∅) ||²
    drift  = D / energy                                       (method.md section 3; P&P, arXiv 2505.19519)

What the expectation runs over is fixed once and named by a digest: prompts (generic ones and ones with the
subject's class noun) × stratified timesteps × counter-based noise. Class prompts count for `CLASS_WEIGHT` of
both expectations, however many there are: drifts of two probes compare although their prompts differ, which
is what lets a run be steered on one set of prompts and judged on another. z_t is noised from the base's *own*
guided samples of the prompt, because that is where the base is queried when it is used: photos of a data
set would measure the gap between data and base as well. Everything of the base is computed once and kept.

Both differences are taken in epsilon space whatever the network predicts: for a v-predicting base
eps = alpha_t·v + sigma_t·z_t, so Δeps = alpha_t·Δv, numerator and denominator carry the same weight, and
figures of eps- and v-predicting bases compare. The price: at the noisiest steps of a v-predicting base
(alpha_t → 0) a difference counts little.

The predictions are conditional (guidance scale 1). Sampling at guidance w can amplify an adapter's
difference by up to 2w-1; the result names the scale it was measured at.

Left out: drift of photos' own noised latents (that is the training loss), and text-encoder adapters, which
the bank does not yet hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mooring_server.engine.adapters import LearnedEmbeddings
from mooring_server.engine.bank import AdapterBank, TrainingSlot
from mooring_server.engine.base import BaseModel, PromptEmbeds
from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.evaluation.base_samples import SAMPLER, Predictor, SampleCache, Sampling, latent_shape
from mooring_server.evaluation.design import (
    bootstrap_ratio,
    counter_generator,
    interleave,
    stratified_timesteps,
    weighted_ratio,
)

PROBE_VERSION = 2
ROWS_PER_TICK = 16
SAMPLE_STEPS = 8
CLASS_WEIGHT = 0.125
"""Share of the class prompts in a drift. They are the concept that training pulls at, and one of hundreds."""
WEIGHTS = (1 - CLASS_WEIGHT, CLASS_WEIGHT)
"""Of generic and class points."""

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class DriftFigure:
    """A measured drift in plain numbers, for results, certificates and reports.

    Attributes:
        value: D / energy, dimensionless; compare with the budget rho.
        low: lower end of the 95 % interval (paired bootstrap over prompts as clusters).
        high: upper end of it.
        generic: the drift over the generic prompts alone (None when the points hold none of them).
        class_: the drift over the class-noun prompts alone (None when the points hold none of them).
        points: number of points measured.
        prompts: number of different prompts among them.
        probe_digest: what was measured on.
        guidance_scale: scale of the compared predictions; 1 is conditional prediction.
        adapter_scale: strength at which the adapter was active.
    """

    value: float
    low: float
    high: float
    generic: float | None
    class_: float | None
    points: int
    prompts: int
    probe_digest: str
    guidance_scale: float = 1.0
    adapter_scale: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """The attributes by name (`class_` as "class")."""
        content = asdict(self)
        content["class"] = content.pop("class_")
        return content

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> DriftFigure:
        """The inverse of `to_json`."""
        return DriftFigure(
            **{"class_" if name == "class" else name: value for name, value in content.items()}
        )


@dataclass(frozen=True)
class DriftResult:
    """A measured drift with the points behind it.

    Attributes:
        figure: value, interval and provenance.
        per_point: [points] squared epsilon difference, mean over latent elements.
        energy_per_point: [points] the base's guidance energy at the same points.
        prompt_index: [points] index into the probe's prompts.
        from_class: [points] bool, whether the prompt is a class prompt.
    """

    figure: DriftFigure
    per_point: Tensor
    energy_per_point: Tensor
    prompt_index: Tensor
    from_class: Tensor

    def over(self, points: slice) -> float:
        """The drift of some of the points."""
        return weighted_ratio(
            self.per_point[points], self.energy_per_point[points], self.from_class[points].long(), WEIGHTS
        )

    @property
    def drift(self) -> float:
        """D / energy; compare with the budget rho."""
        return self.figure.value

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.figure.low

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.figure.high

    @property
    def probe_digest(self) -> str:
        """Digest of the probe it was measured on."""
        return self.figure.probe_digest

    def to_json(self) -> dict[str, Any]:
        """The figure, without the points."""
        return self.figure.to_json()


@dataclass(frozen=True)
class DriftProbe:
    """Fixed points and the base's predictions at them. Build with `build`, never by hand.

    Points are ordered round by round (each round has every prompt once), class prompts evenly between the
    generic ones, so that any contiguous `window` is itself a small stratified probe.

    Attributes:
        prompts: the probe's prompts, classes and generic interleaved.
        is_class: per prompt, whether it is a class prompt.
        timesteps: [N] long.
        noised: [N,C,H,W] z_t.
        embeds: prompt embeddings, one row per prompt.
        base_eps: [N,C,H,W] the base's conditional epsilon.
        energy_per_point: [N] squared guidance difference of the base, mean over latent elements.
        guidance_energy: its weighted mean.
        digest: of prompts, seed, timesteps, sampling settings and the base's digest.
    """

    base: BaseModel
    bank: AdapterBank
    prompts: tuple[str, ...]
    is_class: tuple[bool, ...]
    timesteps: Tensor
    noised: Tensor
    embeds: PromptEmbeds
    base_eps: Tensor
    energy_per_point: Tensor
    guidance_energy: float
    digest: str
    seed: int

    @property
    def points(self) -> int:
        """Number of probe points."""
        return int(self.timesteps.numel())

    @property
    def prompt_index(self) -> Tensor:
        """[N] which prompt each point belongs to."""
        return torch.arange(self.points) % len(self.prompts)

    def window(self, index: int, size: int) -> slice:
        """The `index`-th of the consecutive windows of about `size` points, cyclic.

        For control loops: measuring another window each time keeps the cost small while an average over
        windows converges to the whole probe. A pure function, so a resumed run measures the same points.
        """
        count = max(1, self.points // max(1, size))
        number = index % count
        return slice(number * self.points // count, (number + 1) * self.points // count)

    @staticmethod
    def build(
        base: BaseModel,
        bank: AdapterBank,
        *,
        generic_prompts: Sequence[str],
        class_prompts: Sequence[str],
        points: int = 96,
        seed: int = 0,
        sample_steps: int = SAMPLE_STEPS,
        sample_guidance: float = 4.0,
        rows_per_tick: int = ROWS_PER_TICK,
        samples: SampleCache | None = None,
        on_progress: OnProgress | None = None,
    ) -> Generator[None, None, DriftProbe]:
        """Sample the base on every prompt, noise the samples, keep the base's predictions. One yield a tick.

        Args:
            base: the resident base.
            bank: whose zero slot is the base itself.
            generic_prompts: prompts that have nothing to do with the subject.
            class_prompts: prompts with the subject's class noun and without its placeholder.
            points: wanted number of probe points; the nearest number of whole rounds over the prompts is
                taken, at least one.
            seed: of noise, timesteps and base samples.
            sample_steps: denoising steps of the base samples; few, as only z_t is needed from them.
            sample_guidance: guidance scale of the base samples.
            rows_per_tick: UNet rows in one tick.
            samples: keeps the base samples for other probes with the same prompts.
            on_progress: called with (ticks done, ticks in all at most).

        Raises:
            MooringError: INVALID_FIELD with fewer than two prompts; PROMPT_TOO_LONG from the tokenizer;
                BASE_NOT_USABLE when the base does not react to prompts at all.
        """
        prompts, is_class = interleave(generic_prompts, class_prompts)
        if len(prompts) < 2:
            raise MooringError(
                Reason.INVALID_FIELD,
                f"a drift probe needs at least two prompts, {len(prompts)} given.",
                remedy="Give several generic prompts; at least a dozen make the interval trustworthy.",
                fields=[FieldViolation("generic_prompts", "at least two different prompts")],
            )
        rounds = max(1, round(points / len(prompts)))
        timesteps = stratified_timesteps(len(prompts), rounds, base.num_train_timesteps, seed)
        total = len(timesteps)
        spans = _spans(total, rows_per_tick)
        how = Sampling(seed, sample_steps, sample_guidance, rows_per_tick)
        kinds = [[p for p, c in zip(prompts, is_class, strict=True) if c is kind] for kind in (False, True)]
        ticks = sum(len(_spans(len(kind), max(1, rows_per_tick // 2))) for kind in kinds) * sample_steps
        ticks, done = ticks + 2 * len(spans), 0

        def tick() -> None:
            nonlocal done
            done += 1
            if on_progress is not None:
                on_progress(done, ticks)

        kept = samples if samples is not None else SampleCache()
        x0_of: dict[str, Tensor] = {}
        for kind in kinds:
            drawn = yield from kept.samples(base, bank, kind, how, tick)
            x0_of |= dict(zip(kind, drawn, strict=True))
        untouched = Predictor(base, bank)
        embeds, empty = untouched.encode(prompts), untouched.empty()
        which = torch.arange(total) % len(prompts)
        x0 = torch.stack([x0_of[prompt] for prompt in prompts])
        device_timesteps = timesteps.to(x0.device)
        shape = latent_shape(base)
        noise = [torch.randn(shape, generator=counter_generator(seed, "noise", i)) for i in range(total)]
        noised = base.add_noise(x0[which.to(x0.device)], torch.stack(noise).to(x0), device_timesteps)
        base_eps, energy = [], []
        for span in spans:
            z, t, prompt_rows = noised[span], device_timesteps[span], which[span].tolist()
            base_eps.append(untouched.eps(z, t, embeds.rows(prompt_rows)))
            tick()
            yield
            energy.append(_point_mse(base_eps[-1], untouched.eps(z, t, empty.rows([0] * len(prompt_rows)))))
            tick()
            yield
        energy_per_point = torch.cat(energy)
        from_class = torch.tensor(is_class)[which].long()
        guidance_energy = weighted_ratio(
            energy_per_point, torch.ones_like(energy_per_point), from_class, WEIGHTS
        )
        if not guidance_energy > 0:
            raise MooringError(
                Reason.BASE_NOT_USABLE,
                f"the base predicts the same with and without a prompt (guidance energy {guidance_energy}).",
                remedy="Drift is a share of the base's reaction to prompts: use a text-conditioned base.",
            )
        return DriftProbe(
            base=base,
            bank=bank,
            prompts=prompts,
            is_class=is_class,
            timesteps=device_timesteps,
            noised=noised,
            embeds=embeds,
            base_eps=torch.cat(base_eps),
            energy_per_point=energy_per_point,
            guidance_energy=guidance_energy,
            digest=_digest(
                version=PROBE_VERSION,
                base=base.digest,
                prompts=prompts,
                is_class=is_class,
                class_weight=CLASS_WEIGHT,
                timesteps=timesteps.tolist(),
                seed=seed,
                sampler=SAMPLER,
                sample_steps=sample_steps,
                sample_guidance=sample_guidance,
                size=base.native_size,
            ),
            seed=seed,
        )

    def measure(
        self,
        slot: int | TrainingSlot,
        scale: float = 1.0,
        subset: slice | None = None,
        embeddings: LearnedEmbeddings | None = None,
        rows_per_tick: int = ROWS_PER_TICK,
    ) -> Generator[None, None, DriftResult]:
        """Drift of the adapter in a slot (or in training) over all points or a subset. One yield a tick.

        Args:
            slot: bank slot, or the training slot whose current parameters are measured.
            scale: adapter strength.
            subset: contiguous points (step 1), see `window`.
            embeddings: the adapter's learned embeddings; used for those probe prompts that hold one of the
                placeholders (generic and class prompts hold none, so this is rarely needed).
            rows_per_tick: UNet rows in one tick.

        Raises:
            MooringError: ADAPTER_NOT_FINITE when the adapted predictions are not finite.
        """
        chosen = range(self.points)[subset if subset is not None else slice(None)]
        adapted = Predictor(self.base, self.bank, slot, scale)
        tokens = tuple(embeddings.tokens) if embeddings is not None else ()
        embeds = self.embeds
        in_text = isinstance(slot, int) and bool(slot) and self.bank.has_text_layers
        if in_text or any(token.lower() in prompt.lower() for token in tokens for prompt in self.prompts):
            embeds = adapted.encode(self.prompts, embeddings)
        differences = []
        for first in range(0, len(chosen), rows_per_tick):
            at = chosen[first : first + rows_per_tick]
            span = slice(at.start, at.stop)
            rows = embeds.rows(self.prompt_index[span].tolist())
            eps = adapted.eps(self.noised[span], self.timesteps[span], rows)
            differences.append(_point_mse(eps, self.base_eps[span]))
            yield
        return self._result(torch.cat(differences), slice(chosen.start, chosen.stop), scale)

    def _result(self, per_point: Tensor, span: slice, scale: float) -> DriftResult:
        if not bool(torch.isfinite(per_point).all()):
            raise MooringError(
                Reason.ADAPTER_NOT_FINITE,
                "the adapted model's predictions are not finite on the drift probe.",
                remedy="Train again with a smaller learning rate, or use a smaller adapter scale.",
            )
        energy, which = self.energy_per_point[span], self.prompt_index[span]
        from_class = torch.tensor(self.is_class)[which]
        drift, low, high = bootstrap_ratio(
            per_point, energy, which, from_class.long(), WEIGHTS, seed=self.seed
        )

        def share(mask: Tensor) -> float | None:
            mask = mask.to(per_point.device)
            return float(per_point[mask].sum() / energy[mask].sum()) if bool(mask.any()) else None

        figure = DriftFigure(
            value=drift,
            low=low,
            high=high,
            generic=share(~from_class),
            class_=share(from_class),
            points=int(per_point.numel()),
            prompts=len(set(which.tolist())),
            probe_digest=self.digest,
            adapter_scale=scale,
        )
        return DriftResult(figure, per_point, energy, which, from_class)


def _spans(total: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, total)) for first in range(0, total, size)]


def _digest(**content: object) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _point_mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)
