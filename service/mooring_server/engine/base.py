"""Load a base model from a local directory in diffusers layout, or by hub id where a hub answers.

Only safetensors are read, never pickles. The digest covers the weight and configuration files of the
components that are used, in a fixed order, so it is the same for the same directory on every machine.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from mooring_server.engine.model import SAMPLERS, BaseModel, PromptCheck, PromptEmbeds
from mooring_server.errors import MooringError, Reason

__all__ = ["SAMPLERS", "BaseModel", "PromptCheck", "PromptEmbeds", "digest_of", "load_base"]

WORDS_FILE = "trained_words.json"
"""Beside model_index.json, for bases of a small vocabulary: a JSON list of the training captions' words."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SD = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_SDXL = (*_SD, "text_encoder_2", "tokenizer_2")
_REMEDY = (
    "Give a directory saved by StableDiffusionPipeline or StableDiffusionXLPipeline.save_pretrained with "
    "safetensors weights."
)


def load_base(
    path_or_hub_id: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    autocast: bool = False,
    attention: str = "auto",
) -> BaseModel:
    """Load an SD1.x/2.x or SDXL base.

    The VAE stays in float32 whatever `dtype` is: SDXL's overflows in float16.

    Args:
        path_or_hub_id: a local directory, or a hub id such as "org/model".
        device: torch device of all networks.
        dtype: of UNet and text encoders, whatever the files hold.
        threads: torch CPU threads for the calling thread; None leaves them.
        autocast: compute the UNet in bfloat16 (see `BaseModel`).
        attention: kernel of the UNet's attention (see `BaseModel`).

    Raises:
        MooringError: BASE_NOT_USABLE, saying what is missing or not supported.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    root = _resolve(str(path_or_hub_id))
    index = _read_json(root / "model_index.json")
    name = str(index.get("_class_name", ""))
    if not name.startswith("StableDiffusion"):
        raise _not_usable(
            f"{root} holds a {name or 'nameless pipeline'}, which is neither SD1.x/2.x nor SDXL."
        )
    kind = "sdxl" if name.startswith("StableDiffusionXL") else "sd"
    components = _SDXL if kind == "sdxl" else _SD
    missing = [part for part in components if not (root / part).is_dir()]
    if missing:
        raise _not_usable(f"{root} lacks the folders {', '.join(missing)}.")
    try:
        loaded = {part: _load_component(root / part, part, dtype) for part in components}
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _not_usable(f"{root} cannot be loaded: {error}") from error
    for part, module in loaded.items():
        if isinstance(module, torch.nn.Module):
            loaded[part] = module.to(device)
    base = BaseModel(
        kind=kind,
        digest=digest_of(root, components),
        unet=loaded["unet"],
        text_encoders=[loaded[part] for part in components if part.startswith("text_encoder")],
        tokenizers=[loaded[part] for part in components if part.startswith("tokenizer")],
        vae=loaded["vae"],
        scheduler_config=loaded["scheduler"],
        zero_negative=kind == "sdxl" and bool(index.get("force_zeros_for_empty_prompt", True)),
        trained_words=_trained_words(root / WORDS_FILE),
        autocast=autocast,
        attention=attention,
    )
    _require_supported(base)
    return base


def digest_of(root: Path, components: tuple[str, ...]) -> str:
    """`sha256:…` over names, sizes and bytes of the files that make up the base."""
    files = [root / "model_index.json", root / WORDS_FILE]
    for component in components:
        found = (root / component).iterdir()
        files += [path for path in found if path.suffix in {".json", ".txt", ".safetensors"}]
    digest = hashlib.sha256()
    for path in sorted(
        (file for file in files if file.is_file()), key=lambda file: file.relative_to(root).as_posix()
    ):
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return "sha256:" + digest.hexdigest()


def _resolve(name: str) -> Path:
    root = Path(name).expanduser()
    if root.is_dir():
        return root
    if not _HUB_ID.fullmatch(name):
        raise _not_usable(f"There is no directory {name}.")
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(name, use_safetensors=True))
    except Exception as error:  # the hub client raises several unrelated families of errors
        summary = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _not_usable(f"{name} is no local directory, and no hub delivered it: {summary}") from error


def _load_component(folder: Path, part: str, dtype: torch.dtype) -> Any:
    import diffusers
    import transformers

    if part == "scheduler":
        return _read_json(folder / "scheduler_config.json")
    if part.startswith("tokenizer"):
        return transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    weights = {path.name for path in folder.glob("*.safetensors")}
    if weights and all(".fp16." in weight for weight in weights):
        options["variant"] = "fp16"
    if part.startswith("text_encoder"):
        plain = part == "text_encoder"
        model = transformers.CLIPTextModel if plain else transformers.CLIPTextModelWithProjection
        return model.from_pretrained(folder, dtype=dtype, **options)
    if part == "unet":
        unet: Any = diffusers.UNet2DConditionModel
        return unet.from_pretrained(folder, torch_dtype=dtype, **options)
    kinds = {"AutoencoderKL": diffusers.AutoencoderKL, "AutoencoderTiny": diffusers.AutoencoderTiny}
    name = str(_read_json(folder / "config.json").get("_class_name"))
    if name not in kinds:
        raise ValueError(f"VAEs of class {name} are not supported; AutoencoderKL and AutoencoderTiny are")
    return kinds[name].from_pretrained(folder, torch_dtype=torch.float32, **options)


def _trained_words(path: Path) -> frozenset[str] | None:
    """The words that the base lists, in lower case; None where it lists none."""
    if not path.is_file():
        return None
    try:
        words = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _not_usable(f"{path} cannot be read as JSON: {error}") from error
    if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise _not_usable(f"{path} is not a JSON list of words.")
    return frozenset(word.lower() for word in words)


def _require_supported(base: BaseModel) -> None:
    if base.prediction_type not in {"epsilon", "v_prediction"}:
        raise _not_usable(f"Prediction type {base.prediction_type} is not supported.")
    if base.unet.config.in_channels != base.unet.config.out_channels:
        raise _not_usable(
            "The UNet takes extra input channels (inpainting or depth), which is not supported."
        )
    if base.unet.config.in_channels != base.vae.config.latent_channels:
        raise _not_usable(
            f"The UNet works on {base.unet.config.in_channels} latent channels, "
            f"the VAE makes {base.vae.config.latent_channels}."
        )
    if getattr(base.unet.config, "time_cond_proj_dim", None) is not None:
        raise _not_usable("Guidance-distilled UNets (LCM) are not supported.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _not_usable(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise _not_usable(f"{path} is not a JSON object.")
    return document


def _not_usable(message: str) -> MooringError:
    return MooringError(Reason.BASE_NOT_USABLE, message, remedy=_REMEDY)
