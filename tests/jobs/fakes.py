"""A training that costs nothing: its state is a hash chain over photos, steps and seed.

The chain makes every lost, repeated or reordered step visible in the final digest.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from mooring_server.engine.adapters import AdapterWeights, LayerFactors
from mooring_server.engine.engine import Engine
from mooring_server.training.config import TrainConfig
from mooring_server.training.trainer import TrainProgress

BASE_DIGEST = "sha256:" + "b" * 64


def chain(photos: list[bytes], steps: int, seed: int) -> str:
    state = hashlib.sha256(b"".join(photos) + bytes([seed])).hexdigest()
    for step in range(steps):
        state = hashlib.sha256(f"{state}{step}".encode()).hexdigest()
    return state


def weights_of(state: str) -> AdapterWeights:
    numbers = torch.tensor(np.frombuffer(bytes.fromhex(state), np.uint8).astype(np.float32))
    factors = LayerFactors(numbers[None, :16].clone(), numbers[16:, None].clone())
    return AdapterWeights(BASE_DIGEST, 1, {"unet.layer": factors})


class FakeTraining:
    """Stands in for `training.trainer.train`; `at` maps a step to what happens before it.

    Before step `hold_at` it waits until its server drains, however long that takes; `held` says so.
    """

    def __init__(self) -> None:
        self.steps_run: list[int] = []
        self.closed = 0
        self.at: dict[int, Callable[[], None]] = {}
        self.loss = 0.5
        self.progressed = threading.Event()
        self.hold_at: int | None = None
        self.held = threading.Event()
        self.step_seconds = 0.0
        self.checkpoint_every = 10

    def __call__(self, _base, _bank, photos, config: TrainConfig, *, checkpoint, on_progress, **_names):
        on_progress(TrainProgress("caching", 0, config.steps))
        yield
        saved = checkpoint.load()
        step, state = (
            json.loads(saved) if saved else (0, chain([p.tobytes() for p in photos], 0, config.seed))
        )
        try:
            while step < config.steps:
                self.at.pop(step, lambda: None)()
                if step == self.hold_at:
                    self.held.set()
                    while not checkpoint.wanted():
                        time.sleep(0.001)
                time.sleep(self.step_seconds)
                state = hashlib.sha256(f"{state}{step}".encode()).hexdigest()
                self.steps_run.append(step)
                step += 1
                due = config.preview_every and step % config.preview_every == 0
                previews = (torch.full((300, 400, 3), step, dtype=torch.uint8),) if due else ()
                on_progress(TrainProgress("training", step, config.steps, loss=self.loss, previews=previews))
                self.progressed.set()
                if step % self.checkpoint_every == 0 or checkpoint.wanted():
                    checkpoint.save(json.dumps([step, state]).encode())
                yield
        except GeneratorExit:
            self.closed += 1
            raise
        figure = SimpleNamespace(value=0.11, to_json=lambda: {"value": 0.11, "low": 0.1, "high": 0.12})
        history = [{"step": step, "loss": self.loss, "strength": 2.0}]
        return SimpleNamespace(
            weights=weights_of(state), drift=SimpleNamespace(figure=figure), history=history, scale=1.0
        )


def fake_certificate(_base, weights, _drift, *, budget):
    document = {"adapter_digest": weights.digest, "budget": budget, "sigma_max": 0.5}
    return SimpleNamespace(dumps=lambda: json.dumps(document), to_json=lambda: document)


def real_engine(**options) -> Engine:
    """The engine itself: with a base and a bank that nobody asks for anything."""
    base = SimpleNamespace(native_size=64, vae_scale_factor=8, device=SimpleNamespace(type="cpu"))
    return Engine(base, SimpleNamespace(), **options)
