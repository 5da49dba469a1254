"""Fixtures shared by all areas: tiny base models with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_bases import save_tiny_sd, save_tiny_sdxl


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD1.5-layout directory with random weights."""
    return save_tiny_sd(tmp_path_factory.mktemp("tiny_sd15"))


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL-layout directory with random weights."""
    return save_tiny_sdxl(tmp_path_factory.mktemp("tiny_sdxl"))
