"""What several engine tests need."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from mooring_server.engine.adapters import (
    AdapterWeights,
    LayerFactors,
    LearnedEmbeddings,
    adaptable_layers,
    matrix_shape,
)
from mooring_server.engine.base import BaseModel


def drain(generator: Generator[None, None, Any]) -> Any:
    """Run a generator to its end, as the engine would with nothing else to do."""
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value


def random_adapter(
    base: BaseModel,
    seed: int,
    *,
    rank: int = 4,
    size: float = 0.3,
    targets: str = "attention",
    placeholder: str | None = None,
    vectors: int = 1,
) -> AdapterWeights:
    """An adapter strong enough that every image changes."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: LayerFactors(
            torch.randn(rank, matrix_shape(layer)[1], generator=generator) * size,
            torch.randn(matrix_shape(layer)[0], rank, generator=generator) * size,
        )
        for name, layer in adaptable_layers(base, targets).items()
    }
    embeddings = None
    if placeholder is not None:
        widths = [base.embedding_width(index) for index in range(len(base.text_encoders))]
        learned = tuple(torch.randn(vectors, width, generator=generator) for width in widths)
        embeddings = LearnedEmbeddings({placeholder: learned})
    return AdapterWeights(base.digest, rank, layers, embeddings, {"seed": str(seed)})
