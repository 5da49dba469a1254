"""What the client takes from the environment."""

from __future__ import annotations

from pathlib import Path

import mooring
import pytest


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "TOKEN_FILE", "ROOT_CERTIFICATES", "CLIENT_CERTIFICATE", "CLIENT_KEY"):
        monkeypatch.delenv(f"MOORING_{name}", raising=False)


def test_nothing_set_is_nothing_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mooring.from_environment() == {}
    monkeypatch.setenv("MOORING_API_KEY", "")
    assert mooring.from_environment() == {}


def test_key_and_authority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOORING_API_KEY", "moor_key")
    monkeypatch.setenv("MOORING_ROOT_CERTIFICATES", "/etc/ca.pem")
    assert mooring.from_environment() == {"api_key": "moor_key", "root_certificates": "/etc/ca.pem"}


def test_a_token_is_read_again_at_every_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "token"
    monkeypatch.setenv("MOORING_TOKEN_FILE", str(file))
    read = mooring.from_environment()["token"]
    file.write_text("one\n")
    assert read() == "one"
    file.write_text("two\n")
    assert read() == "two"


def test_half_a_client_certificate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOORING_CLIENT_CERTIFICATE", "cert.pem")
    with pytest.raises(ValueError, match="belong together"):
        mooring.from_environment()
    monkeypatch.setenv("MOORING_CLIENT_KEY", "key.pem")
    assert mooring.from_environment() == {"client_certificate": ("cert.pem", "key.pem")}
