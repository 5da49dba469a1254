"""A real server on the tiny base, with tiny judges."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from credentials import AUDIENCE, ISSUER, Issuer
from mooring_server.config import Quota, Role
from mooring_server.rpc.runtime import Runtime
from mooring_server.server import EmbeddedServer
from rpc_calls import Stubs, settings_for
from tiny_bases import WORDS
from tiny_judges import save_tiny_clip, save_tiny_vit
from transformers import CLIPTokenizer


@pytest.fixture(scope="session")
def tiny_judges(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings that name tiny judges."""
    root = tmp_path_factory.mktemp("judges")
    tokenizer = CLIPTokenizer.from_pretrained(tiny_sd15 / "tokenizer")
    return {
        "clip_judge": str(save_tiny_clip(root / "clip", tokenizer)),
        "dino_judge": str(save_tiny_vit(root / "dino")),
    }


@pytest.fixture(scope="session")
def worded_base(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with the list of words it was trained on beside its model_index.json."""
    root = tmp_path_factory.mktemp("worded") / "base"
    shutil.copytree(tiny_sd15, root)
    (root / "trained_words.json").write_text(json.dumps(sorted(WORDS)))
    return root


@pytest.fixture(scope="session")
def server(
    worded_base: Path, tiny_judges: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EmbeddedServer]:
    """One server for all tests that only call it."""
    state = tmp_path_factory.mktemp("state")
    settings = settings_for(worded_base, state, max_batch_in_flight=4, **tiny_judges)
    with EmbeddedServer(settings, metrics=True) as running:
        yield running


@pytest.fixture(scope="session")
def runtime(server: EmbeddedServer) -> Runtime:
    """The parts of that server, to arrange what calls cannot."""
    return server.server.runtime


@pytest.fixture(scope="session")
def issuer() -> Issuer:
    """Signs the tokens that the guarded server takes; its keys are "one" and "two"."""
    made = Issuer()
    made.add("one", "ES256")
    made.add("two", "RS256")
    return made


@pytest.fixture(scope="session")
def guarded(
    worded_base: Path, issuer: Issuer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EmbeddedServer]:
    """One server that asks who calls, by API key or token."""
    state = tmp_path_factory.mktemp("guarded")
    jwks = state / "jwks.json"
    jwks.write_bytes(issuer.jwks())
    settings = settings_for(
        worded_base,
        state,
        auth=("api_key", "jwt"),
        jwt_issuer=ISSUER,
        jwt_audience=AUDIENCE,
        jwt_jwks_file=jwks,
        reflection="authenticated",
        tenant_quotas={"small": Quota(queue_depth=1, concurrent_jobs=1, adapters=2, stored_bytes=100_000)},
    )
    with EmbeddedServer(settings) as running:
        yield running


@pytest.fixture(scope="session")
def keys(guarded: EmbeddedServer) -> dict[tuple[str, Role], str]:
    """API keys of three tenants in every role."""
    store = guarded.server.runtime.store
    return {
        (tenant, role): store.create_key(tenant, role.value)[1]
        for tenant in ("acme", "other", "small")
        for role in Role
    }


@pytest.fixture(scope="session")
def stubs(server: EmbeddedServer) -> Stubs:
    """Its services."""
    return Stubs(server.target)
