"""Bases are shared by the session (their weights never change: a test proves it); banks are made per test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mooring_server.engine.bank import AdapterBank
from mooring_server.engine.base import BaseModel, load_base
from tiny_bases import save_tiny_sd


@pytest.fixture(scope="session")
def tiny_sd_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD layout with v-prediction and an AutoencoderTiny of 6 latent channels."""
    return save_tiny_sd(tmp_path_factory.mktemp("tiny_sd_v"), prediction_type="v_prediction", vae="tiny")


@pytest.fixture(scope="session")
def base(tiny_sd15: Path) -> BaseModel:
    return load_base(tiny_sd15, threads=1)


@pytest.fixture(scope="session")
def base_v(tiny_sd_v: Path) -> BaseModel:
    return load_base(tiny_sd_v, threads=1)


@pytest.fixture(scope="session")
def base_sdxl(tiny_sdxl: Path) -> BaseModel:
    return load_base(tiny_sdxl, threads=1)


@pytest.fixture
def make_bank() -> Iterator[Callable[..., AdapterBank]]:
    """Banks whose hooks are taken off the shared base when the test ends."""
    made: list[AdapterBank] = []

    def make(base: BaseModel, **options: Any) -> AdapterBank:
        made.append(AdapterBank(base, **options))
        return made[-1]

    yield make
    for bank in made:
        bank.close()


@pytest.fixture
def bank(base: BaseModel, make_bank: Callable[..., AdapterBank]) -> AdapterBank:
    return make_bank(base, slots=4, rank=8)
