"""A server process that has done every kind of work, and goes on with some."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import mooring
import numpy as np
from mooring.v1 import personalization_pb2 as pb
from mooring.v1 import personalization_pb2_grpc
from PIL import Image
from tiny_judges import save_tiny_clip, save_tiny_vit
from transformers import CLIPTokenizer

DEADLINE = 240.0
"""Seconds that anything may take on a machine that is busy with other work."""

PROGRAM = """
import asyncio
from mooring_server.config import Settings
from mooring_server.server import serve
asyncio.run(serve(Settings(), on_ready=lambda target: print(target, flush=True)))
"""
QUICK = {
    "rank": 2,
    "batch_size": 1,
    "views": 1,
    "preview_every": 0,
    "probe_every": 2,
    "checkpoint_every": 5,
}
PROMPT = "a photo of a dog"


@dataclass
class Worked:
    """The process and how to reach it."""

    process: subprocess.Popen[str]
    target: str
    state: Path
    log: Path
    idle: threading.Event = field(default_factory=threading.Event)

    def lines(self) -> list[dict[str, Any]]:
        """Its log so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    @property
    def metrics(self) -> str:
        """host:port of /metrics."""
        serving = next(line for line in self.lines() if line["event"] == "serving")
        return serving["metrics"].removeprefix("http://").removesuffix("/metrics")


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@contextlib.contextmanager
def worked_server(base: Path, folder: Path, **variables: str) -> Iterator[Worked]:
    """Start a server on a tiny base and let it train, evaluate, draw and fail; then keep it busy."""
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    environment = {
        **os.environ,
        "MOORING_BASE": str(base),
        "MOORING_CLIP_JUDGE": str(save_tiny_clip(folder / "clip", tokenizer)),
        "MOORING_DINO_JUDGE": str(save_tiny_vit(folder / "dino")),
        "MOORING_STATE_DIR": str(folder / "state"),
        "MOORING_LISTEN": "127.0.0.1:0",
        "MOORING_METRICS_LISTEN": "127.0.0.1:0",
        "MOORING_LOG_FORMAT": "json",
        "MOORING_THREADS": "1",
        "MOORING_RANK": "8",
        "MOORING_SLOTS": "4",
        "MOORING_HOST_CACHE_BYTES": "0",  # every adapter is evicted once it is not used
        "MOORING_DRAIN_SECONDS": "2",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    log = folder / "server.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert process.stdout is not None
    worked = Worked(process, process.stdout.readline().strip(), folder / "state", log)
    try:
        assert worked.target, log.read_text()
        with mooring.Client(worked.target) as client:
            _work(client, worked)
            worker = threading.Thread(target=_keep_busy, args=[worked], daemon=True)
            worker.start()
            yield worked
            worked.idle.set()
            worker.join()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _work(client: mooring.Client, worked: Worked) -> None:
    client.create_subject("rex", class_noun="dog", rights="owned", photos=[picture(0), picture(1)])
    client.wait(_train(worked, "rex", steps=4))
    client.wait(
        client.evaluate(
            "rex",
            prompts=[PROMPT],
            generic_prompts=["a red car", "a blue cat"],
            seeds=[0],
            steps=2,
            class_samples=2,
        )
    )
    client.images(PROMPT, adapter="rex", steps=2)
    with contextlib.suppress(mooring.errors.MooringError):  # whatever the gate says counts
        client.publish_adapter("rex")
    for _ in range(3):  # a file that is gone cannot be loaded
        _lose_an_adapter(client, worked)
    with contextlib.suppress(mooring.errors.MooringError):
        client.images("", steps=2)
    with contextlib.suppress(mooring.errors.MooringError):
        client.create_subject("text", class_noun="dog", rights="owned", photos=[b"no picture"])
    # one that runs for long, so that its figures can be seen, and one that waits for it
    for name in ("long", "waiting"):
        _train(worked, name, steps=3000)


def _train(worked: Worked, adapter_id: str, *, steps: int) -> Any:
    """Small trainings need settings that the client does not offer."""
    with grpc.insecure_channel(worked.target) as channel:
        stub: Any = personalization_pb2_grpc.PersonalizationServiceStub(channel)
        request = pb.TrainRequest(
            subject="tenants/-/subjects/rex", adapter_id=adapter_id, config={"steps": steps, **QUICK}
        )
        return stub.Train(request, timeout=DEADLINE).job


def _lose_an_adapter(client: mooring.Client, worked: Worked) -> None:
    files = list((worked.state / "objects" / "adapters").glob("*.safetensors"))
    for path in files:
        path.rename(path.with_suffix(".away"))
    with contextlib.suppress(mooring.errors.MooringError):
        client.images(PROMPT, adapter="rex", steps=2)
    for path in files:
        path.with_suffix(".away").rename(path)


def _keep_busy(worked: Worked) -> None:
    with mooring.Client(worked.target) as client:
        while not worked.idle.is_set():
            with contextlib.suppress(mooring.errors.MooringError):
                client.images(PROMPT, adapter="rex", steps=2)
                client.images("", steps=2)
            _lose_an_adapter(client, worked)
            time.sleep(0.5)
