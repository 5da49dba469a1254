"""Adapters made elsewhere: every name finds its layer, every fault is named, diffusers draws the same."""

from __future__ import annotations

import json
import pickle
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from engine_helpers import drain, random_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mooring_server.engine.adapters import (
    LORA_FILE,
    AdapterWeights,
    LayerFactors,
    adaptable_layers,
    export_diffusers,
    to_safetensors,
)
from mooring_server.engine.formats import SourceFormat, convert
from mooring_server.engine.layer_names import layer_names
from mooring_server.engine.lora_settings import DIFFUSERS_METADATA
from mooring_server.engine.sampling import SampleRow, sample
from mooring_server.errors import MooringError, Reason
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load, save

KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
LIMIT = 2**24
PROMPT = "a photo of duck on grass"
TOLERANCE = 5e-5
"""Relative, on latents: PEFT multiplies in another order. Measured: 0 to 6.3e-6."""


def read(files, base, **options):
    return convert(files, base, max_bytes=LIMIT, **options)


def refused(files, base, **options) -> MooringError:
    with pytest.raises(MooringError) as caught:
        read(files, base, **options)
    assert caught.value.remedy
    return caught.value


def kohya(
    adapter, *, ldm=False, numbered=False, alpha=None, dtype=torch.float32, kernels=None
) -> dict[str, torch.Tensor]:
    """The adapter under kohya's names: dots as underscores, SDXL's UNet by its original blocks."""
    tensors = {}
    for path, factors in adapter.layers.items():
        component, _, module = path.partition(".")
        if component == "unet":
            name = "lora_unet_" + (sgm_name(module) if ldm else module)
        else:  # by the number of the encoder where there are two
            number = ("2" if component.endswith("_2") else "1") if numbered else ""
            name = f"lora_te{number}_text_model_{module}"
        name = name.replace(".", "_")
        A, B = factors.A.to(dtype), factors.B.to(dtype)
        if path in (kernels or {}):
            A, B = A.reshape(-1, *kernels[path]), B[:, :, None, None]
        tensors[f"{name}.lora_down.weight"] = A.contiguous()
        tensors[f"{name}.lora_up.weight"] = B.contiguous()
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha), dtype=dtype)
    return tensors


def sgm_name(path: str) -> str:
    """The original block numbers, written down for the tiny SDXL base (one layer per block) by hand."""
    for ours, theirs in (
        ("down_blocks.1.attentions.0", "input_blocks.3.1"),
        ("mid_block.attentions.0", "middle_block.1"),
        ("up_blocks.0.attentions.0", "output_blocks.0.1"),
        ("up_blocks.0.attentions.1", "output_blocks.1.1"),
    ):
        path = path.replace(ours, theirs)
    return path


def diffusers(adapter) -> dict[str, torch.Tensor]:
    return load(export_diffusers(adapter)[LORA_FILE])


def of_mixed_ranks(base) -> AdapterWeights:
    adapter = random_adapter(base, 4, rank=4)
    layers = {
        path: LayerFactors(f.A[: 1 + i % 4].clone(), f.B[:, : 1 + i % 4].clone())
        for i, (path, f) in enumerate(adapter.layers.items())
    }
    return AdapterWeights(base.digest, 4, layers)


def equal(found, expected) -> bool:
    assert found.layers.keys() == expected.layers.keys()
    return all(
        torch.equal(found.layers[path].A, factors.A) and torch.equal(found.layers[path].B, factors.B)
        for path, factors in expected.layers.items()
    )


# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("which", ["base", "base_sdxl"])
def test_our_export_comes_back_bit_for_bit(which, request):
    base = request.getfixturevalue(which)
    adapter = random_adapter(base, 1, targets="attention+ff", placeholder="<it>", vectors=2)
    files = export_diffusers(adapter)
    del files["README.txt"]
    made = read(files, base)
    assert made.weights.digest == adapter.digest
    assert made.format is SourceFormat.DIFFUSERS
    native = read({"it.safetensors": to_safetensors(adapter)}, base)
    assert (native.weights.digest, native.format) == (adapter.digest, SourceFormat.NATIVE)
    assert native.weights.metadata == {}  # what a file says of itself is not believed
    assert native.digest != made.digest


def test_kohya_files_fold_their_alpha(base):
    adapter = random_adapter(base, 2, rank=4)
    made = read({"a.safetensors": save(kohya(adapter, alpha=2))}, base)
    assert made.format is SourceFormat.KOHYA
    for path, factors in adapter.layers.items():
        assert torch.equal(made.weights.layers[path].A, factors.A)
        assert torch.equal(made.weights.layers[path].B, factors.B * 0.5)
    assert equal(read({"a.safetensors": save(kohya(adapter))}, base).weights, adapter)  # none: alpha = rank


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_float_is_read_as_it_is(base, dtype):
    adapter = random_adapter(base, 3)
    made = read({"a.safetensors": save(kohya(adapter, dtype=dtype, alpha=4))}, base).weights
    for path, factors in adapter.layers.items():
        assert made.layers[path].A.dtype is torch.float32
        assert torch.equal(made.layers[path].B, factors.B.to(dtype).float())


def test_layers_may_differ_in_rank(base, make_bank):
    mixed = of_mixed_ranks(base)
    made = read({"a.safetensors": save(diffusers(mixed))}, base).weights
    assert equal(made, mixed)
    assert made.rank == 4
    make_bank(base, rank=4).pack(made)


def test_sdxl_files_by_the_original_block_names(base_sdxl):
    adapter = random_adapter(base_sdxl, 5, targets="attention+ff")
    tensors = kohya(adapter, ldm=True, alpha=4)
    assert any("input_blocks_3_1_transformer_blocks_0_ff_net_0_proj" in key for key in tensors)
    assert equal(read({"a.safetensors": save(tensors)}, base_sdxl).weights, adapter)


OLD = {
    "lora": lambda path: (f"{path}.lora.down.weight", f"{path}.lora.up.weight"),
    "linear layer": lambda path: (
        f"{path}.lora_linear_layer.down.weight",
        f"{path}.lora_linear_layer.up.weight",
    ),
    "processor": lambda path: tuple(
        ".processor.".join(path.removesuffix(".0").rsplit(".", 1)) + f"_lora.{part}.weight"
        for part in ("down", "up")
    ),
    "no prefix": lambda path: tuple(
        f"{path.removeprefix('unet.')}.lora_{part}.weight" for part in "AB"
    ),
}  # fmt: skip


@pytest.mark.parametrize("style", OLD)
def test_names_of_older_diffusers(base, style):
    adapter = random_adapter(base, 6)
    tensors = {}
    for path, factors in adapter.layers.items():
        down, up = OLD[style](path)
        tensors |= {down: factors.A, up: factors.B}
    made = read({"a.safetensors": save(tensors)}, base)
    assert equal(made.weights, adapter)
    assert made.format is SourceFormat.DIFFUSERS


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("which", ["base", "base_sdxl"])
def test_every_name_leads_to_its_layer_and_no_other_name_does(which, request, data):
    names = layer_names(request.getfixturevalue(which))
    name = data.draw(st.sampled_from(sorted(names.known)))
    path = names.find(name)
    bare = path.split(".", 1)[1]
    spelled = [bare.replace(".", "_"), bare, bare.removesuffix(".0").rpartition(".")[2] + "_lora"]
    if "blocks_" not in name and "block_" not in name and "emb" not in name and "out_2" not in name:
        assert name.endswith(tuple(spelled))
    index = data.draw(st.integers(0, len(name) - 1))
    changed = name[:index] + data.draw(st.sampled_from("x_9.")) + name[index + 1 :]
    assert names.find(changed) in {None, path} or changed in names.known
    assert names.find(name + "_") is None


@pytest.mark.parametrize("which", ["base", "base_sdxl"])
def test_every_layer_can_be_reached_from_every_format(which, request):
    base = request.getfixturevalue(which)
    names = layer_names(base)
    every = set(names.kinds)
    for start in ("", "lora_", "base_model.model."):
        reached = {path for name, path in names.known.items() if name.startswith(start)}
        expected = every if start != "base_model.model." else {p for p in every if "text_encoder_2" not in p}
        assert reached == expected, start
    assert set(names.shapes) <= every
    closed = {path for path in every if names.why_not(path)}
    assert closed == ({"text_encoder_2.text_projection"} if which == "base_sdxl" else set())


# ---------------------------------------------------------------------------------------------- diffusers


def latents_of(kind, root, base, prompt=PROMPT, load_into=lambda _pipe: None):
    pipe = kind.from_pretrained(root, **({} if "XL" in kind.__name__ else {"safety_checker": None}))
    pipe.scheduler = base.new_scheduler()
    pipe.set_progress_bar_config(disable=True)
    load_into(pipe)
    return pipe(
        prompt,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(9),
        output_type="latent",
    ).images


def ours(base, bank, weights, monkeypatch, prompt=PROMPT):
    seen = []
    decode = base.decode
    monkeypatch.setattr(base, "decode", lambda latents: (seen.append(latents), decode(latents))[1])
    row = SampleRow(prompt, mix=[(bank.acquire(weights), 1.0)], seed=9, embeddings=weights.embeddings)
    drain(sample(base, bank, [row], steps=3, guidance_scale=3.0))
    monkeypatch.undo()
    return seen[0]


def close(found, expected, untouched):
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert (untouched - expected).abs().max() > 0.01  # the adapter does something


def peft_unet(pipe, *, alpha=6, rank=4, **config):
    """Put a random LoRA on a pipeline's UNet, as a training script does; returns the wrapped model."""
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    made = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False, **config)
    torch.manual_seed(7)
    pipe.unet.add_adapter(made)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.data, std=0.3)
    return made


KINDS = [
    ("base", "tiny_sd15", StableDiffusionPipeline),
    ("base_sdxl", "tiny_sdxl", StableDiffusionXLPipeline),
]


@pytest.mark.parametrize(("which", "root", "kind"), KINDS)
@pytest.mark.parametrize("settings_kept", [True, False], ids=["metadata", "no-metadata"])
def test_what_diffusers_saves_draws_the_same_here(
    which, root, kind, settings_kept, request, tmp_path, make_bank, monkeypatch
):
    base, root = request.getfixturevalue(which), request.getfixturevalue(root)
    pipe = kind.from_pretrained(root, **({} if which == "base_sdxl" else {"safety_checker": None}))
    alpha = 6 if settings_kept else 4
    config = peft_unet(pipe, alpha=alpha, rank_pattern={"to_k": 2}, alpha_pattern={"to_k": alpha / 2})
    metadata = {k: v for k, v in config.to_dict().items() if v is not None}
    metadata["target_modules"] = sorted(metadata["target_modules"])
    metadata = {key: value for key, value in metadata.items() if not hasattr(value, "value")}
    kind.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet, adapter_name="default"),
        unet_lora_adapter_metadata=metadata if settings_kept else None,
    )
    made = read({LORA_FILE: (tmp_path / LORA_FILE).read_bytes()}, base)
    assert made.format is SourceFormat.DIFFUSERS
    assert {factors.A.shape[0] for factors in made.weights.layers.values()} == {2, 4}
    bank = make_bank(base, targets="attention+ff")
    expected = latents_of(kind, root, base, load_into=lambda pipe: pipe.load_lora_weights(tmp_path))
    close(ours(base, bank, made.weights, monkeypatch), expected, latents_of(kind, root, base))


@pytest.mark.parametrize(("which", "root", "kind"), KINDS)
def test_diffusers_reads_a_kohya_file_the_same_way(
    which, root, kind, request, tmp_path, make_bank, monkeypatch
):
    base, root = request.getfixturevalue(which), request.getfixturevalue(root)
    adapter = random_adapter(base, 8)
    tensors = kohya(adapter, ldm=which == "base_sdxl", alpha=6)
    (tmp_path / "k.safetensors").write_bytes(save(tensors))
    made = read({"k.safetensors": (tmp_path / "k.safetensors").read_bytes()}, base)
    bank = make_bank(base)
    expected = latents_of(
        kind, root, base, load_into=lambda pipe: pipe.load_lora_weights(tmp_path, weight_name="k.safetensors")
    )
    close(ours(base, bank, made.weights, monkeypatch), expected, latents_of(kind, root, base))


@pytest.mark.parametrize(("which", "root", "kind"), KINDS)
def test_diffusers_reads_our_export_of_mixed_ranks(
    which, root, kind, request, tmp_path, make_bank, monkeypatch
):
    base, root = request.getfixturevalue(which), request.getfixturevalue(root)
    mixed = of_mixed_ranks(base)
    (tmp_path / LORA_FILE).write_bytes(export_diffusers(mixed)[LORA_FILE])
    bank = make_bank(base)
    expected = latents_of(kind, root, base, load_into=lambda pipe: pipe.load_lora_weights(tmp_path))
    close(ours(base, bank, mixed, monkeypatch), expected, latents_of(kind, root, base))


@pytest.mark.parametrize(("which", "root", "kind"), KINDS)
@pytest.mark.parametrize("foreign", [True, False], ids=["kohya", "export"])
@pytest.mark.parametrize("targets", ["attention+ff+text", "all"])
def test_layers_of_text_encoders_and_convolutions_act_as_in_diffusers(
    which, root, kind, foreign, targets, request, tmp_path, make_bank, monkeypatch
):
    base, root = request.getfixturevalue(which), request.getfixturevalue(root)
    adapter = random_adapter(base, 8, targets=targets, size=0.1)
    inner = adaptable_layers(base, "attention+ff").keys()
    assert len(adapter.layers) > len(inner)
    if foreign:
        # diffusers takes kohya's name of this layer apart wrongly, and leaves it out with a warning
        read_there = {n: f for n, f in adapter.layers.items() if not n.startswith("unet.add_embedding")}
        adapter = AdapterWeights(base.digest, 4, read_there)
        kernels = {
            n: m.weight.shape[1:] for n, m in adaptable_layers(base, "all").items() if m.weight.ndim == 4
        }
        two = which == "base_sdxl"
        ldm = two and targets != "all"  # diffusers reads the original names of transformer blocks only
        data = save(kohya(adapter, ldm=ldm, numbered=two, alpha=4, kernels=kernels))
    else:
        data = export_diffusers(adapter, base)[LORA_FILE]
    (tmp_path / LORA_FILE).write_bytes(data)
    made = read({LORA_FILE: data}, base).weights
    assert equal(made, adapter)
    bank = make_bank(base, targets=targets)
    expected = latents_of(
        kind, root, base, load_into=lambda pipe: pipe.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    )
    drawn = ours(base, bank, made, monkeypatch)
    part = {path: factors for path, factors in made.layers.items() if path in inner}
    close(drawn, expected, ours(base, bank, AdapterWeights(base.digest, 4, part), monkeypatch))
    nothing = AdapterWeights(base.digest, 4, {})
    assert torch.equal(latents_of(kind, root, base), ours(base, bank, nothing, monkeypatch))


def test_convolutions_of_one_row_change_no_other(base, make_bank):
    bank = make_bank(base, slots=4, targets="all")
    first, second = (
        bank.acquire(random_adapter(base, 1, targets="all", size=0.1)),
        bank.acquire(random_adapter(base, 2)),
    )
    generator = torch.Generator().manual_seed(0)
    latents, timesteps = torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([900, 500, 20])
    embeds = base.encode_prompt(["a duck"] * 3)
    mixes = [[(first, 1.0)], [(second, 1.0)], []]

    def predict(rows):
        with torch.no_grad(), bank.mixed([mixes[row] for row in rows]):
            return base.predict(latents[rows], timesteps[rows], embeds.rows(rows), row_wise=True)

    together = predict([0, 1, 2])
    for row in range(3):
        assert torch.equal(together[row], predict([row])[0])
    assert len({tuple(row.flatten().tolist()[:4]) for row in together}) == 3
    bank.release(first)
    bank.load(first, random_adapter(base, 3))  # the slot's next adapter has no convolutions
    assert not bank._convolved


def test_a_bank_without_text_layers_says_what_it_would_take(base, make_bank):
    adapter = random_adapter(base, 1, targets="attention+ff+text")
    with pytest.raises(MooringError, match=r"text_encoder.*MOORING_TARGETS=attention\+ff\+text") as caught:
        make_bank(base, targets="attention+ff").require_fits(adapter)
    assert caught.value.reason is Reason.ADAPTER_KEYS_UNMATCHED


def test_settings_of_each_text_encoder_are_its_own(base_sdxl):
    path = "text_encoder_2.encoder.layers.0.self_attn.q_proj"
    unet = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    adapter = random_adapter(base_sdxl, 1, targets="attention+ff+text")
    adapter = AdapterWeights(base_sdxl.digest, 4, {name: adapter.layers[name] for name in (path, unet)})
    settings = {"unet.r": 4, "unet.lora_alpha": 2, "text_encoder_2.r": 4, "text_encoder_2.lora_alpha": 8}
    settings |= {"text_encoder_2.alpha_pattern": {"text_model.encoder.layers.0.self_attn.q_proj": 12}}
    data = save(diffusers(adapter), metadata={DIFFUSERS_METADATA: json.dumps(settings)})
    made = read({"a.safetensors": data}, base_sdxl).weights
    for name, scale in ((path, 3.0), (unet, 0.5)):
        assert torch.equal(made.layers[name].B, adapter.layers[name].B * scale)


@pytest.mark.parametrize("stabilised", [False, True])
def test_a_peft_folder_draws_what_its_model_draws(
    base, tiny_sd15, tmp_path, make_bank, monkeypatch, stabilised
):
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "attn2.to_v"], init_lora_weights=False,
        rank_pattern={"attn2.to_q": 2}, alpha_pattern={"attn2.to_q": 5}, use_rslora=stabilised,
    )  # fmt: skip
    torch.manual_seed(7)

    def wrap(pipe):
        model = get_peft_model(pipe.unet, config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter.data, std=0.3)
        model.save_pretrained(tmp_path)
        pipe.unet = model.base_model.model

    expected = latents_of(StableDiffusionPipeline, tiny_sd15, base, load_into=wrap)
    files = {
        name: (tmp_path / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")
    }
    made = read(files, base)
    assert made.format is SourceFormat.PEFT
    found = ours(base, make_bank(base), made.weights, monkeypatch)
    close(found, expected, latents_of(StableDiffusionPipeline, tiny_sd15, base))
    alone = refused({"adapter_model.safetensors": files["adapter_model.safetensors"]}, base)
    assert "adapter_config.json" in alone.message


# ---------------------------------------------------------------------------------------------- embeddings


def test_embeddings_come_alone_or_with_factors(base, base_sdxl):
    vector = torch.randn(24)
    made = read({"learned_embeds.safetensors": save({"<it>": vector})}, base)
    assert (made.format, made.weights.rank, made.weights.layers) == (SourceFormat.TEXTUAL_INVERSION, 0, {})
    assert torch.equal(made.weights.embeddings.tokens["<it>"][0], vector[None])
    renamed = read({"x.safetensors": save({"<it>": vector})}, base, placeholder="<rex>").weights
    assert renamed.embeddings.sizes == {"<rex>": 1}
    named = read({"x.safetensors": save({"emb_params": vector[None]})}, base, placeholder="<rex>").weights
    assert named.embeddings.sizes == {"<rex>": 1}
    both = {"clip_l": torch.randn(3, 24), "clip_g": torch.randn(3, 16)}
    made = read({"x.safetensors": save(both)}, base_sdxl, placeholder="<rex>").weights
    assert [tuple(v.shape) for v in made.embeddings.tokens["<rex>"]] == [(3, 24), (3, 16)]
    files = {
        "a.safetensors": save(diffusers(random_adapter(base, 1))),
        "b.safetensors": save({"<it>": vector}),
    }
    assert read(files, base).weights.embeddings.sizes == {"<it>": 1}


@pytest.mark.parametrize(
    ("which", "tensors", "placeholder", "says"),
    [
        ("base", {"<it>": torch.ones(1, 23)}, "", r"\[n, 24\]"),
        ("base", {"<it>": torch.ones(1, 24, dtype=torch.int8)}, "", "I8"),
        ("base", {"<it>": torch.ones(1, 1, 24)}, "", "expected"),
        ("base", {"emb_params": torch.ones(1, 24)}, "", "does not say which word"),
        ("base", {"two words": torch.ones(1, 24)}, "", "no blanks"),
        ("base", {"clip_g": torch.ones(1, 16)}, "<it>", "at most 1 text encoder"),
        ("base_sdxl", {"clip_l": torch.ones(1, 24)}, "<it>", "<it> lacks"),
        ("base_sdxl", {"clip_l": torch.ones(1, 24), "clip_g": torch.ones(2, 16)}, "<it>", "<it> lacks"),
    ],
)  # fmt: skip
def test_embeddings_that_do_not_fit_are_refused(which, tensors, placeholder, says, request):
    error = refused({"e.safetensors": save(tensors)}, request.getfixturevalue(which), placeholder=placeholder)
    assert error.reason is Reason.ADAPTER_KEYS_UNMATCHED
    assert re.search(says, error.message)


def test_embeddings_of_several_tokens_need_one_of_their_names(base):
    files = {f"{name}.safetensors": save({f"<{name}>": torch.ones(1, 24)}) for name in ("a", "b")}
    assert read(files, base, placeholder="<b>").weights.embeddings.sizes == {"<a>": 1, "<b>": 1}
    assert "none of them called <c>" in refused(files, base, placeholder="<c>").message
    twice = {
        "a.safetensors": save({"<a>": torch.ones(1, 24)}),
        "b.safetensors": save({"<a>": torch.ones(1, 24)}),
    }
    assert "Two files" in refused(twice, base).message
    nan = refused({"a.safetensors": save({"<a>": torch.full((1, 24), float("nan"))})}, base)
    assert nan.reason is Reason.ADAPTER_NOT_FINITE


# ---------------------------------------------------------------------------------------------- refusals

UNMATCHED, UNSUPPORTED = Reason.ADAPTER_KEYS_UNMATCHED, Reason.ADAPTER_NOT_SUPPORTED
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
PROJ = "lora_unet_mid_block_attentions_0_proj_in"
TE = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "reason", "says"),
    [
        ({"unet.new.to_q.lora_A.weight": torch.ones(4, 8)}, UNMATCHED, "1 of 65 tensors.*unet.new.to_q"),
        ({f"{KEY}.weight": torch.ones(4, 8)}, UNMATCHED, f"{KEY}.weight"),
        ({f"{KEY}.lora_B.bias": torch.ones(32)}, UNMATCHED, "lora_B.bias"),
        ({f"{KEY}.lora.down.weight": torch.ones(4, 32)}, UNMATCHED, "others are for too"),
        ({f"{KEY}.lora_B.weight": None}, UNMATCHED, f"missing.*{KEY}"),
        ({f"{KEY}.lora_A.weight": torch.ones(5, 32)}, UNMATCHED, "differ in rank"),
        ({f"{KEY}.lora_A.weight": torch.ones(4, 31)}, UNMATCHED, r"expected \[rank, 32\]"),
        ({f"{KEY}.lora_B.weight": torch.ones(31, 4)}, UNMATCHED, r"expected \[32, rank\]"),
        ({f"{KEY}.lora_A.weight": torch.ones(4, 32, 1, 1)}, UNMATCHED, "expected"),
        ({f"{KEY}.lora_A.weight": torch.ones(4)}, UNMATCHED, "expected"),
        ({f"{KEY}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}, UNMATCHED, "I8"),
        ({f"{KEY}.lora_A.weight": torch.ones(4, 32, dtype=torch.float64)}, UNMATCHED, "F64"),
        ({f"{KEY}.alpha": torch.ones(2)}, UNMATCHED, "expected one number"),
        ({f"{KEY}.alpha": torch.tensor(0.0)}, UNMATCHED, "do nothing"),
        ({f"{KEY}.alpha": torch.tensor(float("inf"))}, Reason.ADAPTER_NOT_FINITE, "alpha"),
        ({f"{KEY}.alpha": torch.tensor(3e38), f"{KEY}.lora_B.weight": torch.ones(32, 4) * 1e9},
         Reason.ADAPTER_NOT_FINITE, KEY),
        ({f"{KEY}.lora_A.weight": torch.full((4, 32), float("nan"))}, Reason.ADAPTER_NOT_FINITE, KEY),
        ({f"{KEY}.dora_scale": torch.ones(32)}, UNSUPPORTED, "no plain LoRA.*dora_scale"),
        ({f"{KEY}.hada_w1_a": torch.ones(32, 4)}, UNSUPPORTED, "hada_w1_a"),
        ({f"{CONV}.lora_down.weight": torch.ones(4, 16, 3, 3)}, UNMATCHED, "missing.*resnets.0.conv1"),
        ({f"{CONV}.lora_down.weight": torch.ones(4, 16 * 9)}, UNMATCHED, r"expected \[rank, 16, 3, 3\]"),
        ({f"{CONV}.lora_up.weight": torch.ones(16, 4)}, UNMATCHED, r"expected \[16, rank, 1, 1\]"),
        ({f"{CONV}.lora_mid.weight": torch.ones(4, 4, 3, 3)}, UNSUPPORTED, "lora_mid"),
        ({f"{PROJ}.lora_down.weight": torch.ones(4, 32)}, UNMATCHED, r"expected \[rank, 32, 1, 1\]"),
        ({f"{TE}.lora_A.weight": torch.ones(4, 23), f"{TE}.lora_B.weight": torch.ones(24, 4)}, UNMATCHED,
         r"1 tensors do not fit.*expected \[rank, 24\]"),
        ({"unet.time_embedding.linear_1.lora_A.weight": torch.ones(4, 16)}, UNMATCHED, "missing.*time_emb"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_by_name(base, change, reason, says):
    tensors = diffusers(random_adapter(base, 1)) | change
    tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    error = refused({"a.safetensors": save(tensors)}, base)
    assert error.reason is reason
    assert re.search(says, error.message), error.message


def test_many_unmatched_keys_are_named_and_counted(base):
    tensors = {f"unet.stranger{k}.lora_A.weight": torch.ones(4, 8) for k in range(9)}
    error = refused({"a.safetensors": save(tensors)}, base)
    assert "9 of 9 tensors" in error.message
    assert "stranger0" in error.message
    assert "and 4 more" in error.message
    assert error.metadata["count"] == "9"


def test_an_adapter_of_another_architecture_is_said_to_be_one(base, base_sdxl):
    tensors = diffusers(random_adapter(base, 1))
    error = refused({"a.safetensors": save(tensors)}, base_sdxl)
    assert error.reason is UNMATCHED
    assert "have 24 numbers (another base) and this base's 40" in error.message


def test_limits_hold_before_anything_is_read(base, monkeypatch):
    monkeypatch.setattr("safetensors.torch.load", lambda _data: pytest.fail("tensors were read"))
    half = save(kohya(random_adapter(base, 1), dtype=torch.float16))
    with pytest.raises(MooringError) as caught:
        convert({"a.safetensors": half}, base, max_bytes=len(half) - 1)
    assert caught.value.reason is Reason.ADAPTER_TOO_LARGE
    with pytest.raises(MooringError) as caught:  # twice the size as float32
        convert({"a.safetensors": half}, base, max_bytes=len(half) + 1)
    assert caught.value.reason is Reason.ADAPTER_TOO_LARGE
    assert refused({"a.safetensors": half}, base, max_rank=3).reason is Reason.ADAPTER_RANK_TOO_LARGE
    assert refused({"a.safetensors": half[:-1]}, base).reason is UNMATCHED
    assert "declares" in refused({"a.safetensors": half[:-1]}, base).message


def test_pickles_are_never_opened(base, tmp_path):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("the pickle was opened",)

    torch.save({"a": torch.ones(2)}, tmp_path / "new.bin")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name, data in {
        "a.safetensors": (tmp_path / "new.bin").read_bytes(),
        "b.safetensors": (tmp_path / "old.bin").read_bytes(),
        "c.safetensors": pickle.dumps(Trap()),
        "d.ckpt": b"nothing that is known",
    }.items():
        error = refused({name: data}, base)
        assert error.reason is UNSUPPORTED
        assert "save_file(torch.load(" in error.remedy
    good = save(diffusers(random_adapter(base, 1)))
    padded = (0x280 - int.from_bytes(good[:8], "little")) % 0x10000 + int.from_bytes(good[:8], "little")
    header = good[8 : 8 + int.from_bytes(good[:8], "little")].ljust(padded)
    same = padded.to_bytes(8, "little") + header + good[8 + int.from_bytes(good[:8], "little") :]
    assert same[:2] == b"\x80\x02"  # begins as a pickle does, and is none
    assert read({"a.bin": same}, base).weights.rank == 4


def test_native_files_of_another_base_and_mixtures_are_refused(base, base_v):
    native = to_safetensors(random_adapter(base, 1))
    assert refused({"a.safetensors": native}, base_v).reason is Reason.BASE_DIGEST_MISMATCH
    other = save(diffusers(random_adapter(base, 1)))
    assert "Several files" in refused({"a.safetensors": native, "b.safetensors": other}, base).message
    embeds = save({"<it>": torch.ones(1, 24)})
    assert "Send it alone" in refused({"a.safetensors": native, "b.safetensors": embeds}, base).remedy
    assert "no file" in refused({}, base).message
    assert "alone" in refused({"adapter_config.json": b"{}"}, base).message
    assert "9 files" in refused({f"{k}": b"" for k in range(9)}, base).message
    assert "no tensors" in refused({"a.safetensors": save({})}, base).message
    assert "no use" in refused({"a.safetensors": other, "adapter_config.json": b"{}"}, base).message


PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


@pytest.mark.parametrize(
    ("config", "reason", "says"),
    [
        (b"[", UNMATCHED, "no usable JSON"),
        (b"[" * 100_000, UNMATCHED, "no usable JSON"),
        (b"[]", UNMATCHED, "no JSON object"),
        (b" " * (2**20 + 1), UNMATCHED, "too large"),
        ({}, UNMATCHED, "lora_alpha"),
        (PLAIN | {"lora_alpha": "8"}, UNMATCHED, "lora_alpha"),
        (PLAIN | {"lora_alpha": True}, UNMATCHED, "lora_alpha"),
        (PLAIN | {"lora_alpha": 0}, UNMATCHED, "positive"),
        (PLAIN | {"lora_alpha": 10**400}, UNMATCHED, "positive"),
        (PLAIN | {"r": 10**400}, UNMATCHED, "positive"),
        (PLAIN | {"r": 8}, UNMATCHED, "rank 4, declared 8"),
        (PLAIN | {"rank_pattern": {"attn1.to_q": 2}}, UNMATCHED, "declared 2"),
        (PLAIN | {"rank_pattern": []}, UNMATCHED, None),
        (PLAIN | {"rank_pattern": [1]}, UNMATCHED, "no object"),
        (PLAIN | {"alpha_pattern": {"(a+)+$": 2}}, UNSUPPORTED, "alpha_pattern"),
        (PLAIN | {"peft_type": "LOHA"}, UNSUPPORTED, "LOHA"),
        (PLAIN | {"use_dora": True}, UNSUPPORTED, "use_dora"),
        (PLAIN | {"bias": "all"}, UNSUPPORTED, "bias"),
        (PLAIN | {"modules_to_save": ["x"]}, UNSUPPORTED, "modules_to_save"),
        (PLAIN | {"init_lora_weights": "pissa_niter_4"}, UNSUPPORTED, "pissa"),
    ],
)  # fmt: skip
def test_peft_settings_that_change_the_update_are_refused(base, config, reason, says):
    adapter = random_adapter(base, 1)
    tensors = {key.replace("unet.", "base_model.model."): value for key, value in diffusers(adapter).items()}
    data = config if isinstance(config, bytes) else json.dumps(config).encode()
    files = {"adapter_model.safetensors": save(tensors), "adapter_config.json": data}
    if says is None:
        assert read(files, base).weights.rank == 4
        return
    error = refused(files, base)
    assert error.reason is reason
    assert says in error.message


def test_alpha_is_given_once(base):
    tensors = diffusers(random_adapter(base, 1)) | {f"{KEY}.alpha": torch.tensor(2.0)}
    settings_ = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 4})}
    assert (
        "as a tensor and in the settings"
        in refused({"a.safetensors": save(tensors, settings_)}, base).message
    )
    damaged = {"lora_adapter_metadata": "["}
    assert (
        "damaged"
        in refused({"a.safetensors": save(diffusers(random_adapter(base, 1)), damaged)}, base).message
    )


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_refused_and_nothing_else(base, data):
    good = save(kohya(random_adapter(base, 1, rank=1), alpha=1))
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 2000) | st.integers(0, len(good) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(good)) | st.just(len(good)))]
    try:
        read({"a.safetensors": bytes(damaged)}, base)
    except MooringError as error:
        assert error.reason in {UNMATCHED, UNSUPPORTED, Reason.ADAPTER_NOT_FINITE}  # noqa: PT017
