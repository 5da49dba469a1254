"""Kubernetes objects of an overlay, and what judges them without a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.parent for path in (KUBERNETES / "overlays").glob("*/kustomization.yaml"))
OPTIONAL = KUBERNETES / "components" / "tracing"
"""A component that no overlay of ours has."""
CRD = Path(__file__).parent / "servicemonitor.crd.yaml"
VERSIONS = ("1.30", "1.36")
"""The oldest Kubernetes that the manifests are for, and the newest that was tried."""


@dataclass(frozen=True)
class Overlay:
    """Its name and its objects."""

    name: str
    objects: list[dict[str, Any]]

    def all(self, kind: str) -> list[dict[str, Any]]:
        """Objects of a kind."""
        return [each for each in self.objects if each["kind"] == kind]

    def one(self, kind: str, name: str = "mooring") -> dict[str, Any]:
        """The object of a kind and name."""
        (found,) = [each for each in self.all(kind) if each["metadata"]["name"].startswith(name)]
        return found

    @property
    def pod(self) -> dict[str, Any]:
        """The pod template of the servers."""
        return self.one("StatefulSet")["spec"]["template"]

    @property
    def container(self) -> dict[str, Any]:
        """The server's container."""
        (found,) = self.pod["spec"]["containers"]
        return found

    @property
    def environment(self) -> dict[str, str]:
        """The variables it gets; those from a secret as `secret NAME/KEY`."""
        values: dict[str, str] = {}
        for source in self.container["envFrom"]:
            values |= self.one("ConfigMap", source["configMapRef"]["name"])["data"]
        for variable in self.container.get("env", []):
            secret = variable["valueFrom"]["secretKeyRef"]
            values[variable["name"]] = f"secret {secret['name']}/{secret['key']}"
        return values


def check(document: dict[str, Any], version: str) -> None:
    """Refuse what the schema of Kubernetes, or ours of the ServiceMonitor, does not know to the last field.

    A kind without a schema is refused too: the tool's command would only warn.
    """
    if document["kind"] != "ServiceMonitor":
        kubernetes_validate.validate(document, version, strict=True)
        return
    crd = yaml.safe_load(CRD.read_text(encoding="utf-8"))
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    jsonschema.validate({"spec": document["spec"]}, _closed(schema))


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with unknown properties refused everywhere, as strict validation on the server does."""
    made = {key: value for key, value in schema.items() if key not in {"properties", "items"}}
    if "properties" in schema:
        made["properties"] = {key: _closed(value) for key, value in schema["properties"].items()}
        made["additionalProperties"] = False
    if "items" in schema:
        made["items"] = _closed(schema["items"])
    return made
