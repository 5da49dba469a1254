"""Headers of safetensors files that no tool writes: refused by what is wrong with them, never failed on."""

from __future__ import annotations

import json

import pytest
from mooring_server.engine.adapters import FORMAT, HEADER_KEY
from mooring_server.engine.formats import convert
from mooring_server.errors import MooringError, Reason


def refused(base, data: bytes) -> MooringError:
    with pytest.raises(MooringError) as caught:
        convert({"a.safetensors": data}, base, max_bytes=2**24)
    assert caught.value.remedy
    return caught.value


def with_header(document: str | dict, tail: bytes = b"") -> bytes:
    """A safetensors file of any header."""
    header = (document if isinstance(document, str) else json.dumps(document)).encode()
    return len(header).to_bytes(8, "little") + header + tail


CROSS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize(
    "data",
    [
        with_header('{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}', b"0" * 4),
        with_header({"a": {"dtype": "F32", "shape": [10**4000, 10**4000], "data_offsets": [0, 4]}}, b"0" * 4),
        with_header(
            {f"{CROSS}.lora_A.weight": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, b"0" * 4
        ),
        with_header({"__metadata__": {HEADER_KEY: "[" * 100_000}, "a": {"dtype": "F32", "shape": [0]}}),
        with_header("[" * 100_000),
    ],
    ids=["infinite", "endless", "no shape", "nested metadata", "nested"],
)
def test_headers_that_no_tool_writes_are_refused(base, data):
    assert refused(base, data).reason is Reason.ADAPTER_KEYS_UNMATCHED


def test_an_embedding_of_an_endless_number_is_refused(base):
    ours = {"format": FORMAT, "base_digest": base.digest, "placeholders": ["<a>"], "metadata": {}}
    document = {
        "__metadata__": {HEADER_KEY: json.dumps(ours)},
        f"embeddings.{'9' * 5000}.0": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]},
    }
    assert refused(base, with_header(document, b"0" * 4)).reason is Reason.ADAPTER_KEYS_UNMATCHED
