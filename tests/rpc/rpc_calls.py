"""Helpers to call a server as any client would, and to read what its errors say."""

from __future__ import annotations

import hashlib
import io
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2, status_pb2
from mooring.v1 import (
    adapter_pb2_grpc,
    job_pb2_grpc,
    media_pb2,
    personalization_pb2_grpc,
    subject_pb2,
    subject_pb2_grpc,
)
from mooring_server.config import Settings
from mooring_server.engine.adapters import AdapterWeights, LayerFactors, LearnedEmbeddings, to_safetensors
from mooring_server.rpc.runtime import Runtime
from mooring_server.storage import schema
from mooring_server.storage.database import insert_row
from mooring_server.storage.models import Adapter
from PIL import Image

DEADLINE = 240.0
"""Seconds that a call may take on a machine that is busy with other work."""


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Sends a credential, also in the clear: what gRPC's own call credentials refuse to do."""

    def __init__(self, credential: str) -> None:
        self._header = ("authorization", f"Bearer {credential}")

    def _send(self, continuation: Any, details: Any, request: Any) -> Any:
        metadata = [*(details.metadata or ()), self._header]
        return continuation(details._replace(metadata=metadata), request)

    intercept_unary_unary = intercept_unary_stream = _send
    intercept_stream_unary = intercept_stream_stream = _send


class Stubs:
    """All services of one server, called with a credential or without."""

    def __init__(self, target: str, credential: str = "") -> None:
        self.channel = grpc.insecure_channel(target)
        if credential:
            self.channel = grpc.intercept_channel(self.channel, _Bearer(credential))
        self.personalization: Any = personalization_pb2_grpc.PersonalizationServiceStub(self.channel)
        self.subjects: Any = subject_pb2_grpc.SubjectServiceStub(self.channel)
        self.adapters: Any = adapter_pb2_grpc.AdapterServiceStub(self.channel)
        self.jobs: Any = job_pb2_grpc.JobServiceStub(self.channel)


@dataclass
class Failure:
    """What a failed call told."""

    code: grpc.StatusCode
    message: str
    reason: str
    metadata: dict[str, str]
    fields: dict[str, str]
    retry: bool
    trailers: dict[str, Any] = field(default_factory=dict)


def failure_of(call: Callable[[], Any]) -> Failure:
    """Run a call that must fail."""

    def to_its_end() -> None:
        result = call()
        if hasattr(result, "__next__"):
            list(result)

    with pytest.raises(grpc.RpcError) as caught:
        to_its_end()
    error: Any = caught.value
    return read_failure(error.code(), error.details(), error.trailing_metadata())


def read_failure(code, message, trailers) -> Failure:
    """Decode the details of a failed call."""
    trailers = {item[0]: item[1] for item in trailers or ()}
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert status.code == code.value[0]
    assert status.message == message
    return read_status(status, code, trailers)


def read_status(status: status_pb2.Status, code=None, trailers=None) -> Failure:
    """Decode a `google.rpc.Status`."""
    info, bad, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    kinds = [detail.TypeName() for detail in status.details]
    for detail in status.details:
        for target in (info, bad, retry):
            detail.Unpack(target)
    assert info.domain == "mooring"
    return Failure(
        code,
        status.message,
        info.reason,
        dict(info.metadata),
        {violation.field: violation.description for violation in bad.field_violations},
        "google.rpc.RetryInfo" in kinds,
        trailers or {},
    )


def settings_for(base: Path, state_dir: Path, **changes: Any) -> Settings:
    """Settings of a small, quick server."""
    values = {
        "base": str(base),
        "state_dir": state_dir,
        "threads": 1,
        "rank": 8,
        "slots": 4,
        "drain_seconds": 5.0,
        **changes,
    }
    return Settings(**values)


def png(seed: int = 0, size: tuple[int, int] = (48, 40)) -> bytes:
    """A small random picture."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def file_messages(filename: str, data: bytes, *, chunk: int = 2**20, **header: Any):
    """A file as upload messages."""
    values = {
        "filename": filename,
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        **header,
    }
    yield subject_pb2.UploadPhotosRequest(file=media_pb2.FileHeader(**values))
    for offset in range(0, len(data), chunk):
        yield subject_pb2.UploadPhotosRequest(chunk=data[offset : offset + chunk])


def upload(stubs: Stubs, name: str, files: dict[str, bytes]) -> subject_pb2.UploadPhotosResponse:
    """Upload whole files."""

    def messages():
        yield subject_pb2.UploadPhotosRequest(subject=name)
        for filename, data in files.items():
            yield from file_messages(filename, data)

    return stubs.subjects.UploadPhotos(messages(), timeout=DEADLINE)


def make_subject(stubs: Stubs, subject_id: str, *, photos: int = 2, **values: Any) -> str:
    """A subject with photos; returns its name."""
    subject = {
        "class_noun": "dog",
        "rights": subject_pb2.RightsDeclaration(basis=subject_pb2.RightsDeclaration.BASIS_OWNED),
        **values,
    }
    request = subject_pb2.CreateSubjectRequest(subject_id=subject_id, subject=subject_pb2.Subject(**subject))
    name = stubs.subjects.CreateSubject(request, timeout=DEADLINE).subject.name
    if photos:
        upload(stubs, name, {f"{index}.png": png(index) for index in range(photos)})
    return name


def make_weights(
    runtime: Runtime, *, seed: int = 0, rank: int = 4, placeholder: str = "<rex>"
) -> AdapterWeights:
    """An adapter of random factors, strong enough to change pictures."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: LayerFactors(
            torch.randn(rank, A.shape[-1], generator=generator) * 0.5,
            torch.randn(B.shape[-2], rank, generator=generator) * 0.5,
        )
        for name, (A, B) in runtime.bank.factors.items()
    }
    vectors = tuple(
        torch.randn(1, runtime.base.embedding_width(encoder), generator=generator)
        for encoder in range(len(runtime.base.text_encoders))
    )
    return AdapterWeights(runtime.base.digest, rank, layers, LearnedEmbeddings({placeholder: vectors}))


def publish(
    runtime: Runtime,
    adapter_id: str,
    *,
    tenant: str = "local",
    base_digest: str = "",
    row: dict[str, Any] | None = None,
    **made: Any,
) -> Adapter:
    """Publish a random adapter as a job would, without training; `row` replaces values of its row."""
    weights = make_weights(runtime, **made)
    data = to_safetensors(weights)
    key = f"adapters/{adapter_id}-{tenant}-{weights.digest[7:17]}.safetensors"
    runtime.objects.put(key, data)
    values = {
        "object_key": key,
        "digest": weights.digest,
        "base_digest": base_digest or weights.base_digest,
        "rank": weights.rank,
        "size_bytes": len(data),
        "class_noun": "dog",
        "placeholder": made.get("placeholder", "<rex>"),
        "rights": {"basis": "owned", "statement": ""},
        "certificate": {},
        "summary": {"method": "spectral", "budget": 0.12},
    }
    return runtime.store.publish_adapter(tenant, adapter_id, **(values | (row or {})))


GOOD_DRIFT = {
    "value": 0.125,
    "low": 0.11,
    "high": 0.15,
    "probe_digest": "sha256:" + "0" * 64,
    "guidance_scale": 1.0,
    "generic": 0.12,
    "class": 0.13,
    "points": 288,
    "adapter_scale": 1.0,
}
"""As a moored adapter measures it against a budget of 0.12."""


def evaluated(runtime: Runtime, adapter: Adapter, **changes: Any) -> str:
    """Leave the row of a succeeded evaluation, good enough for the gate; returns the job's id."""
    figures = {
        "adapter_digest": adapter.digest,
        "base_digest": adapter.base_digest,
        "judges_digest": "sha256:" + "2" * 64,
        "subject": adapter.subject_id,
        "adapter_scale": 1.0,
        "prompts": 6,
        "generic_prompts": 24,
        "dino": 0.79,
        "base_dino": 0.43,
        "generic_clip_t_drop": [0.001, -0.001, 0.003],
        "drift": GOOD_DRIFT,
        **changes,
    }
    job_id = uuid.uuid4().hex
    with runtime.store.writing() as connection:
        now = runtime.store.now(connection)
        values = {
            "tenant": adapter.tenant,
            "job_id": job_id,
            "kind": "evaluate",
            "spec": {"adapter": adapter.name, "subject": figures["subject"], "config": {}},
            "state": "SUCCEEDED",
            "cancel_requested": False,
            "result": {"evaluation": "", "artifacts": [], "metrics": {}, "figures": figures},
            "last_event": 0,
            "attempts": 1,
            "crashes": 0,
            "worker": "",
            "lease": "",
            "create_time": now,
            "update_time": now,
            "end_time": now,
        }
        insert_row(connection, schema.jobs, values)
    return job_id
