"""Loading, prompts and the diffusion algebra of base models of each layout."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from engine_helpers import drain
from mooring_server.engine.adapters import LearnedEmbeddings
from mooring_server.engine.base import WORDS_FILE, load_base
from mooring_server.engine.model import PromptEmbeds
from mooring_server.engine.sampling import SampleRow, sample
from mooring_server.errors import MooringError, Reason
from tiny_bases import save_tiny_sd


def test_what_the_directory_says_is_what_the_base_reports(base, base_v, base_sdxl):
    assert (base.kind, base.latent_channels, base.prediction_type) == ("sd", 4, "epsilon")
    assert (base_v.kind, base_v.latent_channels, base_v.prediction_type) == ("sd", 6, "v_prediction")
    assert (base_sdxl.kind, len(base_sdxl.text_encoders)) == ("sdxl", 2)
    for model in (base, base_v, base_sdxl):
        assert (model.native_size, model.vae_scale_factor, model.max_prompt_tokens) == (32, 4, 14)
        assert model.alphas_cumprod.shape == (1000,)
        assert all(not p.requires_grad for module in model.modules().values() for p in module.parameters())
    assert base_v.new_scheduler().config.timestep_spacing == "trailing"


def test_a_deeper_vae_is_taken_as_it_says(tiny_sd_deep, make_bank):
    model = load_base(tiny_sd_deep, threads=1)
    assert (model.native_size, model.vae_scale_factor, model.latent_channels) == (64, 8, 16)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = model.encode_images(pixels)
    assert latents.shape == (2, 16, 8, 8)
    assert model.decode(latents).shape == (2, 64, 64, 3)
    bank = make_bank(model, slots=2, rank=2)
    pictures = drain(sample(model, bank, [SampleRow("a duck")], steps=2, guidance_scale=3.0))
    assert pictures.shape == (1, 64, 64, 3)


def test_the_digest_is_the_contents_and_nothing_else(tiny_sd15, base, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_sd15, copy)
    (copy / "notes.md").write_text("not part of the base")
    assert load_base(copy).digest == base.digest
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.013"))
    assert load_base(copy).digest != base.digest


def test_fp16_files_are_computed_with_in_float32(tiny_sd15, base, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "half"
    shutil.copytree(tiny_sd15, copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(weights).items()}
    weights.unlink()
    save_file(tensors, weights.with_name("diffusion_pytorch_model.fp16.safetensors"), {"format": "pt"})
    half = load_base(copy)
    assert half.dtype == torch.float32
    assert torch.allclose(half.unet.conv_in.weight, base.unet.conv_in.weight, atol=1e-3)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda root: shutil.rmtree(root / "vae"), "lacks the folders vae"),
        (lambda root: (root / "model_index.json").write_text("{}"), "neither SD1.x/2.x nor SDXL"),
        (lambda root: (root / "model_index.json").write_text("{"), "cannot be read as JSON"),
        (lambda root: _edit(root / "vae", _class_name="AutoencoderDC"), "AutoencoderDC are not supported"),
        (
            lambda root: (root / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"garbage!" * 9),
            "cannot be loaded",
        ),
        (
            lambda root: [file.unlink() for file in (root / "unet").glob("*.safetensors")],
            "cannot be loaded",
        ),
        (lambda root: _edit(root / "scheduler", "scheduler_config.json", prediction_type="sample"), "sample"),
    ],
)
def test_an_unusable_directory_says_why(tiny_sd15, tmp_path, damage, says):
    root = tmp_path / "base"
    shutil.copytree(tiny_sd15, root)
    damage(root)
    with pytest.raises(MooringError, match=says) as caught:
        load_base(root)
    assert caught.value.reason is Reason.BASE_NOT_USABLE
    assert "save_pretrained" in caught.value.remedy


def _edit(folder, name="config.json", **changes):
    document = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**document, **changes}))


def test_a_missing_directory_is_named():
    with pytest.raises(MooringError, match="no directory /nowhere/at/all") as caught:
        load_base("/nowhere/at/all")
    assert caught.value.reason is Reason.BASE_NOT_USABLE


def test_a_hub_id_without_a_hub_is_an_error_that_says_so(monkeypatch):
    from diffusers import DiffusionPipeline

    def unreachable(*_args, **_options):
        raise OSError("cannot reach the hub")

    monkeypatch.setattr(DiffusionPipeline, "download", unreachable)
    with pytest.raises(MooringError, match="no hub delivered it: cannot reach the hub") as caught:
        load_base("some/model")
    assert caught.value.reason is Reason.BASE_NOT_USABLE


def test_a_hub_id_is_loaded_from_where_the_hub_put_it(monkeypatch, tiny_sd15, base):
    from diffusers import DiffusionPipeline

    monkeypatch.setattr(DiffusionPipeline, "download", lambda *_args, **_options: str(tiny_sd15))
    assert load_base("some/model").digest == base.digest


def test_a_prompt_that_does_not_fit_says_what_is_cut(base, base_sdxl):
    prompt = "a photo of a big red duck on the grass in the forest with a small blue toy robot"
    for model in (base, base_sdxl):
        with pytest.raises(MooringError, match="“a small blue toy robot”") as caught:
            model.encode_prompt([prompt])
        assert caught.value.reason is Reason.PROMPT_TOO_LONG
        assert caught.value.metadata == {"tokens": "19", "limit": "14", "cut": "a small blue toy robot"}
        assert caught.value.fields[0].field == "prompt"
    check = base.check_prompt("a duck")
    assert (check.tokens, check.limit, check.cut, check.unknown_words) == (2, 14, "", [])


def test_words_outside_the_trained_ones_are_reported(tiny_sd15, tmp_path):
    root = tmp_path / "base"
    shutil.copytree(tiny_sd15, root)
    (root / WORDS_FILE).write_text(json.dumps(["a", "Duck", "red"]))
    worded = load_base(root)
    learned = LearnedEmbeddings({"<it>": (torch.zeros(1, 24),)})
    assert worded.check_prompt("a Duck on <it>", learned).unknown_words == ["on"]
    assert worded.check_prompt("a red-duck, a red-cat", learned).unknown_words == ["red-cat"]
    assert worded.digest != load_base(tiny_sd15).digest, "the list is part of the base"


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1]", '"a duck"'])
def test_a_broken_list_of_words_is_refused(tiny_sd15, tmp_path, content):
    root = tmp_path / "base"
    shutil.copytree(tiny_sd15, root)
    (root / WORDS_FILE).write_text(content)
    with pytest.raises(MooringError, match=WORDS_FILE) as caught:
        load_base(root)
    assert caught.value.reason is Reason.BASE_NOT_USABLE


def test_learned_tokens_act_at_their_place_and_leave_no_trace(base):
    before = base.fingerprint()
    duck = base.word_embeddings("duck")
    assert duck[0].shape == (1, 24)
    plain = base.encode_prompt(["a duck on grass"]).hidden
    learned = base.encode_prompt(["a <it> on grass"], LearnedEmbeddings({"<it>": duck})).hidden
    assert torch.equal(plain, learned)
    other = base.encode_prompt(["a <it> on grass"], LearnedEmbeddings({"<it>": (duck[0] + 1,)})).hidden
    assert not torch.allclose(plain[0, 2:], other[0, 2:])
    assert torch.equal(plain[0, :2], other[0, :2])  # causal: what stands before the token is untouched
    assert torch.equal(base.encode_prompt(["a duck on grass"]).hidden, plain)
    assert base.fingerprint() == before


def test_rows_of_one_batch_may_use_the_same_placeholder_or_none(base):
    learned = LearnedEmbeddings({"<it>": (torch.randn(2, 24, generator=torch.Generator().manual_seed(0)),)})
    batch = base.encode_prompt(["a <it>", "a duck", "red <it> and <it>"], learned).hidden
    alone = [base.encode_prompt([p], learned).hidden for p in ("a <it>", "a duck", "red <it> and <it>")]
    assert torch.allclose(batch, torch.cat(alone), atol=1e-5)


def test_gradients_reach_learned_tokens_and_nothing_else(base, base_sdxl):
    for model in (base, base_sdxl):
        vectors = tuple(v.requires_grad_() for v in model.word_embeddings("duck"))
        embeds = model.encode_prompt(["a <it>"], LearnedEmbeddings({"<it>": vectors}))
        loss = embeds.hidden.square().sum()
        if embeds.pooled is not None:
            loss = loss + embeds.pooled.square().sum()
        loss.backward()
        assert all(v.grad is not None and v.grad.abs().sum() > 0 for v in vectors)
        assert all(p.grad is None for module in model.modules().values() for p in module.parameters())


def test_pooled_embeddings_are_read_at_the_end_of_text_also_with_a_placeholder(base_sdxl):
    embeddings = LearnedEmbeddings({"<it>": base_sdxl.word_embeddings("duck")})
    learned = base_sdxl.encode_prompt(["a <it> on grass"], embeddings)
    plain = base_sdxl.encode_prompt(["a duck on grass"])
    assert torch.equal(learned.pooled, plain.pooled)


def test_an_empty_negative_prompt_is_zeros_for_sdxl_only(base, base_sdxl):
    mixed = base_sdxl.encode_negative(["", "a duck"])
    assert not mixed.hidden[0].any()
    assert not mixed.pooled[0].any()
    assert torch.allclose(mixed.hidden[1:], base_sdxl.encode_prompt(["a duck"]).hidden, atol=1e-5)
    assert torch.equal(base.encode_negative([""]).hidden, base.encode_prompt([""]).hidden)


def test_prompt_embeds_rows_and_cat():
    embeds = PromptEmbeds(torch.arange(6.0).reshape(3, 1, 2), torch.arange(3.0).reshape(3, 1))
    chosen = embeds.rows([2, 0, 2])
    assert chosen.hidden[:, 0, 0].tolist() == [4.0, 0.0, 4.0]
    assert chosen.pooled[:, 0].tolist() == [2.0, 0.0, 2.0]
    assert len(PromptEmbeds.cat([chosen, embeds.rows(slice(1, 2))])) == 4


@pytest.mark.parametrize("which", ["base", "base_v"])
def test_targets_and_eps_invert_the_noising(which, request):
    model = request.getfixturevalue(which)
    generator = torch.Generator().manual_seed(3)
    x0, noise = torch.randn(2, 5, 6, 8, 8, generator=generator)
    timesteps = torch.tensor([0, 10, 300, 700, 999])
    x_t = model.add_noise(x0, noise, timesteps)
    scheduler = model.new_scheduler()
    assert torch.allclose(x_t, scheduler.add_noise(x0, noise, timesteps), atol=1e-6)
    target = model.target(x0, noise, timesteps)
    if model.prediction_type == "v_prediction":
        assert torch.allclose(target, scheduler.get_velocity(x0, noise, timesteps), atol=1e-6)
    assert torch.allclose(model.to_eps(target, x_t, timesteps), noise, atol=1e-5)


@pytest.mark.parametrize("which", ["base", "base_v", "base_sdxl"])
def test_latents_of_a_picture_are_the_vaes_scaled_ones(which, request):
    model = request.getfixturevalue(which)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = model.encode_images(pixels)
    assert latents.shape == (2, model.latent_channels, 8, 8)
    encoded = model.vae.encode(pixels)
    raw = encoded.latents if which == "base_v" else encoded.latent_dist.mode()
    assert torch.allclose(latents, raw * model.vae.config.scaling_factor)
    image = model.decode(latents)
    assert (image.shape, image.dtype) == ((2, 32, 32, 3), torch.uint8)
    assert torch.equal(model.decode(latents[1:])[0], image[1])


def test_only_known_samplers_are_made(base):
    with pytest.raises(MooringError, match="no sampler “plms”") as caught:
        base.new_scheduler("plms")
    assert caught.value.reason is Reason.INVALID_FIELD


def test_clip_sample_is_off_unless_the_directory_asks_for_it(tmp_path):
    root = save_tiny_sd(tmp_path)
    path = root / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    del config["clip_sample"]
    path.write_text(json.dumps(config))
    assert load_base(root).new_scheduler().config.clip_sample is False


def test_autocast_is_off_by_default_and_close_when_on(base):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    embeds = base.encode_prompt(["a duck", "a car"])
    exact = base.predict(latents, torch.tensor([500, 10]), embeds)
    rough = base.predict(latents, torch.tensor([500, 10]), embeds, autocast=True)
    assert rough.dtype == exact.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1 * exact.abs().max()
    assert torch.equal(base.predict(latents, torch.tensor([500, 10]), embeds), exact)
