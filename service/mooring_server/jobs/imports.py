"""Importing an adapter: files of another tool → a published version.

Nothing that a file says of itself is believed: norms are computed here, and drift stays unmeasured until an
evaluation. What is kept of its origin is the recognised format, the digest of the files and the caller's
declaration of rights.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from mooring_server.engine.adapters import to_safetensors, too_large
from mooring_server.engine.bank import AdapterBank
from mooring_server.engine.formats import convert
from mooring_server.errors import FieldViolation, MooringError, Reason, StorageUnavailableError
from mooring_server.evaluation import certificate
from mooring_server.jobs.session import finite
from mooring_server.storage.database import check_text, new_id
from mooring_server.storage.models import Adapter, Document
from mooring_server.storage.objects import ObjectStore, content_key
from mooring_server.storage.store import Store

METHOD = "imported"
"""Stands where a training method's name stands."""


@dataclass(frozen=True)
class ImportRequest:
    """What the caller says about the files.

    Attributes:
        adapter_id: the adapter to publish a version of.
        rights: by what right it may be used; required.
        class_noun: what its subject is an instance of; "" when not known.
        placeholder: word of the learned embeddings, or of the subject in prompts; "" keeps the files'.
        request_id: makes the import idempotent.

    Raises:
        MooringError: RIGHTS_REQUIRED.
    """

    adapter_id: str
    rights: Document
    class_noun: str = ""
    placeholder: str = ""
    request_id: str = ""

    def __post_init__(self) -> None:
        if not self.rights:
            raise MooringError(
                Reason.RIGHTS_REQUIRED,
                "An import needs a rights declaration.",
                remedy="State by what right the adapter, and what it was trained on, may be used.",
                fields=[FieldViolation("adapter.rights", "is required")],
            )


def import_adapter(
    store: Store,
    objects: ObjectStore,
    bank: AdapterBank,
    tenant: str,
    wanted: ImportRequest,
    files: Mapping[str, bytes],
    *,
    max_bytes: int,
) -> Adapter:
    """Convert, certify and publish, the row last.

    Args:
        store: where the row goes.
        objects: where the adapter goes.
        bank: what it must fit; only its layout and its base are read.
        tenant: whose it will be.
        wanted: what the caller says about the files.
        files: name → content.
        max_bytes: of the files together, of the adapter as float32, and of its stored file.

    Raises:
        MooringError: INVALID_FIELD; REQUEST_ID_REUSED; what `formats.convert` raises. Nothing was stored.
    """
    made = convert(files, bank.base, placeholder=wanted.placeholder, max_bytes=max_bytes, max_rank=bank.rank)
    bank.require_fits(made.weights)
    tokens = sorted(made.weights.embeddings.tokens) if made.weights.embeddings else []
    placeholder = wanted.placeholder or (tokens[0] if tokens else "")
    for name in (placeholder, *tokens):
        check_text("adapter.placeholder", name, limit=32)
    source: Document = {"format": made.format.value, "digest": made.digest, "files": sorted(files)}
    proof = certificate.build(bank.base, made.weights)
    kept = {
        "certificate": proof.dumps(),
        "rights": json.dumps(wanted.rights, sort_keys=True),
        "source": json.dumps(source, sort_keys=True),
    }
    data = to_safetensors(dataclasses.replace(made.weights, metadata=kept))
    if len(data) > max_bytes:  # it could not be read again
        raise too_large(len(data), max_bytes)
    key = content_key(f"adapters/{new_id()}", data, "safetensors")
    objects.put(key, data)
    try:
        adapter = store.publish_adapter(
            tenant,
            wanted.adapter_id,
            object_key=key,
            digest=made.weights.digest,
            base_digest=made.weights.base_digest,
            rank=made.weights.rank,
            size_bytes=len(data),
            class_noun=wanted.class_noun,
            placeholder=placeholder,
            rights=wanted.rights,
            certificate=finite(proof.to_json()),
            summary={"method": METHOD, "rank": made.weights.rank, "source": source},
            request_id=wanted.request_id,
        )
    except StorageUnavailableError:  # the row may be there: what it is not is collected as garbage
        raise
    except MooringError:  # refused, so no row refers to the object
        objects.delete(key)
        raise
    if adapter.object_key != key:  # the same request was answered before
        objects.delete(key)
    return adapter
