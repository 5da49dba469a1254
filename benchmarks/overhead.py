"""What do engine and server cost over a bare denoise loop? `python -m benchmarks.overhead`.

A real server on the base, saturated: all requests of one guided image each wait from the start, each with one
of four adapters. The same images are made three ways, in turns, by the same base, bank and torch threads:

- bare: a loop around the UNet and a diffusers scheduler, in full batches of the size that the engine chose;
  prompts are encoded before, images decoded after, and nothing else happens,
- engine: `Engine.generate` in process,
- server: `Client.generate_batch` over gRPC on loopback, PNG encoding, the client and its decoding included
  (in one process with the server, so that its time counts against ours).

Goal: engine and server make at least 95 % of the images a second that the bare loop makes. The gate: all
three draw the same images.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path

import mooring
import numpy as np
import torch
from mooring_server.config import Settings
from mooring_server.engine.adapters import LORA_FILE, AdapterWeights, export_diffusers
from mooring_server.engine.model import PromptEmbeds
from mooring_server.engine.policy import TaskClass
from mooring_server.engine.requests import GenerationEvent, ImageReady
from mooring_server.engine.ticks import UnetCall, answer
from mooring_server.rpc.runtime import Runtime
from mooring_server.server import EmbeddedServer
from PIL import Image

from benchmarks import bases
from benchmarks.common import Row, show
from benchmarks.engine_common import (
    GUIDANCE,
    GateError,
    Pixels,
    add_deterministic,
    apart,
    gpu_note,
    largest_difference,
    not_measured,
    options_for,
    progress,
    random_adapter,
    request,
    require_device,
    result_name,
)

ADAPTERS = 4
RANK = 16
GOAL = 0.95
ROUNDS = 3

NOTES = (
    "images a second at saturation; ratio: ours / bare loop, larger is better. Medians of rounds in turns.",
    "bare: full batches of the size that the engine's cost table gives; prompts were encoded before.",
    "server: gRPC on loopback, PNG both ways; client and server share one process.",
)


def main() -> None:
    """Run the benchmark."""
    options = _options()
    require_device(options)
    base = bases.load(options.base, device=options.device, dtype=options.dtype)
    adapters = [random_adapter(base, seed, RANK) for seed in range(ADAPTERS)]
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            base=str(bases.directory(options.base, base, Path(folder) / "base")),
            state_dir=Path(folder) / "state",
            device=options.device,
            dtype=options.dtype,
            threads=options.threads,
            slots=ADAPTERS + 1,
            rank=RANK,
            targets="attention",
            deterministic=options.deterministic,
            max_queue=10_000,
            max_batch_in_flight=10_000,
        )
        del base  # the server loads its own
        with EmbeddedServer(settings) as server, mooring.Client(server.target) as client:
            runtime = server.server.runtime
            served = _publish(client, runtime, adapters)
            try:
                rows, summary = measure(runtime, client, served, options)
            except GateError as wrong:
                raise SystemExit(f"correctness gate: {wrong}; no throughput is printed") from wrong
    if options.device == "cpu":
        rows.append(not_measured())
    show(
        result_name("overhead", options),
        f"Engine and server against a bare denoise loop on {options.base}, {options.device}, {options.dtype}",
        rows,
        notes=(*NOTES, gpu_note("overhead")),
        summary=summary,
        options=options,
    )


def _options() -> argparse.Namespace:
    options = options_for(__doc__)
    options.add_argument("--images", type=int, help="a round (default: 16; quick: 6)")
    options.add_argument("--steps", type=int, help="denoising steps (default: 20; quick: 4)")
    add_deterministic(options)
    chosen = options.parse_args()
    chosen.images = chosen.images or (6 if chosen.quick else 16)
    chosen.steps = chosen.steps or (4 if chosen.quick else 20)
    return chosen


def _publish(
    client: mooring.Client, runtime: Runtime, adapters: Sequence[AdapterWeights]
) -> dict[str, AdapterWeights]:
    """The adapters as the server has them, by name."""
    tenant = client.server_info().tenant.removeprefix("tenants/")
    found: dict[str, AdapterWeights] = {}
    for number, weights in enumerate(adapters):
        name = f"a{number}"
        client.import_adapter(name, [(LORA_FILE, export_diffusers(weights)[LORA_FILE])], rights="owned")
        found[name] = runtime.adapters.get(runtime.store.get_adapter(tenant, name))
    return found


def measure(
    runtime: Runtime,
    client: mooring.Client,
    served: Mapping[str, AdapterWeights],
    options: argparse.Namespace,
) -> tuple[list[Row], dict[str, float | str | None]]:
    """Race the three ways.

    Raises:
        GateError: they draw different images.
    """
    base, engine = runtime.base, runtime.engine
    native = base.native_size // base.vae_scale_factor
    limit = engine.costs.limit((native, native))
    batch = max(1, min(engine.max_running, limit // 2))
    prompts = bases.prompts(base)
    wanted = [(prompts[i % len(prompts)], f"a{i % ADAPTERS}", i) for i in range(options.images)]
    ways: dict[str, Callable[[], dict[int, Pixels]]] = {
        "bare": _bare(runtime, served, wanted, batch, options.steps),
        "engine": lambda: _by_engine(runtime, served, wanted, options.steps),
        "server": lambda: _by_server(client, wanted, options.steps),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    images: dict[str, dict[int, Pixels]] = {}
    with progress() as bar:
        task = bar.add_task("warming up", total=len(ways) * (ROUNDS + 1))
        for turn in range(ROUNDS + 1):
            for name, run in ways.items():
                bar.update(task, description=name)
                started = time.perf_counter()
                images[name] = run()
                if turn:  # the first warms up
                    seconds[name].append(time.perf_counter() - started)
                bar.advance(task)
    worst = max(apart(images["bare"][i], images[name][i]) for name in ways for i in range(len(wanted)))
    if worst > largest_difference(options.dtype):
        raise GateError(f"images differ by {worst:.3g} grey levels")
    rate = {name: len(wanted) / statistics.median(found) for name, found in seconds.items()}
    rows = [
        Row(
            name,
            rate[name],
            rate["bare"],
            rate[name] / rate["bare"],
            f"≥ {GOAL:.0%}",
            rate[name] / rate["bare"] >= GOAL,
            "images/s",
        )
        for name in ("engine", "server")
    ]
    return rows, {
        "images of a bare batch": batch,
        "rows that the cost table aims at": limit,
        "deterministic": str(engine.deterministic),
        "steps": options.steps,
        "images a round": len(wanted),
        "worst difference between images [grey levels]": worst,
    }


Wanted = Sequence[tuple[str, str, int]]
"""Prompt, adapter and seed of each image."""


def _bare(
    runtime: Runtime, served: Mapping[str, AdapterWeights], wanted: Wanted, batch: int, steps: int
) -> Callable[[], dict[int, Pixels]]:
    """The loop; runs on the calling thread while the engine is idle, which then uses nothing of the base."""
    base, bank = runtime.base, runtime.bank
    row_wise = runtime.engine.deterministic and base.device.type == "cpu"
    side = base.native_size // base.vae_scale_factor

    with torch.no_grad():
        texts = {prompt: base.encode_prompt([prompt]) for prompt, _, _ in wanted}
        negative = base.encode_negative([""])

    @torch.no_grad()
    def run() -> dict[int, Pixels]:
        runtime.engine.submit(_nothing(), TaskClass.TRAINING, "idle").result()
        slots = {name: bank.acquire(weights) for name, weights in served.items()}
        found: dict[int, Pixels] = {}
        for start in range(0, len(wanted), batch):
            group = wanted[start : start + batch]
            scheduler = base.new_scheduler("ddim")
            scheduler.set_timesteps(steps)
            noise = [
                torch.randn((1, base.latent_channels, side, side), generator=torch.Generator().manual_seed(s))
                for _, _, s in group
            ]
            latents = torch.cat(noise).to(base.device) * scheduler.init_noise_sigma
            embeds = PromptEmbeds.cat([negative] * len(group) + [texts[prompt] for prompt, _, _ in group])
            mixes = [[(slots[name], 1.0)] for _, name, _ in group] * 2
            for timestep in scheduler.timesteps:
                inputs = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
                call = UnetCall(inputs, timestep, embeds, mixes)
                without, with_prompt = answer(base, bank, [call], row_wise=row_wise)[0].chunk(2)
                guided = without + GUIDANCE * (with_prompt - without)
                latents = scheduler.step(guided, timestep, latents).prev_sample
            for offset, image in enumerate(base.decode(latents)):
                found[start + offset] = image.numpy()
        for slot in slots.values():
            bank.release(slot)
        return found

    return run


def _nothing() -> Generator[None, None, None]:
    """A task that does nothing: once it is done, so is everything before it."""
    yield


def _by_engine(
    runtime: Runtime, served: Mapping[str, AdapterWeights], wanted: Wanted, steps: int
) -> dict[int, Pixels]:
    found: dict[int, Pixels] = {}
    handles = []
    for index, (prompt, name, seed) in enumerate(wanted):

        def keep(event: GenerationEvent, index: int = index) -> None:
            if isinstance(event, ImageReady):
                found[index] = event.image

        handles.append(runtime.engine.generate(request(prompt, served[name], seed=seed, steps=steps), keep))
    for handle in handles:
        handle.result()
    return found


def _by_server(client: mooring.Client, wanted: Wanted, steps: int) -> dict[int, Pixels]:
    requests = [
        (
            str(index),
            {
                "prompt": prompt,
                "adapter": name,
                "seed": seed,
                "steps": steps,
                "guidance_scale": GUIDANCE,
            },
        )
        for index, (prompt, name, seed) in enumerate(wanted)
    ]
    found: dict[int, Pixels] = {}
    for event in client.generate_batch(requests):
        if isinstance(event, mooring.BatchImage):
            with Image.open(io.BytesIO(event.image.data)) as picture:
                found[int(event.id)] = np.asarray(picture.convert("RGB"))
    if len(found) != len(wanted):
        raise RuntimeError(f"the server answered {len(found)} of {len(wanted)} requests with an image")
    return found


if __name__ == "__main__":
    main()
