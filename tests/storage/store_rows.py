"""Rows with every required field filled in."""

from __future__ import annotations

from typing import Any

from mooring_server.storage.aliases import Judge
from mooring_server.storage.models import Adapter, Alias, Judgement, NewPhoto, Subject, Verdict
from mooring_server.storage.store import Store

RIGHTS = {"basis": "OWNED", "statement": "own work"}


def new_subject(store: Store, tenant: str = "acme", subject_id: str = "duck", **changes: Any) -> Subject:
    values = {"class_noun": "bird", "placeholder": "<duck>", "rights": RIGHTS} | changes
    return store.create_subject(tenant, subject_id, **values)


def new_photo(number: int) -> NewPhoto:
    return NewPhoto(f"{number}.jpg", f"{number:064x}", f"photos/u/{number}.png", 64, 48, 1000 + number)


def publish(store: Store, tenant: str = "acme", adapter_id: str = "duck", **changes: Any) -> Adapter:
    values = {
        "object_key": f"adapters/{adapter_id}.safetensors",
        "digest": "sha256:" + "0" * 64,
        "base_digest": "sha256:" + "1" * 64,
        "rank": 8,
        "size_bytes": 100,
        "class_noun": "bird",
        "placeholder": "<duck>",
        "rights": RIGHTS,
        "certificate": {"sigma_max": 0.5},
        "summary": {"method": "spectral"},
    } | changes
    return store.publish_adapter(tenant, adapter_id, **values)


def judged(verdict: Verdict = Verdict.PASSED) -> Judge:
    """A gate that always says the same."""
    return lambda _adapter, _evaluations, policy: Judgement(verdict, [], policy or {}, "")


def point(store: Store, version: int | None, tenant: str = "acme", **changes: Any) -> Alias:
    """Publish a version as live."""
    values = {"judge": judged(), "actor": "ann"} | changes
    published, _ = store.publish_alias(tenant, "duck", version, values.pop("alias", "live"), **values)
    assert published is not None
    return published
