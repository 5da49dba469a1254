"""The overlays as kustomize renders them."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from manifests import OVERLAYS, Overlay

from tools import kube_apiserver


@pytest.fixture(scope="session")
def rendered() -> dict[str, str]:
    """The YAML documents of each overlay."""
    return {path.name: kube_apiserver.render(path) for path in OVERLAYS}


@pytest.fixture(params=[path.name for path in OVERLAYS])
def overlay(request: pytest.FixtureRequest, rendered: dict[str, str]) -> Overlay:
    """One overlay's objects."""
    objects: list[dict[str, Any]] = [each for each in yaml.safe_load_all(rendered[request.param]) if each]
    return Overlay(request.param, objects)
