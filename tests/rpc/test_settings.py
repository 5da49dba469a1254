"""Settings: what is refused, where values come from, and that defaults need nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mooring_server.config import Settings, is_loopback
from pydantic import ValidationError


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    import os

    for name in list(os.environ):
        if name.startswith("MOORING_"):
            monkeypatch.delenv(name)


def test_defaults_serve_this_machine_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    settings = Settings()
    assert settings.listen == "127.0.0.1:50051"
    assert settings.state_dir == tmp_path / "mooring"
    assert settings.storage_url == f"sqlite:///{tmp_path}/mooring/mooring.db"
    assert settings.threads >= 1
    monkeypatch.delenv("XDG_STATE_HOME")
    assert Settings().state_dir == Path.home() / ".local" / "state" / "mooring"


def test_the_environment_sets_any_field(monkeypatch):
    monkeypatch.setenv("MOORING_LISTEN", "[::1]:6000")
    monkeypatch.setenv("MOORING_RANK", "32")
    monkeypatch.setenv("MOORING_DATABASE_URL", "postgresql://host/db")
    settings = Settings()
    assert (settings.listen, settings.rank, settings.storage_url) == (
        "[::1]:6000",
        32,
        "postgresql://host/db",
    )


PUBLIC = ["0.0.0.0:50051", "192.168.1.4:1", "[::]:50051", "example.org:80", "8.8.8.8:53"]
NONSENSE = ["127.0.0.1", "127.0.0.1:", ":50051", "127.0.0.1:x", "localhost:70000", "unix:/tmp/x"]


@pytest.mark.parametrize("address", PUBLIC)
@pytest.mark.parametrize("field", ["listen", "metrics_listen"])
def test_what_others_could_reach_is_refused_while_there_is_no_authentication(field, address):
    with pytest.raises(ValidationError, match="without authentication"):
        Settings(**{field: address})


@pytest.mark.parametrize("address", NONSENSE)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ValidationError):
        Settings(listen=address)


def test_metrics_can_be_off_but_the_server_needs_an_address():
    assert Settings(metrics_listen="").metrics_listen == ""
    with pytest.raises(ValidationError, match="an address is needed"):
        Settings(listen="")


@pytest.mark.parametrize(
    "wrong",
    [
        {"slots": 1},
        {"rank": 0},
        {"rank": 129},
        {"threads": 0},
        {"training_share": 1.0},
        {"training_share": -0.1},
        {"dtype": "int8"},
        {"targets": "everything"},
        {"lease_seconds": 0.5},
        {"max_queue": 0},
        {"nonsense": 1},
    ],
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        Settings(**wrong)


def test_every_setting_is_described():
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


@given(st.ip_addresses())
def test_loopback_is_what_the_standard_library_says(address):
    text = f"[{address}]" if address.version == 6 else str(address)
    assert is_loopback(text) == address.is_loopback


@given(st.text(max_size=20))
def test_no_host_name_but_localhost_counts_as_loopback(host):
    import ipaddress

    try:
        expected = ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        expected = host == "localhost"
    assert is_loopback(host) == expected


def test_what_keeps_bits_follows_the_device_unless_it_is_said():
    assert Settings().keeps_bits
    assert not Settings(deterministic=False).keeps_bits
    assert not Settings(compile=True).keeps_bits
    assert not Settings(device="cuda:0").keeps_bits
    assert Settings(device="cuda:0", deterministic=True, compile=True, cuda_graphs=True).keeps_bits


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"cuda_graphs": True}, "cuda_graphs needs a CUDA device, not cpu"),
        ({"compile": True, "deterministic": True}, "compile has no use beside deterministic on a CPU"),
        ({"attention": "sparse"}, "attention"),
        ({"max_running": 0}, "max_running"),
        ({"max_step_seconds": 0.0}, "max_step_seconds"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(values, says):
    with pytest.raises(ValidationError, match=says):
        Settings(**values)
