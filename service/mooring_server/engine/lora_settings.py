"""The settings of a LoRA that its tensors do not hold: alpha, rank and scaling, by layer.

Read from PEFT's `adapter_config.json`, or from what diffusers writes into a file's metadata, which is the
same under a prefix. Whatever would make the update something other than (alpha/r)·B·A on the untouched base
is refused. PEFT takes the patterns of `alpha_pattern` and `rank_pattern` for regular expressions; here they
are compared as text, since an expression from a stranger's file may run for ever.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mooring_server.engine.adapters import clipped, listed, unmatched
from mooring_server.errors import MooringError, Reason

DIFFUSERS_METADATA = "lora_adapter_metadata"
_TEXT_MODEL = "text_model."
"""Before the modules of a text encoder in some versions of transformers, and left out in ours."""
_PATTERN = re.compile(r"\^?[A-Za-z0-9_.]+")
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")
_REMEDY = "Save it again as plain LoRA; PEFT's save_pretrained can convert."


@dataclass(frozen=True)
class LoraSettings:
    """What scales the update of each layer.

    Args:
        alpha: of layers that no pattern names; None where the file says nothing: alpha = rank.
        alphas: pattern → alpha; the first that fits counts.
        rank: as declared; None where it is not.
        ranks: pattern → rank.
        stabilised: alpha / sqrt(rank) instead of alpha / rank.
    """

    alpha: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    rank: int | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    stabilised: bool = False

    def scale(self, module: str, rank: int, alpha: float | None = None) -> float:
        """The factor on a layer's B·A.

        Args:
            module: its path in the model.
            rank: of its factors.
            alpha: from the layer's own tensor, where there is one.
        """
        chosen = alpha if alpha is not None else _pick(self.alphas, module, self.alpha)
        if chosen is None:
            return 1.0
        return chosen / (math.sqrt(rank) if self.stabilised else rank)

    def check(self, ranks: Mapping[str, int], *, with_alpha: Sequence[str]) -> None:
        """Compare with the tensors.

        Args:
            ranks: module → rank of its factors.
            with_alpha: layers that have an alpha tensor of their own.

        Raises:
            MooringError: ADAPTER_KEYS_UNMATCHED where the declared ranks are others, or alpha is given twice.
        """
        if self.alpha is not None and with_alpha:
            raise unmatched(
                f"The alpha of {listed(with_alpha)} is given as a tensor and in the settings.",
                remedy="Keep one of the two.",
            )
        other = [
            f"{module} (rank {rank}, declared {declared})"
            for module, rank in ranks.items()
            if (declared := _pick(self.ranks, module, self.rank)) not in {None, rank}
        ]
        if other:
            raise unmatched(
                f"The tensors have other ranks than the settings say: {listed(other)}.",
                remedy="Send the settings that belong to this file.",
            )


def from_peft(config: Mapping[str, Any]) -> LoraSettings:
    """The settings in PEFT's `adapter_config.json`.

    Raises:
        MooringError: ADAPTER_NOT_SUPPORTED for other adapters than plain LoRA; ADAPTER_KEYS_UNMATCHED for
            settings that are missing or of the wrong kind.
    """
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise _unsupported("peft_type", config["peft_type"])
    if config.get("bias", "none") != "none":
        raise _unsupported("bias", config["bias"])
    for name in ("use_dora", "fan_in_fan_out", "modules_to_save", "lora_bias", "layer_replication"):
        if config.get(name):
            raise _unsupported(name, config[name])
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_THE_BASE):
        raise _unsupported("init_lora_weights", config["init_lora_weights"])
    return LoraSettings(
        alpha=_number(config, "lora_alpha"),
        alphas={
            _pattern(key): _number(config["alpha_pattern"], key) for key in _object(config, "alpha_pattern")
        },
        rank=int(_number(config, "r")),
        ranks={
            _pattern(key): int(_number(config["rank_pattern"], key))
            for key in _object(config, "rank_pattern")
        },
        stabilised=bool(config.get("use_rslora", False)),
    )


def from_diffusers(metadata: Mapping[str, str], component: str) -> LoraSettings:
    """The settings in the metadata of a file that diffusers wrote; without any, alpha = rank.

    Args:
        metadata: of the file.
        component: whose settings: "unet", "text_encoder" or "text_encoder_2".

    Raises:
        MooringError: as `from_peft`.
    """
    if DIFFUSERS_METADATA not in metadata:
        return LoraSettings()
    try:
        document = json.loads(metadata[DIFFUSERS_METADATA])
        prefix = f"{component}."
        found = {key.removeprefix(prefix): value for key, value in document.items() if key.startswith(prefix)}
    except (ValueError, AttributeError, RecursionError) as error:
        raise unmatched(
            f"The file's {DIFFUSERS_METADATA} is damaged: {clipped(repr(error))}.", remedy=_REMEDY
        ) from error
    return from_peft(found) if found else LoraSettings()


def _pick(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The first pattern's value that names the module: its path, or the end of it unless it starts with ^."""
    for pattern, value in patterns.items():
        whole = pattern.removeprefix("^").removeprefix(_TEXT_MODEL)
        anchored = pattern.startswith("^")
        if module == whole or (not anchored and module.endswith("." + whole)):
            return value
    return default


def _pattern(text: str) -> str:
    if not _PATTERN.fullmatch(text):
        raise _unsupported("rank_pattern or alpha_pattern", text)
    return text


def _object(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise unmatched(f"The setting {name} is no object.", remedy=_REMEDY)
    return found


def _number(config: Mapping[str, Any], name: str) -> float:
    found = config.get(name)
    if (
        isinstance(found, bool)
        or not isinstance(found, int | float)
        or not 0 < found <= sys.float_info.max  # JSON knows whole numbers beyond every float
    ):
        raise unmatched(
            f"The setting {clipped(name)} is {clipped(repr(found))}, not a positive number.", remedy=_REMEDY
        )
    return float(found)


def _unsupported(name: str, value: object) -> MooringError:
    return MooringError(
        Reason.ADAPTER_NOT_SUPPORTED,
        f"The adapter's {name} is {clipped(repr(value))}, so it is no plain LoRA on the untouched base.",
        remedy=_REMEDY,
        metadata={"setting": name},
    )
