"""The placeholder's token embedding (Textual Inversion, arXiv 2208.01618), started from the class noun.

It is the one part of an adapter that cannot move the base at all: prompts without the placeholder never
read it. What it learns need not be paid for from the drift budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mooring_server.engine.adapters import LearnedEmbeddings
from mooring_server.engine.base import BaseModel
from mooring_server.training.optimiser import FlatAdam


class PlaceholderEmbedding:
    """One learned vector per text encoder, with its optimiser.

    Args:
        base: whose token embeddings give start and scale.
        placeholder: the token as it is written in prompts.
        class_noun: whose mean token embedding is the start.
        learn: False keeps the start fixed.
    """

    def __init__(self, base: BaseModel, placeholder: str, class_noun: str, *, learn: bool) -> None:
        self.placeholder = placeholder
        self.learn = learn
        starts = [vectors.mean(0, keepdim=True) for vectors in base.word_embeddings(class_noun)]
        self.vectors: list[Tensor] = [start.clone().requires_grad_(learn) for start in starts]
        self._scales = [
            float(encoder.get_input_embeddings().weight.detach().float().square().mean().sqrt())
            for encoder in base.text_encoders
        ]
        self._adam = [FlatAdam.create(vector.detach().view(-1)) for vector in self.vectors]

    @property
    def learned(self) -> LearnedEmbeddings:
        """The vectors that prompts are encoded with: those being optimised, hence differentiable."""
        return LearnedEmbeddings({self.placeholder: tuple(self.vectors)})

    def frozen(self) -> LearnedEmbeddings:
        """A copy for publishing and previews."""
        return LearnedEmbeddings({self.placeholder: tuple(v.detach().clone() for v in self.vectors)})

    def zero_grad(self) -> None:
        """Forget gradients."""
        for vector in self.vectors:
            vector.grad = None

    def gradients(self) -> Sequence[Tensor]:
        """Gradients that are present."""
        return [vector.grad for vector in self.vectors if vector.grad is not None]

    def step(self, learning_rate: float, number: int) -> None:
        """One Adam update; the learning rate is relative to the RMS of the embedding table."""
        for vector, adam, scale in zip(self.vectors, self._adam, self._scales, strict=True):
            if vector.grad is not None:
                adam.step(vector.grad.view(-1), learning_rate * scale, number)

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint."""
        named: dict[str, Tensor] = {}
        for index, (vector, adam) in enumerate(zip(self.vectors, self._adam, strict=True)):
            named[f"embedding.{index}"] = vector.detach().clone()
            named[f"embedding.{index}.first"] = adam.first.clone()
            named[f"embedding.{index}.second"] = adam.second.clone()
        return named

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        for index, (vector, adam) in enumerate(zip(self.vectors, self._adam, strict=True)):
            vector.copy_(tensors[f"embedding.{index}"])
            adam.first.copy_(tensors[f"embedding.{index}.first"])
            adam.second.copy_(tensors[f"embedding.{index}.second"])
