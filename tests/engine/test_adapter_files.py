"""Adapter files: exact there and back, strict on the way in, usable by diffusers on the way out."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from engine_helpers import drain, random_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mooring_server.engine.adapters import (
    AdapterWeights,
    LayerFactors,
    LearnedEmbeddings,
    export_diffusers,
    from_safetensors,
    to_safetensors,
)
from mooring_server.engine.sampling import SampleRow, sample
from mooring_server.errors import MooringError, Reason
from safetensors.torch import load, save

KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def rewritten(data: bytes, *, tensors=None, **header) -> bytes:
    """The file with some tensors and header fields replaced (None removes)."""
    length = int.from_bytes(data[:8], "little")
    ours = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["mooring"])
    every = {**load(data), **(tensors or {})}
    ours = {key: value for key, value in {**ours, **header}.items() if value is not None}
    return save(
        {key: tensor for key, tensor in every.items() if tensor is not None},
        metadata={"mooring": json.dumps(ours)},
    )


@pytest.mark.parametrize("which", ["base", "base_sdxl"])
def test_a_file_is_read_back_exactly(which, request):
    base = request.getfixturevalue(which)
    adapter = random_adapter(base, 1, placeholder="<it>", vectors=2)
    data = to_safetensors(adapter)
    assert to_safetensors(adapter) == data
    found = from_safetensors(data, base)
    assert (found.digest, found.rank, found.base_digest) == (adapter.digest, 4, base.digest)
    assert found.metadata == {"seed": "1"}
    assert found.embeddings.sizes == {"<it>": 2}
    for name, factors in adapter.layers.items():
        assert torch.equal(found.layers[name].A, factors.A)
        assert torch.equal(found.layers[name].B, factors.B)


def test_the_text_digest_covers_what_encodes_prompts_and_nothing_else(base):
    plain = random_adapter(base, 1)
    assert (plain.text_digest, plain.has_text_layers) == ("", False)
    token = random_adapter(base, 1, placeholder="<it>")
    other = AdapterWeights(base.digest, 4, random_adapter(base, 2).layers, token.embeddings)
    assert other.digest != token.digest
    assert other.text_digest == token.text_digest != ""
    layer = LayerFactors(torch.ones(4, 24), torch.ones(24, 4))
    name = "text_encoder.encoder.layers.0.self_attn.q_proj"
    with_layer = AdapterWeights(base.digest, 4, {**plain.layers, name: layer})
    assert with_layer.has_text_layers
    alone = AdapterWeights(base.digest, 4, {name: layer})
    assert with_layer.text_digest == alone.text_digest
    both = AdapterWeights(base.digest, 4, {name: layer}, token.embeddings)
    renamed = AdapterWeights(base.digest, 4, {}, LearnedEmbeddings({"<x>": token.embeddings.tokens["<it>"]}))
    digests = {alone.text_digest, token.text_digest, both.text_digest, renamed.text_digest}
    assert len(digests) == 4
    assert all(digest.startswith("sha256:") for digest in digests)


def test_the_digest_covers_every_tensor_and_no_metadata(base):
    adapter = random_adapter(base, 1, placeholder="<it>")
    again = AdapterWeights(base.digest, 4, dict(reversed(adapter.layers.items())), adapter.embeddings)
    assert again.digest == adapter.digest
    changed = dict(adapter.layers)
    changed[KEY] = LayerFactors(changed[KEY].A, changed[KEY].B + 1e-7)
    others = [
        AdapterWeights(base.digest, 4, changed, adapter.embeddings),
        AdapterWeights(base.digest, 4, adapter.layers),
        AdapterWeights("sha256:other", 4, adapter.layers, adapter.embeddings),
        random_adapter(base, 1, placeholder="<that>"),
    ]
    assert len({adapter.digest, *(other.digest for other in others)}) == 5


NAN = torch.full((4, 32), float("nan"))


@pytest.mark.parametrize(
    ("change", "reason", "says"),
    [
        ({"tensors": {"unet.new.to_q.lora_A.weight": torch.ones(4, 8)}}, Reason.ADAPTER_KEYS_UNMATCHED,
         "nothing that matches unet.new.to_q.lora_A.weight"),
        ({"tensors": {f"{KEY}.alpha": torch.ones(1, 1)}}, Reason.ADAPTER_KEYS_UNMATCHED, "alpha"),
        ({"tensors": {f"{KEY}.lora_B.weight": None}}, Reason.ADAPTER_KEYS_UNMATCHED, f"missing.*{KEY}"),
        ({"tensors": {f"{KEY}.lora_A.weight": torch.ones(5, 32)}}, Reason.ADAPTER_KEYS_UNMATCHED,
         f"differ in rank for {KEY}"),
        ({"tensors": {f"{KEY}.lora_A.weight": torch.ones(4, 31)}}, Reason.ADAPTER_KEYS_UNMATCHED,
         "do not fit this base"),
        ({"tensors": {f"{KEY}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}},
         Reason.ADAPTER_KEYS_UNMATCHED, "I8"),
        ({"tensors": {f"{KEY}.lora_A.weight": NAN}}, Reason.ADAPTER_NOT_FINITE, f"{KEY}.lora_A.weight"),
        ({"tensors": {"embeddings.1.0": torch.ones(1, 24)}}, Reason.ADAPTER_KEYS_UNMATCHED, "embeddings.1.0"),
        ({"tensors": {"embeddings.0.1": torch.ones(1, 24)}}, Reason.ADAPTER_KEYS_UNMATCHED, "embeddings.0.1"),
        ({"tensors": {"embeddings.0.0": torch.ones(1, 23)}}, Reason.ADAPTER_KEYS_UNMATCHED, "24 columns"),
        ({"tensors": {"embeddings.0.0": None}}, Reason.ADAPTER_KEYS_UNMATCHED, "<it> lacks"),
        ({"base_digest": "sha256:other"}, Reason.BASE_DIGEST_MISMATCH, "sha256:other"),
        ({"base_digest": None}, Reason.ADAPTER_KEYS_UNMATCHED, "base_digest"),
        ({"format": "mooring.adapter.v9"}, Reason.ADAPTER_KEYS_UNMATCHED, "mooring.adapter.v9"),
        ({"placeholders": 1}, Reason.ADAPTER_KEYS_UNMATCHED, "damaged"),
        ({"placeholders": ["<it>", "<it>"]}, Reason.ADAPTER_KEYS_UNMATCHED, "placeholders is damaged"),
        ({"placeholders": [" "]}, Reason.ADAPTER_KEYS_UNMATCHED, "placeholders is damaged"),
        ({"metadata": []}, Reason.ADAPTER_KEYS_UNMATCHED, "metadata is damaged"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_by_name(base, change, reason, says):
    data = to_safetensors(random_adapter(base, 1, placeholder="<it>"))
    assert from_safetensors(rewritten(data), base).rank == 4
    with pytest.raises(MooringError, match=says) as caught:
        from_safetensors(rewritten(data, **change), base)
    assert caught.value.reason is reason
    assert caught.value.remedy


def test_many_unmatched_keys_are_named_and_counted(base):
    data = to_safetensors(random_adapter(base, 1))
    extra = {f"unet.stranger{k}.lora_A.weight": torch.ones(4, 8) for k in range(9)}
    with pytest.raises(MooringError, match=r"stranger0.*and 4 more"):
        from_safetensors(rewritten(data, tensors=extra), base)


def test_limits_are_checked_before_reading(base):
    data = to_safetensors(random_adapter(base, 1))
    with pytest.raises(MooringError, match=f"has {len(data)} bytes; adapters may have 100"):
        from_safetensors(data, base, max_bytes=100)
    with pytest.raises(MooringError, match="rank 4; this server's slots hold rank 2") as caught:
        from_safetensors(data, base, max_rank=2)
    assert caught.value.reason is Reason.ADAPTER_RANK_TOO_LARGE
    assert caught.value.metadata == {"rank": "4", "limit": "2"}


def test_a_header_cannot_ask_for_more_than_the_file_holds(base):
    header = {
        "__metadata__": {"mooring": "{}"},
        f"{KEY}.lora_A.weight": {"dtype": "F32", "shape": [2**40, 32], "data_offsets": [0, 2**47]},
    }
    text = json.dumps(header).encode()
    with pytest.raises(MooringError, match="declares") as caught:
        from_safetensors(struct.pack("<Q", len(text)) + text + b"\0" * 64, base)
    assert caught.value.reason is Reason.ADAPTER_KEYS_UNMATCHED


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_refused_and_nothing_else(base, data):
    """Any cut, any flipped byte: read as the same adapter or refused with a typed error."""
    good = to_safetensors(random_adapter(base, 1, rank=1))
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, 2000) | st.integers(0, len(good) - 1))] = data.draw(
            st.integers(0, 255)
        )
    damaged = damaged[: data.draw(st.integers(0, len(good)) | st.just(len(good)))]
    try:
        from_safetensors(bytes(damaged), base)
    except MooringError as error:
        assert error.reason in {  # noqa: PT017
            Reason.ADAPTER_KEYS_UNMATCHED,
            Reason.BASE_DIGEST_MISMATCH,
            Reason.ADAPTER_NOT_FINITE,
        }


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 7, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"PK\x03\x04" * 20]
)
def test_other_files_are_no_adapters(base, content):
    with pytest.raises(MooringError) as caught:
        from_safetensors(content, base)
    assert caught.value.reason is Reason.ADAPTER_KEYS_UNMATCHED


TOLERANCE = 1e-4
"""On latents, against PEFT's own order of multiplication; measured 1e-6 to 2e-5."""


@pytest.mark.parametrize(
    ("which", "root", "kind"),
    [("base", "tiny_sd15", StableDiffusionPipeline), ("base_sdxl", "tiny_sdxl", StableDiffusionXLPipeline)],
)
def test_diffusers_makes_the_same_image_of_our_export(
    which, root, kind, request, tmp_path, make_bank, monkeypatch
):
    base, root = request.getfixturevalue(which), request.getfixturevalue(root)
    bank = make_bank(base, targets="attention+ff")
    adapter = random_adapter(base, 1, targets="attention+ff", placeholder="<it>", vectors=2)
    files = export_diffusers(adapter)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    prompt = "a photo of <it> on grass"

    pipeline = kind.from_pretrained(root, **({} if which == "base_sdxl" else {"safety_checker": None}))
    pipeline.scheduler = base.new_scheduler()
    pipeline.set_progress_bar_config(disable=True)
    readme = (tmp_path / "README.txt").read_text()
    lines = [line.strip() for line in readme.splitlines() if line.startswith("    pipe.")]
    assert len(lines) == 1 + len(base.text_encoders)
    for line in lines:  # the README's own words
        exec(line, {"pipe": pipeline, "folder": str(tmp_path)})
    expected = pipeline(
        prompt,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(9),
        output_type="latent",
    ).images

    seen = []
    decode = base.decode
    monkeypatch.setattr(base, "decode", lambda latents: (seen.append(latents), decode(latents))[1])
    row = SampleRow(prompt, mix=[(bank.acquire(adapter), 1.0)], seed=9, embeddings=adapter.embeddings)
    drain(sample(base, bank, [row], steps=4, guidance_scale=3.0))
    assert (seen[0] - expected).abs().max() <= TOLERANCE * expected.abs().max()
    plain = SampleRow("a photo of duck on grass", seed=9)
    drain(sample(base, bank, [plain], steps=4, guidance_scale=3.0))
    assert (seen[1] - expected).abs().max() > 0.05


def test_several_placeholders_get_files_of_their_own(base):
    first, second = (random_adapter(base, seed, placeholder=f"<it{seed}>") for seed in (1, 2))
    tokens = {**first.embeddings.tokens, **second.embeddings.tokens}
    both = AdapterWeights(base.digest, 4, first.layers, type(first.embeddings)(tokens))
    assert set(export_diffusers(both)) == {
        "pytorch_lora_weights.safetensors",
        "learned_embeds.safetensors",
        "learned_embeds.it2.safetensors",
        "README.txt",
    }
    assert from_safetensors(to_safetensors(both), base).embeddings.sizes == {"<it1>": 1, "<it2>": 1}
