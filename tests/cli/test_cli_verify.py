"""`mooring verify`: verdicts, exit codes and JSON."""

from __future__ import annotations

import io
import json

import pytest
from mooring_server.cli import app
from mooring_server.provenance import identity
from mooring_server.provenance.marks import Marker, Origin
from PIL import Image
from typer.testing import CliRunner

BASE, ADAPTER = "sha256:" + "b" * 64, "sha256:" + "a" * 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Marked, changed and plain pictures, the authority of the marks and another one."""
    root = tmp_path_factory.mktemp("verify")
    made = identity.self_issued(root / "provenance")
    identity.self_issued(root / "stranger")
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "PNG")
    marked = Marker(*made.names, "1.2.3").mark(buffer.getvalue(), Origin(BASE, (ADAPTER,)))
    (root / "plain.png").write_bytes(buffer.getvalue())
    (root / "marked.png").write_bytes(marked)
    (root / "changed.png").write_bytes(marked[:-20] + bytes([marked[-20] ^ 1]) + marked[-19:])
    return root


def verify(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_a_marked_picture_tells_where_it_comes_from(folder):
    result = verify(folder / "marked.png")
    assert result.exit_code == 0
    assert "marked.png: valid\n" in result.stdout
    for text in ("Mooring 1.2.3", "trainedAlgorithmicMedia", BASE, ADAPTER, "Mooring (self-issued)"):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("picture", "trusted", "verdict", "code"),
    [
        ("marked.png", "provenance", "valid, trusted", 0),
        ("marked.png", "stranger", "valid, signer not trusted", 1),
        ("changed.png", "", "tampered", 1),
        ("plain.png", "", "no mark", 1),
    ],
)
def test_verdicts_and_exit_codes(folder, picture, trusted, verdict, code):
    trust = ["--trust", folder / trusted / identity.AUTHORITY] if trusted else []
    result = verify(folder / picture, *trust)
    assert (result.exit_code, f"{picture}: {verdict}\n" in result.stdout) == (code, True), result.stdout


def test_json_has_every_file_and_one_bad_file_decides(folder):
    result = verify(folder / "marked.png", folder / "plain.png", "--json")
    assert result.exit_code == 1
    marked, plain = json.loads(result.stdout)
    assert (marked["state"], marked["trusted"], marked["base"]) == ("valid", None, BASE)
    assert (marked["adapters"], marked["problems"]) == ([ADAPTER], [])
    assert (plain["file"], plain["state"]) == (str(folder / "plain.png"), "no mark")


@pytest.mark.parametrize(
    "arguments",
    [["absent.png"], ["marked.png", "--trust", "absent.pem"], ["marked.png", "--trust", "plain.png"], []],
)
def test_what_cannot_be_read_is_a_usage_error(folder, arguments):
    named = [a if a.startswith("-") else folder / a for a in arguments]
    result = verify(*named)
    assert result.exit_code == 2
    assert "valid" not in result.stdout


def test_the_help_says_what_a_verdict_means():
    text = verify("--help").stdout
    for word in ("tampered", "no mark", "--trust", "Exit codes: 0"):
        assert word in text
