"""AdapterService.ImportAdapter on a real server."""

from __future__ import annotations

import hashlib
import io
import json
import uuid

import numpy as np
import pytest
import torch
from mooring.v1 import adapter_pb2 as pb
from mooring.v1 import evaluation_pb2, job_pb2, media_pb2, personalization_pb2, subject_pb2
from mooring_server.engine.adapters import (
    LORA_FILE,
    AdapterWeights,
    LayerFactors,
    export_diffusers,
    from_safetensors,
    to_safetensors,
)
from mooring_server.engine.formats import source_digest
from PIL import Image
from rpc_calls import DEADLINE, failure_of, make_subject, make_weights, publish
from safetensors.torch import load, save

OWNED = subject_pb2.RightsDeclaration(
    basis=subject_pb2.RightsDeclaration.BASIS_LICENSED, statement="contract 7"
)


def of(files: dict[str, bytes], adapter_id: str = "made", *, chunk: int = 2**20, **declared):
    """The messages of an import."""
    values = {"adapter_id": adapter_id, "rights": OWNED, **declared}
    yield pb.ImportAdapterRequest(adapter=pb.AdapterImport(**values))
    for filename, data in files.items():
        yield header(filename, data)
        for offset in range(0, len(data), chunk):
            yield pb.ImportAdapterRequest(chunk=data[offset : offset + chunk])


def header(filename: str, data: bytes, **changed):
    values = {"filename": filename, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return pb.ImportAdapterRequest(file=media_pb2.FileHeader(**values | changed))


def send(stubs, messages) -> pb.Adapter:
    return stubs.adapters.ImportAdapter(iter(messages), timeout=DEADLINE).adapter


def kohya(weights: AdapterWeights, alpha: float) -> bytes:
    tensors = {}
    for path, factors in weights.layers.items():
        name = "lora_unet_" + path.removeprefix("unet.").replace(".", "_")
        tensors |= {
            f"{name}.lora_down.weight": factors.A,
            f"{name}.lora_up.weight": factors.B,
            f"{name}.alpha": torch.tensor(alpha),
        }
    return save(tensors)


def picture(stubs, adapter: str, seed: int = 3) -> bytes:
    request = personalization_pb2.GenerateRequest(
        prompt="a photo of a dog", adapter=adapter, steps=2, seed=seed
    )
    events = stubs.personalization.Generate(request, timeout=DEADLINE)
    data = b"".join(event.image.data for event in events if event.HasField("image"))
    return Image.open(io.BytesIO(data)).tobytes()  # the files differ by their marks


def objects_of(runtime) -> set[str]:
    return {key for key in runtime.objects.list() if key.endswith(".safetensors")}


def test_an_import_is_published_with_its_origin_and_its_norms(stubs, runtime):
    weights = make_weights(runtime, seed=1)
    data = kohya(weights, alpha=2.0)
    files = {"style.safetensors": data}
    made = send(stubs, of(files, "style", chunk=1000, class_noun="dog"))
    assert made.name == "tenants/local/adapters/style@1"
    assert (made.method, made.class_noun, made.placeholder, made.rank) == ("imported", "dog", "", 4)
    assert made.source == pb.ImportSource(
        format=pb.SOURCE_FORMAT_KOHYA,
        digest=source_digest(files),
        filenames=["style.safetensors"],
        rights=OWNED,
    )
    assert not made.HasField("drift")
    assert not made.certificate.HasField("drift")
    assert not made.HasField("drift_budget")
    assert made.certificate.adapter_digest == made.digest
    layer = made.certificate.layers[0]
    factors = weights.layers[layer.layer]
    exact = np.linalg.svd((factors.B.double() @ factors.A.double() / 2).numpy(), compute_uv=False)[0]
    assert layer.sigma_max == pytest.approx(exact, rel=1e-9)
    assert len(made.certificate.layers) == len(weights.layers)
    got = stubs.adapters.GetAdapter(pb.GetAdapterRequest(name=made.name), timeout=DEADLINE).adapter
    assert got == made
    row = runtime.store.get_adapter("local", "style", 1)
    kept = from_safetensors(runtime.objects.get(row.object_key), runtime.base)
    assert kept.digest == made.digest
    assert kept.metadata.keys() == {"certificate", "rights", "source"}


def test_what_is_exported_and_imported_again_draws_the_same_bits(stubs, runtime):
    row = publish(runtime, "original", seed=5)
    weights = runtime.adapters.get(row)
    files = {name: data for name, data in export_diffusers(weights).items() if name != "README.txt"}
    made = send(stubs, of(files, "again"))
    assert made.digest == row.digest
    assert made.placeholder == "<rex>"
    assert made.source.format == pb.SOURCE_FORMAT_DIFFUSERS
    assert list(made.source.filenames) == sorted(files)
    native = send(stubs, of({"n.safetensors": to_safetensors(weights)}, "again"))
    assert (native.version, native.digest, native.source.format) == (2, row.digest, pb.SOURCE_FORMAT_NATIVE)
    drawn = picture(stubs, "tenants/-/adapters/original")
    assert drawn == picture(stubs, made.name) == picture(stubs, native.name)
    assert drawn != picture(stubs, "")


def test_a_repeated_import_returns_the_first_answer_and_leaves_nothing_behind(stubs, runtime):
    files = {"a.safetensors": kohya(make_weights(runtime, seed=6), 4.0)}
    request_id = str(uuid.uuid4())
    first = send(stubs, of(files, "once", request_id=request_id))
    before = objects_of(runtime)
    assert send(stubs, of(files, "once", request_id=request_id)) == first
    changed = {"a.safetensors": kohya(make_weights(runtime, seed=6), 3.0)}
    for messages in (
        of(changed, "once", request_id=request_id),
        of(files, "twice", request_id=request_id),
        of(files, "once", request_id=request_id, class_noun="cat"),
        of(files, "once", request_id=request_id, rights=subject_pb2.RightsDeclaration(basis=1)),
    ):
        failure = failure_of(lambda m=messages: send(stubs, m))
        assert (failure.code.name, failure.reason) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
    assert objects_of(runtime) == before
    assert send(stubs, of(files, "once")).version == 2


def test_an_imported_adapter_is_evaluated_with_the_subject_that_is_named(stubs, runtime):
    made = send(stubs, of({"a.safetensors": kohya(make_weights(runtime, seed=7), 1.0)}, "judged"))
    request = personalization_pb2.EvaluateRequest(adapter=made.name)
    failure = failure_of(lambda: stubs.personalization.Evaluate(request, timeout=DEADLINE))
    assert (failure.reason, list(failure.fields)) == ("INVALID_FIELD", ["subject"])
    request.subject = make_subject(stubs, f"s{uuid.uuid4().hex[:8]}")
    config = evaluation_pb2.EvaluationConfig(prompts=["a photo of a {}"], seeds=[1], steps=2, class_samples=0)
    request.config.CopyFrom(config)
    job = stubs.personalization.Evaluate(request, timeout=DEADLINE).job
    for event in stubs.jobs.WatchJob(job_pb2.WatchJobRequest(name=job.name), timeout=DEADLINE):
        last = event
    assert job_pb2.JobState.Name(last.job.state) == "JOB_STATE_SUCCEEDED", last.job.error.message
    got = stubs.jobs.GetEvaluation(job_pb2.GetEvaluationRequest(name=job.name), timeout=DEADLINE).evaluation
    assert got.drift.value > 0
    assert got.adapter_digest == made.digest


def test_embeddings_alone_can_be_imported_and_drawn_with(stubs, runtime):
    vector = torch.randn(2, runtime.base.embedding_width(0), generator=torch.Generator().manual_seed(1))
    made = send(stubs, of({"learned_embeds.safetensors": save({"<old>": vector})}, "ti", placeholder="<new>"))
    assert (made.rank, made.placeholder) == (0, "<new>")
    assert made.source.format == pb.SOURCE_FORMAT_TEXTUAL_INVERSION
    request = personalization_pb2.GenerateRequest(prompt="a photo of <new>", adapter=made.name, steps=2)
    events = list(stubs.personalization.Generate(request, timeout=DEADLINE))
    assert events[-1].HasField("done")


@pytest.fixture
def good(runtime) -> bytes:
    return export_diffusers(make_weights(runtime))[LORA_FILE]


def test_bad_files_are_refused_by_name_and_nothing_is_stored(stubs, runtime, good):
    before = objects_of(runtime)
    tensors = load(good)
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    path = key.removesuffix(".lora_A.weight")
    wide = {
        path: LayerFactors(
            torch.ones(9, tensors[key].shape[1]), torch.ones(tensors[f"{path}.lora_B.weight"].shape[0], 9)
        )
    }
    other = AdapterWeights("sha256:" + "0" * 64, 4, make_weights(runtime).layers)
    unmatched, unsupported = "ADAPTER_KEYS_UNMATCHED", "ADAPTER_NOT_SUPPORTED"
    for data, reason, says in (
        (save(tensors | {"unet.nowhere.lora_A.weight": torch.ones(4, 4)}), unmatched, "nowhere"),
        (save(tensors | {key: torch.ones(4, 3)}), unmatched, key),
        (save(tensors | {key: torch.full_like(tensors[key], torch.nan)}), "ADAPTER_NOT_FINITE", key),
        (save(tensors | {key: torch.ones(tensors[key].shape, dtype=torch.int8)}), unmatched, "I8"),
        (good[:-10], unmatched, "declares"),
        (b"PK\x03\x04" + b"\0" * 100, unsupported, "pickle"),
        (save({"unet.conv_in.lora_A.weight": torch.ones(4, 4, 3, 3)}), unmatched, "unet.conv_in"),
        (save(tensors | {f"{path}.lora_magnitude_vector": torch.ones(3)}), unsupported, "magnitude"),
        (export_diffusers(AdapterWeights("", 9, wide))[LORA_FILE], "ADAPTER_RANK_TOO_LARGE", "rank 9"),
        (to_safetensors(other), "BASE_DIGEST_MISMATCH", "sha256:000"),
    ):  # fmt: skip
        failure = failure_of(lambda data=data: send(stubs, of({"a.safetensors": data}, "bad")))
        assert failure.reason == reason
        assert says in failure.message
        assert failure.metadata["remedy"]
    assert objects_of(runtime) == before
    missing = failure_of(
        lambda: stubs.adapters.GetAdapter(pb.GetAdapterRequest(name="tenants/-/adapters/bad"))
    )
    assert missing.reason == "ADAPTER_NOT_FOUND"


def test_a_file_too_large_is_refused_when_it_is_announced(stubs, runtime, good):
    limit = runtime.settings.max_adapter_bytes
    first = next(of({}))
    for headers in (
        [header("a.safetensors", good, size_bytes=limit + 1)],
        [
            header("a.safetensors", good),
            pb.ImportAdapterRequest(chunk=good),
            header("b", good, size_bytes=limit),
        ],
    ):
        failure = failure_of(lambda headers=headers: send(stubs, [first, *headers]))
        assert (failure.code.name, failure.reason) == ("INVALID_ARGUMENT", "ADAPTER_TOO_LARGE")
        assert failure.metadata["limit"] == str(limit)


@pytest.mark.parametrize(
    ("declared", "reason", "field"),
    [
        ({"rights": subject_pb2.RightsDeclaration()}, "RIGHTS_REQUIRED", "adapter.rights"),
        ({"rights": subject_pb2.RightsDeclaration(basis=1, statement="x" * 1001)}, "INVALID_FIELD",
         "adapter.rights.statement"),
        ({"adapter_id": "Bad Id"}, "INVALID_FIELD", "adapter.adapter_id"),
        ({"adapter_id": ""}, "INVALID_FIELD", "adapter.adapter_id"),
        ({"class_noun": "x" * 65}, "INVALID_FIELD", "adapter.class_noun"),
        ({"class_noun": "a\0b"}, "INVALID_FIELD", "adapter.class_noun"),
        ({"placeholder": "two words"}, "INVALID_FIELD", "adapter.placeholder"),
        ({"placeholder": "x" * 33}, "INVALID_FIELD", "adapter.placeholder"),
        ({"parent": "tenants/rival"}, "NOT_ALLOWED", None),
    ],
)  # fmt: skip
def test_bad_declarations_are_refused_before_a_file_is_read(stubs, declared, reason, field):
    failure = failure_of(lambda: send(stubs, list(of({}, **declared))))
    assert failure.reason == reason
    assert list(failure.fields) == ([field] if field else [])


def test_streams_out_of_order_are_refused(stubs, good):
    first, begin, chunk = next(of({})), header("a.safetensors", good), pb.ImportAdapterRequest(chunk=good)
    for messages in (
        [],
        [begin],
        [first],
        [first, first],
        [first, chunk],
        [first, pb.ImportAdapterRequest()],
        [first, begin, pb.ImportAdapterRequest(chunk=b"")],
        [first, begin, chunk, begin, chunk],
        [first, header("a/", good), chunk],
        [first, header("a\nb", good), chunk],
        [first, *(message for k in range(9) for message in (header(f"{k}", good), chunk))],
    ):
        failure = failure_of(lambda messages=messages: send(stubs, messages))
        assert (failure.code.name, failure.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
        assert failure.fields
    failure = failure_of(lambda: send(stubs, [first, begin]))
    assert failure.reason == "DIGEST_MISMATCH"


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
NATIVE = {"format": "mooring.adapter.v1", "base_digest": "b", "placeholders": [], "metadata": {}}


@pytest.mark.parametrize("odd", ["x" * 200_000, "a\0b\n", "\ud800 half a pair", "ключ"])
def test_odd_names_in_a_file_are_told_in_a_message_that_arrives(stubs, odd):
    for document in (
        {odd: {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}},
        {f"{odd}{k}.lora_A.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for k in range(9)},
        {"a": {"dtype": odd, "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1] * len(odd), "data_offsets": [0, 4]}},
        {"__metadata__": {"mooring": json.dumps(NATIVE | {"format": odd})}, "a": ONE},
        {"__metadata__": {"mooring": json.dumps(NATIVE | {"base_digest": odd})}, "a": ONE},
    ):
        text = json.dumps(document).encode()
        data = len(text).to_bytes(8, "little") + text + b"\0" * 4
        failure = failure_of(lambda data=data: send(stubs, of({"a.safetensors": data}, "odd")))
        assert failure.reason in {"ADAPTER_KEYS_UNMATCHED", "BASE_DIGEST_MISMATCH"}
        assert len(failure.message) < 2000
