"""The resident base model: SD1.x, SD2.x and SDXL behind one small interface.

Weights are frozen for good: nothing in Mooring writes them. Adapters act through hooks (`bank.py`), learned
tokens through a hook on the token embeddings, so the untouched base is the same network with everything off.
diffusers' and transformers' own modules are used as they are; what is ours is the interface around them, the
placeholder tokens and the digest. Left out: refiner and inpainting networks, guidance-distilled UNets.

Shape legend: B batch, C latent channels, H W latent height and width, T tokens, F text features, P pooled.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mooring_server.engine.adapters import LearnedEmbeddings
from mooring_server.engine.row_wise import RowWise
from mooring_server.engine.tokens import PromptTokenizer, Tokens, words_of
from mooring_server.errors import FieldViolation, MooringError, Reason

SAMPLERS = ("ddim", "euler", "euler_ancestral", "dpmpp_2m")
"""Sampler names that a request may carry; the first is the default."""

ATTENTION = {
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Kernels of attention; None: torch chooses one for each shape."""

StageHook = Callable[[str, float], None]
"""Receives a stage's name and its wall seconds."""


@dataclass(frozen=True, eq=False)
class PromptEmbeds:
    """Encoded prompts.

    Args:
        hidden: `[B, T, F]` what cross-attention reads.
        pooled: `[B, P]` for SDXL, else None.
    """

    hidden: Tensor
    pooled: Tensor | None = None

    def rows(self, index: Sequence[int] | slice | Tensor) -> PromptEmbeds:
        """The chosen rows, in the order of `index`; repeated rows are allowed."""
        chosen = index if isinstance(index, slice | Tensor) else torch.tensor(list(index), dtype=torch.long)
        return PromptEmbeds(self.hidden[chosen], None if self.pooled is None else self.pooled[chosen])

    @staticmethod
    def cat(items: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """Concatenate along the batch."""
        pooled = [item.pooled for item in items if item.pooled is not None]
        assert len(pooled) in {0, len(items)}, "pooled embeddings are all present or all absent"
        return PromptEmbeds(torch.cat([item.hidden for item in items]), torch.cat(pooled) if pooled else None)

    def __len__(self) -> int:
        return self.hidden.shape[0]


@dataclass(frozen=True)
class PromptCheck:
    """What the tokenizer makes of a prompt.

    Args:
        tokens: tokens the prompt takes, begin and end not counted.
        limit: tokens the base can take.
        cut: the end of the prompt that does not fit; empty when all of it does.
        unknown_words: words that mean nothing to the base, in order of appearance.
    """

    tokens: int
    limit: int
    cut: str
    unknown_words: list[str]


class BaseModel:
    """A frozen text-to-image model; build it with `base.load_base`.

    Not thread-safe but for `check_prompt`: the engine thread owns it.

    Args:
        kind: "sd" (one text encoder) or "sdxl" (two, with pooled embeddings and size conditioning).
        digest: `sha256:…` over the weight and configuration files.
        unet, text_encoders, vae: modules, already on their device.
        tokenizers: one per text encoder.
        scheduler_config: the directory's scheduler configuration.
        zero_negative: an empty negative prompt is encoded as zeros (SDXL's `force_zeros_for_empty_prompt`).
        trained_words: the words that the training captions held, where the base lists them.
        autocast: compute the UNet in bfloat16. Off by default, so that results are float32-deterministic.
        attention: kernel of the UNet's attention, one of `ATTENTION`.

    Attributes:
        prediction_type: "epsilon" or "v_prediction".
        alphas_cumprod: `[T]` float32, ᾱ_t of the training schedule.
        num_train_timesteps: T.
        latent_channels: C.
        vae_scale_factor: pixels per latent, per side.
        native_size: pixels per side that the base was trained at.
        max_prompt_tokens: tokens of a prompt, begin and end not counted.
        on_stage: called with ("text_encode" | "denoise" | "decode" | "encode", seconds); None for nobody.
    """

    def __init__(
        self,
        *,
        kind: str,
        digest: str,
        unet: Any,
        text_encoders: Sequence[Any],
        tokenizers: Sequence[Any],
        vae: Any,
        scheduler_config: Mapping[str, Any],
        zero_negative: bool = False,
        trained_words: frozenset[str] | None = None,
        autocast: bool = False,
        attention: str = "auto",
    ) -> None:
        self.kind = kind
        self.digest = digest
        self.unet = unet
        self.text_encoders = list(text_encoders)
        self.tokenizers = list(tokenizers)
        self.vae = vae
        self.scheduler_config = dict(scheduler_config)
        self.zero_negative = zero_negative
        self.trained_words = trained_words
        self.autocast = autocast
        self.attention = attention
        self._native_ids: Tensor | None = None
        self.on_stage: StageHook | None = None
        for module in self.modules().values():
            module.requires_grad_(requires_grad=False)
            module.eval()
        self.device = torch.device(unet.device)
        self.dtype: torch.dtype = unet.dtype
        scheduler = self.new_scheduler()
        self.prediction_type = str(scheduler.config.prediction_type)
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod.float().to(self.device)
        self.num_train_timesteps = int(scheduler.config.num_train_timesteps)
        self.latent_channels = int(unet.config.in_channels)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        sample_size = unet.config.sample_size
        side = sample_size if isinstance(sample_size, int) else max(sample_size)
        self.native_size = side * self.vae_scale_factor
        self._prompt_tokenizers = [
            PromptTokenizer(tokenizer, encoder.config.max_position_embeddings)
            for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True)
        ]
        self.max_prompt_tokens = min(tokenizer.limit for tokenizer in self._prompt_tokenizers)
        self._row_wise = RowWise(unet)
        self._learned: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * len(self.text_encoders)
        for index, encoder in enumerate(self.text_encoders):
            encoder.get_input_embeddings().register_forward_hook(self._learned_hook(index))

    # ------------------------------------------------------------------ identity

    def modules(self) -> dict[str, nn.Module]:
        """The base's networks by component name."""
        named: dict[str, nn.Module] = {"unet": self.unet, "vae": self.vae}
        for index, encoder in enumerate(self.text_encoders):
            named["text_encoder" if index == 0 else f"text_encoder_{index + 1}"] = encoder
        return named

    def fingerprint(self) -> str:
        """`sha256:…` of all weights as they are in memory now: proves that nothing wrote them."""
        digest = hashlib.sha256()
        for component, module in self.modules().items():
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(f"{component}.{name}".encode())
                data = tensor.detach().cpu().contiguous()
                digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b"")
        return "sha256:" + digest.hexdigest()

    # ------------------------------------------------------------------ prompts

    def check_prompt(self, prompt: str, embeddings: LearnedEmbeddings | None = None) -> PromptCheck:
        """Count a prompt's tokens and name what would be cut or not understood. Safe on any thread."""
        placeholders = {} if embeddings is None else embeddings.sizes
        every = [tokenizer.tokenize(prompt, placeholders) for tokenizer in self._prompt_tokenizers]
        worst = max(every, key=lambda tokens: len(tokens.ids))
        limit = self.max_prompt_tokens
        cut = prompt[worst.spans[limit][0] :].strip() if len(worst.ids) > limit else ""
        unknown = list(dict.fromkeys(word for tokens in every for word in tokens.unknown))
        if self.trained_words is not None:
            words = dict.fromkeys(words_of(prompt, placeholders))
            # "close-up" is known where "close" and "up" are
            unknown = [
                word
                for word in words
                if word not in self.trained_words and not self.trained_words.issuperset(word.split("-"))
            ]
        return PromptCheck(len(worst.ids), limit, cut, unknown)

    def require_prompt_fits(
        self, prompt: str, embeddings: LearnedEmbeddings | None = None, *, field: str = "prompt"
    ) -> None:
        """Refuse a prompt that the text encoder would cut.

        Raises:
            MooringError: PROMPT_TOO_LONG, naming the words that would be lost.
        """
        check = self.check_prompt(prompt, embeddings)
        if check.cut:
            message = (
                f"The prompt takes {check.tokens} tokens and this base model reads {check.limit}; "
                f"these words would be cut: “{check.cut}”."
            )
            raise MooringError(
                Reason.PROMPT_TOO_LONG,
                message,
                remedy="Shorten the prompt so that nothing is lost.",
                metadata={"tokens": str(check.tokens), "limit": str(check.limit), "cut": check.cut},
                fields=[FieldViolation(field, message)],
            )

    def encode_prompt(
        self, prompts: Sequence[str], embeddings: LearnedEmbeddings | None = None
    ) -> PromptEmbeds:
        """Encode prompts as the diffusers pipelines do.

        Differentiable with respect to the learned vectors of `embeddings` and nothing else. Pooled embeddings
        (SDXL) are read at the end-of-text token also when a placeholder is present; diffusers reads them at
        the placeholder when the configuration carries the old `eos_token_id: 2`.

        Args:
            prompts: texts; the empty text is the unconditional prompt.
            embeddings: learned tokens that the prompts may use.

        Raises:
            MooringError: PROMPT_TOO_LONG.
        """
        for prompt in prompts:
            self.require_prompt_fits(prompt, embeddings)
        started = time.perf_counter()
        sizes = {} if embeddings is None else embeddings.sizes
        hidden: list[Tensor] = []
        pooled: Tensor | None = None
        for index, encoder in enumerate(self.text_encoders):
            tokenizer = self._prompt_tokenizers[index]
            tokens = [tokenizer.tokenize(prompt, sizes) for prompt in prompts]
            rows = [tokenizer.row(item) for item in tokens]
            ids = torch.tensor([row[0] for row in rows], device=self.device)
            mask = torch.tensor([row[1] for row in rows], device=self.device)
            with self._learned_tokens(index, tokens, embeddings):
                if self.kind == "sdxl":
                    output = encoder(ids, output_hidden_states=True)
                    hidden.append(output.hidden_states[-2])
                    pooled = output[0]
                else:
                    uses_mask = getattr(encoder.config, "use_attention_mask", False)
                    hidden.append(encoder(ids, attention_mask=mask if uses_mask else None)[0])
        self.stage("text_encode", started)
        if self.kind == "sdxl":
            assert pooled is not None
            return PromptEmbeds(torch.cat(hidden, dim=-1).to(self.dtype), pooled.to(self.dtype))
        return PromptEmbeds(hidden[0].to(self.dtype))

    def encode_negative(
        self, prompts: Sequence[str], embeddings: LearnedEmbeddings | None = None
    ) -> PromptEmbeds:
        """Encode negative prompts; an empty one is what this base takes for "no condition" (SDXL: zeros)."""
        embeds = self.encode_prompt(prompts, embeddings)
        if not self.zero_negative or all(prompts):
            return embeds
        keep = torch.tensor([float(bool(prompt)) for prompt in prompts], device=self.device, dtype=self.dtype)
        pooled = None if embeds.pooled is None else embeds.pooled * keep[:, None]
        return PromptEmbeds(embeds.hidden * keep[:, None, None], pooled)

    def embedding_width(self, encoder: int) -> int:
        """Width of the token embeddings of a text encoder (what a learned vector must have)."""
        return int(self.text_encoders[encoder].get_input_embeddings().weight.shape[1])

    def word_embeddings(self, text: str) -> tuple[Tensor, ...]:
        """Token embeddings of a text, one `[n, width]` per text encoder: a start for learned tokens.

        Raises:
            MooringError: INVALID_FIELD when the text has no tokens.
        """
        found: list[Tensor] = []
        for tokenizer, encoder in zip(self._prompt_tokenizers, self.text_encoders, strict=True):
            ids = tokenizer.tokenize(text, {}).ids
            if not ids:
                raise MooringError(Reason.INVALID_FIELD, "A learned token cannot start from an empty text.")
            table = encoder.get_input_embeddings().weight
            found.append(table[torch.tensor(ids, device=self.device)].detach().float().clone())
        return tuple(found)

    # ------------------------------------------------------------------ networks

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        embeds: PromptEmbeds,
        *,
        autocast: bool | None = None,
        row_wise: bool = False,
        unet: Callable[..., Any] | None = None,
    ) -> Tensor:
        """The UNet's raw output: noise or velocity, whichever the base predicts. Differentiable.

        Args:
            latents: `[B, C, H, W]`, already scaled by the scheduler.
            timesteps: `[B]` or a scalar.
            embeds: B rows.
            autocast: bfloat16 computation for this call; None takes the base's setting.
            row_wise: each row gets the bits it has in a batch of one; CPU only, slower (see `row_wise`).
            unet: a compiled form of the UNet to call instead.

        Returns:
            `[B, C, H, W]` in the dtype of `latents`.
        """
        started = time.perf_counter()
        batch, _, height, width = latents.shape
        conditions: dict[str, Tensor] | None = None
        if self.kind == "sdxl":
            assert embeds.pooled is not None
            conditions = {
                "text_embeds": embeds.pooled,
                "time_ids": self._size_condition(height, width).expand(batch, -1),
            }
        enabled = self.autocast if autocast is None else autocast
        by_row = self._row_wise.active() if row_wise else nullcontext()
        kernel = ATTENTION[self.attention]
        attention = nullcontext() if kernel is None else sdpa_kernel(kernel)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled), by_row, attention:
            output: Tensor = (self.unet if unet is None else unet)(
                latents.to(self.dtype),
                timesteps.expand(batch) if timesteps.ndim == 0 else timesteps,
                encoder_hidden_states=embeds.hidden,
                added_cond_kwargs=conditions,
                return_dict=False,
            )[0]
        if not torch.is_grad_enabled():
            self.stage("denoise", started)
        return output.to(latents.dtype)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents of pictures.

        Args:
            pixels: `[B, 3, h, w]` in [-1, 1].
            generator: samples the posterior of an AutoencoderKL; None takes its mode.

        Returns:
            `[B, C, H, W]` float32.
        """
        started = time.perf_counter()
        encoded = self.vae.encode(pixels.to(self.device, self.vae.dtype))
        if hasattr(encoded, "latent_dist"):
            posterior = encoded.latent_dist
            latents = posterior.mode() if generator is None else posterior.sample(generator)
        else:
            latents = encoded.latents
        shift, scale = self._latent_statistics(latents)
        self.stage("encode", started)
        scaled: Tensor = (latents - shift) * scale
        return scaled.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of latents, one at a time (so a picture's bits do not depend on its neighbours).

        Args:
            latents: `[B, C, H, W]`.

        Returns:
            uint8 `[B, h, w, 3]` on the CPU.
        """
        started = time.perf_counter()
        shift, scale = self._latent_statistics(latents)
        images: list[Tensor] = []
        for latent in latents.unsqueeze(1):
            decoded = self.vae.decode((latent / scale + shift).to(self.vae.dtype), return_dict=False)[0]
            unit = (decoded.float() * 0.5 + 0.5).clamp(0, 1)
            images.append((unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
        self.stage("decode", started)
        return torch.cat(images)

    # ------------------------------------------------------------------ diffusion

    def new_scheduler(self, name: str | None = None) -> Any:
        """A fresh diffusers scheduler on the directory's own configuration.

        `prediction_type`, betas, `timestep_spacing` and zero-SNR rescaling come from the directory.
        `clip_sample` defaults to off: diffusers' default (on) is meant for pixels and turns latents to noise.

        Args:
            name: one of `SAMPLERS`; None is "ddim".

        Raises:
            MooringError: INVALID_FIELD for an unknown name.
        """
        import diffusers

        config = {"clip_sample": False, **self.scheduler_config}
        kinds: dict[str, Any] = {
            "ddim": diffusers.DDIMScheduler,
            "euler": diffusers.EulerDiscreteScheduler,
            "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
            "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
        }
        chosen = name or SAMPLERS[0]
        if chosen not in kinds:
            message = f"There is no sampler “{chosen}”."
            remedy = f"Choose one of {', '.join(SAMPLERS)}."
            raise MooringError(
                Reason.INVALID_FIELD, message, remedy=remedy, fields=[FieldViolation("sampler", message)]
            )
        return kinds[chosen].from_config(config)

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε (DDPM, eq. 4); `[B, C, H, W]`, timesteps `[B]`."""
        signal, sigma = self._signal_and_noise(timesteps)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What `predict` is trained towards: ε, or v = √ᾱ_t·ε − √(1−ᾱ_t)·x₀ (Salimans & Ho, 2202.00512)."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._signal_and_noise(timesteps)
        return signal * noise - sigma * x0

    def to_eps(self, prediction: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """ε from the base's own kind of prediction; `[B, C, H, W]`, timesteps `[B]`."""
        if self.prediction_type == "epsilon":
            return prediction
        signal, sigma = self._signal_and_noise(timesteps)
        return signal * prediction + sigma * x_t

    # ------------------------------------------------------------------ inside

    def _size_condition(self, height: int, width: int) -> Tensor:
        """SDXL's time ids `[1, 6]`: original size, crop corner, target size, as the pipeline's own defaults.

        The native ones are kept: a copy from the host cannot be captured in a CUDA graph.
        """
        size = [height * self.vae_scale_factor, width * self.vae_scale_factor]
        if size != [self.native_size] * 2:
            return torch.tensor([[*size, 0, 0, *size]], device=self.device, dtype=self.dtype)
        if self._native_ids is None:
            self._native_ids = torch.tensor([[*size, 0, 0, *size]], device=self.device, dtype=self.dtype)
        return self._native_ids

    def _signal_and_noise(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alphas_cumprod[timesteps.to(self.device)].reshape(-1, 1, 1, 1)
        return alpha.sqrt(), (1 - alpha).sqrt()

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale between the VAE's latents and the UNet's (SDXL variants carry per-channel ones)."""
        config = self.vae.config
        scale = torch.tensor(float(config.scaling_factor), device=like.device, dtype=like.dtype)
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return torch.zeros((), device=like.device, dtype=like.dtype), scale
        shape = (1, -1, 1, 1)
        return like.new_tensor(mean).view(shape), scale / like.new_tensor(std).view(shape)

    @contextmanager
    def _learned_tokens(
        self, index: int, tokens: Sequence[Tokens], embeddings: LearnedEmbeddings | None
    ) -> Iterator[None]:
        places = [(row, at, name, k) for row, item in enumerate(tokens) for at, name, k in item.learned]
        if not places or embeddings is None:
            yield
            return
        row_index = torch.tensor([place[0] for place in places], device=self.device)
        position = torch.tensor(
            [place[1] + 1 for place in places], device=self.device
        )  # after the begin token
        vectors = torch.stack([embeddings.tokens[name][index][k] for _, _, name, k in places])
        self._learned[index] = (row_index, position, vectors.to(self.device))
        try:
            yield
        finally:
            self._learned[index] = None

    def _learned_hook(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def write(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            learned = self._learned[index]
            if learned is None:
                return None
            row_index, position, vectors = learned
            return output.index_put((row_index, position), vectors.to(output.dtype))

        return write

    def stage(self, name: str, started: float) -> None:
        """Tell `on_stage` of a stage that began at `started` of `time.perf_counter` and ends now."""
        if self.on_stage is not None:
            self.on_stage(name, time.perf_counter() - started)
