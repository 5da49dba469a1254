"""A training run's state as safetensors bytes: everything that a resumed run needs to end with the same bits.

Tensors: factors, their gradient-free Adam moments, learned vectors with theirs, and cached class images'
latents (drawing those again would cost minutes). Header: step, digest of what the run is a function of,
controller and log. No pickles. Latents of photos and the drift probe are recomputed: they are pure functions
of the same inputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from mooring_server.errors import MooringError, Reason

FORMAT = "mooring.checkpoint.v1"


class CheckpointStore(Protocol):
    """Where a run's newest checkpoint lies. A save must be atomic: the old one or the new one, never half."""

    def load(self) -> bytes | None:
        """The newest checkpoint, or None for a fresh run."""
        ...

    def save(self, data: bytes) -> None:
        """Replace the checkpoint."""
        ...

    def wanted(self) -> bool:
        """Whether a checkpoint is wanted after this step, whatever its number (the server is draining)."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """One saved state.

    Args:
        step: optimiser steps done.
        run_digest: of configuration, base, photos, prompts and probe: equal digests may be continued.
        tensors: named state.
        scalars: JSON values: controller, moving averages, history.
    """

    step: int
    run_digest: str
    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Safetensors bytes; `from_bytes` is the inverse."""
        from safetensors.torch import save

        header = {
            "format": FORMAT,
            "step": str(self.step),
            "run_digest": self.run_digest,
            "scalars": json.dumps(dict(self.scalars)),
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        return bytes(save(tensors, metadata=header))

    @staticmethod
    def from_bytes(data: bytes) -> Checkpoint:
        """Read a checkpoint.

        Raises:
            MooringError: CHECKPOINT_NOT_USABLE when the bytes are damaged or of another format.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])["__metadata__"]
            found = str(header["format"])
            read = Checkpoint(
                step=int(header["step"]),
                run_digest=header["run_digest"],
                tensors=load(data),
                scalars=json.loads(header["scalars"]),
            )
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise not_usable(f"The checkpoint cannot be read: {error}.") from error
        if found != FORMAT:
            raise not_usable(f"The checkpoint's format is {found}, not {FORMAT}.")
        return read


def not_usable(message: str) -> MooringError:
    """The error for a checkpoint that this run cannot continue from."""
    return MooringError(
        Reason.CHECKPOINT_NOT_USABLE,
        message,
        remedy="Start a new training job; it begins from the base.",
    )
