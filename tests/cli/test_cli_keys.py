"""`mooring keys` on a database of its own, and how commands behave towards a server that asks who calls."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest
from mooring_server.cli import app
from mooring_server.storage.keys import KeyRefusedError
from mooring_server.storage.store import Store
from scripted_server import ScriptedServer, abort_with
from typer.testing import CliRunner, Result


def run(state: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments, "--state-dir", str(state)])


def listed(state: Path, *arguments: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(run(state, "list", "--json", *arguments).stdout)
    return found


def test_a_key_is_shown_once_and_opens_what_it_says(tmp_path: Path) -> None:
    result = run(tmp_path, "create", "acme", "--role", "admin", "--label", "ci", "--expires", "90d")
    assert result.exit_code == 0
    secret = result.stdout.strip()
    assert secret.startswith("moor_")
    assert secret not in result.stderr
    assert secret.rsplit("_", 1)[1] not in run(tmp_path, "list").output
    store = Store(f"sqlite:///{tmp_path}/mooring.db")
    try:
        key = store.find_key(secret)
        assert (key.tenant, key.role, key.label) == ("acme", "admin", "ci")
        assert key.expire_time is not None
        assert abs(key.expire_time - key.create_time - 90 * 86_400) < 60
        assert run(tmp_path, "revoke", key.key_id).exit_code == 0
        with pytest.raises(KeyRefusedError, match="revoked"):
            store.find_key(secret)
    finally:
        store.close()
    assert [key["state"] for key in listed(tmp_path)] == ["revoked"]


def test_keys_are_listed_newest_first_and_by_tenant(tmp_path: Path) -> None:
    assert "No keys" in run(tmp_path, "list").output
    for tenant in ("acme", "other", "acme"):
        run(tmp_path, "create", tenant, "--role", "read-only")
    assert [key["tenant"] for key in listed(tmp_path)] == ["acme", "other", "acme"]
    assert [key["tenant"] for key in listed(tmp_path, "--tenant", "other")] == ["other"]
    assert {key["role"] for key in listed(tmp_path)} == {"read-only"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("create", "Acme"),
        ("create", "acme/x"),
        ("create", "-"),
        ("create", "acme", "--expires", "soon"),
        ("create", "acme", "--expires", "0d"),
        ("create", "acme", "--role", "god"),
        ("create", "acme", "--label", "a\nb"),
        ("revoke", "0123456789abcdef"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = run(tmp_path, *arguments)
    assert result.exit_code == 2, result.output
    assert listed(tmp_path) == []


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED])
def test_a_refused_credential_has_an_exit_code_of_its_own(
    server: ScriptedServer, code: grpc.StatusCode
) -> None:
    server.answers["ListJobs"] = lambda _, c: abort_with(c, code, "No.", reason="R", remedy="Ask.")
    result = CliRunner().invoke(app, ["jobs", "list", "--server", server.target])
    assert result.exit_code == 7


def test_a_key_is_not_sent_in_the_clear(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOORING_API_KEY", "moor_key")
    result = CliRunner().invoke(app, ["jobs", "list", "--server", server.target])
    assert result.exit_code == 2
    assert "not sent in the clear" in result.stderr
    assert server.calls == {}


@pytest.mark.parametrize("command", [["keys", "list"], ["keys", "create", "acme"], ["db", "current"]])
def test_a_database_that_is_away_is_one_line(tmp_path: Path, command: list[str]) -> None:
    url = "postgresql://nobody@127.0.0.1:1/nothing"
    result = CliRunner().invoke(app, command, env={"MOORING_DATABASE_URL": url})
    assert result.exit_code == 5
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 2, result.stderr
    assert lines[0].startswith("error: The database is away. ")
    assert "127.0.0.1" in lines[0]
    assert "MOORING_DATABASE_URL" in lines[1]
    assert "Traceback" not in result.output
