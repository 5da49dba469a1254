"""A picture check by a classifier: a local transformers image-classification directory.

It runs on the CPU beside the engine, one picture at a time: the device is the engine's alone. Weights are
safetensors; a directory that has only a pickle is refused. No classifier ships with Mooring
(docs/decisions.md says why).
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from mooring_server.errors import MooringError, Reason
from mooring_server.safety.policy import Pixels, Verdict


class ClassifierCheck:
    """Refuses a picture when the labels to refuse have at least the threshold's probability together.

    Args:
        model: gives `logits`.
        processor: makes its input of pixels.
        refuse: names of the labels to refuse.
        threshold: 0 to 1.
    """

    def __init__(self, model: Any, processor: Any, refuse: Collection[str], threshold: float) -> None:
        self._model, self._processor, self._threshold = model, processor, threshold
        labels = {int(index): str(name) for index, name in model.config.id2label.items()}
        wanted = {name.casefold() for name in refuse}
        self._refuse = {index: name for index, name in labels.items() if name.casefold() in wanted}
        missing = wanted - {name.casefold() for name in self._refuse.values()}
        if missing or not self._refuse:
            raise _unusable(
                f"The image classifier has no label {', '.join(sorted(missing)) or 'to refuse'}; "
                f"it has {', '.join(sorted(labels.values()))}.",
                "Set MOORING_IMAGE_CHECK_REFUSE to some of its labels.",
            )
        self._lock = threading.Lock()
        self.name = "classifier"

    @staticmethod
    def load(directory: str | Path, refuse: Collection[str], threshold: float) -> ClassifierCheck:
        """Load a directory that `AutoModelForImageClassification` reads.

        Raises:
            MooringError: INVALID_FIELD: it cannot be loaded, or lacks a label.
        """
        if not Path(directory).is_dir():  # a name would be looked for on a hub
            raise _unusable(f"There is no directory {directory}.", "Name a local directory.")
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            model = AutoModelForImageClassification.from_pretrained(
                str(directory), use_safetensors=True, **options
            )
            processor = AutoImageProcessor.from_pretrained(str(directory), **options)  # type: ignore[no-untyped-call]
        except Exception as error:
            raise _unusable(
                f"The image classifier {directory} cannot be loaded: {str(error)[:200]}",
                "It needs config.json, preprocessor_config.json and model.safetensors.",
            ) from error
        return ClassifierCheck(model.eval().requires_grad_(requires_grad=False), processor, refuse, threshold)

    def judge(self, pixels: Pixels) -> Verdict:
        """The verdict on one picture; its score is the probability of all labels to refuse together."""
        with self._lock, torch.inference_mode():
            inputs = self._processor(images=[pixels], return_tensors="pt", input_data_format="channels_last")
            shares = self._model(**inputs).logits[0].float().softmax(-1)
        if not bool(torch.isfinite(shares).all()):
            raise MooringError(Reason.INTERNAL, "The image classifier gave no number.")
        score = float(sum(shares[index] for index in self._refuse))
        worst = max(self._refuse, key=lambda index: float(shares[index]))
        refused = score >= self._threshold
        return Verdict(
            self.name, allowed=not refused, category=self._refuse[worst] if refused else "", score=score
        )


def _unusable(message: str, remedy: str) -> MooringError:
    return MooringError(Reason.INVALID_FIELD, message, remedy=remedy)
