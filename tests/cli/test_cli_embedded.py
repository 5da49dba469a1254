"""The whole path through the command line and an embedded server on a tiny base: photos in, pictures out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mooring_server.cli import app
from mooring_server.cli_server import connect, read_record
from PIL import Image
from typer.testing import CliRunner


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 40 + i), colour).save(folder / f"{i}.png")
    return folder


def test_photos_in_pictures_out(
    tiny_sd15: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    monkeypatch.setenv("MOORING_THREADS", "1")
    monkeypatch.delenv("MOORING_SERVER", raising=False)

    def run(*arguments: str, exit_code: int = 0) -> Any:
        result = CliRunner().invoke(app, [*arguments, "--state-dir", str(state)])
        assert result.exit_code == exit_code, result.output
        if exit_code:
            return result.stderr
        return json.loads(result.stdout) if "--json" in arguments else result.stdout

    with connect("", state, base=str(tiny_sd15)):  # keeps one server for all the commands below
        target = read_record(state)
        assert target is not None
        run("subjects", "create", "rex", str(photos), "--class", "dog", "--rights", "owned")
        assert run("subjects", "show", "rex", "--json")["photo_count"] == 3
        made = run("train", "rex", "--steps", "3", "--rank", "2", "--json")
        assert made["adapter"]["name"].endswith("/adapters/rex@1")
        assert made["adapter"]["drift"]["value"] > 0
        said = run("train", "rex", "--steps", "3", "--method", "none", "--adapter", "loose")
        assert "adapter loose@1" in said

        drawing = ["generate", "a photo of <rex> dog on the beach", "--steps", "3", "--json"]
        pictures = [
            run(*drawing, "--out", str(tmp_path / f"out{i}"), *extra)["images"][0]["path"]
            for i, extra in enumerate((["-a", "rex"], ["-a", "rex"], ["-a", "rex", "--seed", "1"]))
        ]
        first, again, other = (Image.open(path).tobytes() for path in pictures)  # marks hold a time
        assert first == again, "the same request gives the same picture"
        assert first != other

        rows = tmp_path / "rows.jsonl"
        lines = (
            {"prompt": f"a photo of <rex> {noun}", "adapter": "rex", "steps": 2} for noun in ("dog", "car")
        )
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        batch = run("batch", str(rows), "--out", str(tmp_path / "batch"), "--json")
        assert batch["batch_result"]["image_count"] == 2
        assert len((tmp_path / "batch" / "manifest.jsonl").read_text().splitlines()) == 2
        assert sorted(path.name for path in (tmp_path / "batch" / "images").iterdir()) == [
            "000001.png",
            "000002.png",
        ]
        run("batch", exit_code=2)

        files = run("adapters", "export", "rex", "--out", str(tmp_path / "lora"), "--json")
        assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file(), files
        assert {job["state"] for job in run("jobs", "list", "--json")} == {"JOB_STATE_SUCCEEDED"}
        assert "steps" in run("generate", "a photo", "--steps", "999", exit_code=2)
        assert "error: " in run("generate", "a photo", "-a", "nobody", exit_code=3)
    assert read_record(state) is None, "the last user stops the server"
