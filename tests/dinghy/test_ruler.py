"""The ruler's file: written, read back, refused when it is not what it says; read by nothing that serves."""

from __future__ import annotations

import ast
from pathlib import Path

import mooring_server
import numpy as np
import pytest
import torch
from mooring_server import dinghy
from mooring_server.dinghy.classifier import WEIGHTS_FILE, Classifier, load_ruler, read, save_ruler
from mooring_server.dinghy.preset import SHIPPED, SMALL
from PIL import Image
from safetensors.torch import load_file, save_file


def _fresh(preset) -> Classifier:
    torch.manual_seed(0)
    return Classifier(preset).eval()


def test_a_ruler_reads_the_same_after_a_round_trip(tmp_path):
    model = _fresh(SMALL)
    save_ruler(tmp_path, model)
    again = load_ruler(tmp_path, SMALL)
    assert {value.dtype for value in load_file(tmp_path / WEIGHTS_FILE).values()} == {torch.float16}
    pictures = np.random.default_rng(0).integers(0, 256, (3, SMALL.px, SMALL.px, 3), np.uint8)
    assert read(again, pictures) == read(model.half().float(), pictures)


def test_a_missing_ruler_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="dinghy ruler --preset dinghy-1"):
        load_ruler(tmp_path, SMALL)


def test_another_presets_ruler_is_refused(tmp_path):
    save_ruler(tmp_path, _fresh(SMALL))
    with pytest.raises(ValueError, match="no ruler of dinghy-4"):
        load_ruler(tmp_path, SHIPPED)


def test_a_ruler_with_values_that_are_not_finite_is_refused(tmp_path):
    save_ruler(tmp_path, _fresh(SMALL))
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="not finite"):
        load_ruler(tmp_path, SMALL)


def _imported(path: Path) -> set[str]:
    """Every part of the names that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            found |= {part for name in names for part in name.split(".")}
    return found


def test_nothing_that_trains_serves_or_judges_imports_the_ruler():
    root = Path(mooring_server.__file__).parent
    found = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if _imported(path) & {"classifier", "ruler_dir"}
    }
    assert found == {f"dinghy/{name}.py" for name in ("export", "figures", "recipe")}


def test_the_shipped_ruler_reads_scenes_of_subjects_that_it_never_saw():
    model = load_ruler(dinghy.ruler_dir(), SHIPPED)
    for subject in dinghy.held_out_subjects():
        photos = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in subject.photos])
        scenes = [reading.scene for reading in read(model, photos)]
        wanted = [dinghy.PHOTO_SCENES[k % 3] for k in range(len(photos))]
        assert sum(a == b for a, b in zip(scenes, wanted, strict=True)) >= 11, subject.name
