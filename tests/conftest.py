"""Fixtures shared by all areas: tiny base models with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tiny_bases import save_tiny_sd, save_tiny_sdxl

# How long an example takes depends on what else the machine does: it is no reason to fail.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD1.5-layout directory with random weights."""
    return save_tiny_sd(tmp_path_factory.mktemp("tiny_sd15"))


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL-layout directory with random weights."""
    return save_tiny_sdxl(tmp_path_factory.mktemp("tiny_sdxl"))


@pytest.fixture(scope="session")
def tiny_sd_deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD layout with v-prediction and a VAE of factor 8 with 16 latent channels."""
    return save_tiny_sd(tmp_path_factory.mktemp("tiny_sd_deep"), prediction_type="v_prediction", vae="deep")
