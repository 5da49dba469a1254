"""Draw, judge and certify: one adapter beside the untouched base, on the same prompts and seeds.

Three questions, in the user's words: does it look like my subject (DINO, CLIP-I on subject prompts), does it
still do what the prompt says (CLIP-T on subject prompts, where the placeholder is removed for the judge), and
did it break anything else (CLIP-T and picture changes on generic prompts, PRES, drift)? Every picture has its
twin by the base from the same noise, so differences are the adapter's and not the seed's.

A generator in ticks, as everything that uses the device; evaluation runs below interactive work.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mooring_server.engine.adapters import AdapterWeights
from mooring_server.engine.bank import AdapterBank
from mooring_server.engine.base import BaseModel
from mooring_server.engine.sampling import MAX_BATCH, SampleRow, sample
from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.evaluation import certificate, metrics
from mooring_server.evaluation.base_samples import SampleCache
from mooring_server.evaluation.config import EvaluationConfig
from mooring_server.evaluation.judges import IMAGES_PER_PASS, Judges
from mooring_server.evaluation.probe import ROWS_PER_TICK, SAMPLE_STEPS, DriftFigure, DriftProbe
from mooring_server.evaluation.prompts import HELD_OUT_TEMPLATES, class_prompts
from mooring_server.evaluation.result import CLASS, GENERIC, PLAIN, SUBJECT, EvaluationResult, ImagePair

T = TypeVar("T")
Image_HW3 = NDArray[np.uint8]


@dataclass(frozen=True)
class EvaluationProgress:
    """Where an evaluation is.

    Attributes:
        phase: "base images", "adapted images", "drift", "judging" or "done".
        step: units of work done over all phases.
        steps: units in all (about; one unit is about one network call).
    """

    phase: str
    step: int
    steps: int


OnProgress = Callable[[EvaluationProgress], None]


@dataclass
class EvaluationCache:
    """What depends on the base alone, kept between evaluations: its pictures and its drift probes.

    Comparing several adapters on one prompt set then draws the base's pictures once. Not thread-safe: it
    belongs to whoever runs the ticks.
    """

    max_images: int = 1024
    max_probes: int = 4
    images: OrderedDict[tuple[object, ...], Image_HW3] = field(default_factory=OrderedDict)
    probes: OrderedDict[tuple[object, ...], DriftProbe] = field(default_factory=OrderedDict)
    samples: SampleCache = field(default_factory=SampleCache)

    def trim(self) -> None:
        """Drop what was used least recently, beyond the bounds."""
        while len(self.images) > self.max_images:
            self.images.popitem(last=False)
        while len(self.probes) > self.max_probes:
            self.probes.popitem(last=False)


@dataclass(frozen=True)
class _Shot:
    kind: str
    prompt: str
    base_prompt: str
    seed: int


def evaluate(
    base: BaseModel,
    bank: AdapterBank,
    judges: Judges,
    adapter: AdapterWeights | None,
    subject_photos: Sequence[Image.Image],
    config: EvaluationConfig,
    *,
    on_progress: OnProgress | None = None,
    cache: EvaluationCache | None = None,
) -> Generator[None, None, EvaluationResult]:
    """Evaluate an adapter, or the base alone. One yield a tick.

    Args:
        base: the resident base.
        bank: its bank; one slot is pinned while pictures are drawn and drift is measured.
        judges: CLIP and DINO.
        adapter: None for the base alone.
        subject_photos: what the pictures should look like.
        config: prompts, seeds, sampling, probe.
        on_progress: called after every tick.
        cache: pictures and probes of the base to reuse and to add to.

    Raises:
        MooringError: what `EvaluationConfig.validate` raises; SUBJECT_HAS_NO_PHOTOS; UNKNOWN_PLACEHOLDER;
            PROMPT_TOO_LONG; BASE_DIGEST_MISMATCH; ADAPTER_NOT_FINITE.
    """
    started = time.monotonic()
    config.validate()
    _require_usable(base, adapter, subject_photos, config)
    kept = cache if cache is not None else EvaluationCache()
    shots = _shots(config)
    meter = _Meter(on_progress, _units(config, shots, adapted=adapter is not None))

    base_images = yield from meter.phase("base images", _draw_base(base, bank, shots, config, kept))
    adapted_images: list[Image_HW3] | None = None
    drift: DriftFigure | None = None
    if adapter is not None:
        slot = bank.acquire(adapter)
        try:
            rows = [
                SampleRow(shot.prompt, "", [(slot, config.adapter_scale)], shot.seed, adapter.embeddings)
                for shot in shots
            ]
            adapted_images = yield from meter.phase("adapted images", _draw(base, bank, rows, config))
            probe = yield from meter.phase("drift", _probe(base, bank, config, kept))
            measured = yield from meter.phase(
                "drift", probe.measure(slot, config.adapter_scale, embeddings=adapter.embeddings)
            )
            drift = measured.figure
        finally:
            bank.release(slot)
    scores, divs = yield from meter.phase(
        "judging", _judge(judges, shots, base_images, adapted_images, subject_photos)
    )
    pairs = tuple(
        ImagePair(
            shot.kind,
            shot.prompt,
            shot.base_prompt,
            shot.seed,
            base_images[i],
            None if adapted_images is None else adapted_images[i],
            scores[i],
        )
        for i, shot in enumerate(shots)
    )
    figures, intervals = _summarise(pairs)
    figures |= divs | {"drift": 0.0 if drift is None else drift.value}
    if drift is not None:
        intervals["drift"] = (drift.low, drift.high)
    meter.done()
    return EvaluationResult(
        adapter_digest=None if adapter is None else adapter.digest,
        base_digest=base.digest,
        judges_digest=judges.digest,
        config=config,
        metrics=figures,
        intervals=intervals,
        pairs=pairs,
        drift=drift,
        certificate=None
        if adapter is None
        else certificate.build(
            base, adapter, drift, budget=config.budget, adapter_scale=config.adapter_scale
        ),
        seconds=time.monotonic() - started,
    )


def _require_usable(
    base: BaseModel, adapter: AdapterWeights | None, photos: Sequence[Image.Image], config: EvaluationConfig
) -> None:
    if not photos:
        raise MooringError(
            Reason.SUBJECT_HAS_NO_PHOTOS,
            "the subject has no photos to compare with.",
            remedy="Upload at least one photo.",
        )
    learned = adapter.embeddings if adapter is not None else None
    if learned is not None and config.placeholder and config.placeholder not in learned.tokens:
        raise MooringError(
            Reason.UNKNOWN_PLACEHOLDER,
            f"the adapter has not learnt {config.placeholder!r} but {', '.join(learned.tokens)}.",
            remedy="Use the placeholder it was trained with.",
            fields=[FieldViolation("placeholder", "is not the adapter's")],
        )
    for name in ("prompts", "generic_prompts", "probe_prompts"):
        for i, prompt in enumerate(getattr(config, name)):
            base.require_prompt_fits(config.adapted_prompt(prompt), learned, field=f"{name}[{i}]")


def _shots(config: EvaluationConfig) -> list[_Shot]:
    """All pictures: subject prompts × seeds, generic prompts, and bare class and subject prompts."""
    first = config.seeds[0]
    plain = config.adapted_prompt("a photo of a {}")
    extra = range(first, first + config.class_samples)
    return [
        *(
            _Shot(SUBJECT, config.adapted_prompt(prompt), config.base_prompt(prompt), seed)
            for prompt in config.prompts
            for seed in config.seeds
        ),
        *(_Shot(GENERIC, prompt, prompt, first) for prompt in config.generic_prompts),
        *(_Shot(CLASS, config.class_prompt, config.class_prompt, seed) for seed in extra),
        *(_Shot(PLAIN, plain, config.class_prompt, seed) for seed in extra),
    ]


def _draw(
    base: BaseModel, bank: AdapterBank, rows: Sequence[SampleRow], config: EvaluationConfig
) -> Generator[None, None, list[Image_HW3]]:
    images = yield from sample(
        base,
        bank,
        rows,
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        sampler=config.sampler,
    )
    return list(images.numpy())


def _draw_base(
    base: BaseModel,
    bank: AdapterBank,
    shots: Sequence[_Shot],
    config: EvaluationConfig,
    cache: EvaluationCache,
) -> Generator[None, None, list[Image_HW3]]:
    settings = (base.digest, config.steps, config.guidance_scale, config.sampler)
    keys = [(*settings, shot.base_prompt, shot.seed) for shot in shots]
    have: dict[tuple[object, ...], Image_HW3] = {}
    for key in keys:
        if key in cache.images:
            cache.images.move_to_end(key)
            have[key] = cache.images[key]
    missing = {
        key: SampleRow(shot.base_prompt, seed=shot.seed)
        for key, shot in zip(keys, shots, strict=True)
        if key not in have
    }
    if missing:
        drawn = yield from _draw(base, bank, list(missing.values()), config)
        have |= dict(zip(missing, drawn, strict=True))
    cache.images.update(have)
    cache.trim()
    return [have[key] for key in keys]


def _probe(
    base: BaseModel, bank: AdapterBank, config: EvaluationConfig, cache: EvaluationCache
) -> Generator[None, None, DriftProbe]:
    generic = config.probe_prompts or config.generic_prompts
    key = (base.digest, generic, config.class_noun, config.probe_points, config.probe_seed)
    probe = cache.probes.get(key)
    if probe is None or probe.bank is not bank:
        probe = yield from DriftProbe.build(
            base,
            bank,
            generic_prompts=generic,
            class_prompts=class_prompts(base, config.class_noun, HELD_OUT_TEMPLATES),
            points=config.probe_points,
            seed=config.probe_seed,
            samples=cache.samples,
        )
        cache.probes[key] = probe
    cache.probes.move_to_end(key)
    cache.trim()
    return probe


def _judge(
    judges: Judges,
    shots: Sequence[_Shot],
    base_images: Sequence[Image_HW3],
    adapted_images: Sequence[Image_HW3] | None,
    photos: Sequence[Image.Image],
) -> Generator[None, None, tuple[list[dict[str, float]], dict[str, float]]]:
    """Scores of every picture, and DIV of base and adapted. One judge pass a tick."""
    texts = judges.clip_text([shot.base_prompt for shot in shots])
    photo_clip, photo_dino = judges.clip_image(photos), judges.dino(photos)
    yield
    scores: list[dict[str, float]] = [{} for _ in shots]
    divs: dict[str, float] = {}
    dino_of: dict[str, Tensor] = {}
    arms = {"base_": base_images} | ({} if adapted_images is None else {"": adapted_images})
    for prefix, images in arms.items():
        clip = yield from _in_passes(judges.clip_image, images)
        dino = dino_of[prefix] = yield from _in_passes(judges.dino, images)
        text_agreement = metrics.clip_t(clip, texts)
        clip_i, dino_i = (
            metrics.photo_similarity(clip, photo_clip),
            metrics.photo_similarity(dino, photo_dino),
        )
        for i, shot in enumerate(shots):
            if shot.kind in {SUBJECT, GENERIC}:
                scores[i][f"{prefix}clip_t"] = float(text_agreement[i])
            if shot.kind == SUBJECT:
                scores[i] |= {f"{prefix}clip_i": float(clip_i[i]), f"{prefix}dino": float(dino_i[i])}
            if shot.kind == CLASS:
                scores[i][f"{prefix}pres"] = float(dino_i[i])
        spread = metrics.div(dino[torch.tensor([shot.kind == PLAIN for shot in shots])])
        if spread is not None:
            divs[f"{prefix}div"] = spread
    if "" in dino_of:
        change = metrics.same_seed_distance(dino_of["base_"], dino_of[""])
        for i in range(len(shots)):
            scores[i]["change"] = float(change[i])
    else:  # the base alone is the thing under evaluation: its figures stand under both names
        for mine in (*scores, divs):
            mine |= {name.removeprefix("base_"): value for name, value in list(mine.items())}
    return scores, divs


def _in_passes(
    encode: Callable[[Sequence[Image_HW3]], Tensor], images: Sequence[Image_HW3]
) -> Generator[None, None, Tensor]:
    features = []
    for first in range(0, len(images), IMAGES_PER_PASS):
        features.append(encode(images[first : first + IMAGES_PER_PASS]))
        yield
    return torch.cat(features)


def _summarise(pairs: Sequence[ImagePair]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    figures: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    wanted = [
        *((name, SUBJECT, name) for name in ("clip_t", "clip_i", "dino")),
        *((f"base_{name}", SUBJECT, f"base_{name}") for name in ("clip_t", "clip_i", "dino")),
        ("pres", CLASS, "pres"),
        ("base_pres", CLASS, "base_pres"),
        ("generic_clip_t", GENERIC, "clip_t"),
        ("base_generic_clip_t", GENERIC, "base_clip_t"),
        ("generic_change", GENERIC, "change"),
    ]
    for name, kind, score in wanted:
        # samples of the class prompt differ in their seed only: there the seeds are what is resampled
        scores = [
            (str(pair.seed) if kind == CLASS else pair.prompt, pair.scores[score])
            for pair in pairs
            if pair.kind == kind and score in pair.scores
        ]
        found = metrics.mean_over_prompts(scores)
        if found is not None:
            figures[name], intervals[name] = found[0], found[1:]
    return figures, intervals


def _units(config: EvaluationConfig, shots: Sequence[_Shot], *, adapted: bool) -> int:
    drawing = -(-len(shots) // MAX_BATCH) * config.steps + len(shots)
    judging = 1 + 2 * -(-len(shots) // IMAGES_PER_PASS)
    if not adapted:
        return drawing + judging
    prompts = len(config.probe_prompts or config.generic_prompts) + len(HELD_OUT_TEMPLATES)
    probe = SAMPLE_STEPS * prompts // (ROWS_PER_TICK // 2) + 3 * config.probe_points // ROWS_PER_TICK
    return 2 * (drawing + judging) + probe


class _Meter:
    """Counts ticks of all phases; the total is an estimate, so the count is held below it until the end."""

    def __init__(self, on_progress: OnProgress | None, total: int) -> None:
        self.on_progress, self.total, self.count = on_progress, total, 0

    def phase(self, name: str, work: Generator[None, None, T]) -> Generator[None, None, T]:
        try:
            while True:
                try:
                    next(work)
                except StopIteration as stop:
                    result: T = stop.value
                    return result
                self.count += 1
                self._report(name, min(self.count, self.total - 1))
                yield
        finally:
            work.close()

    def done(self) -> None:
        self._report("done", self.total)

    def _report(self, name: str, count: int) -> None:
        if self.on_progress is not None:
            self.on_progress(EvaluationProgress(name, count, self.total))
