"""What the Kubernetes manifests promise, and that schemas and settings agree with them."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from jsonschema import ValidationError
from manifests import KUBERNETES, OPTIONAL, OVERLAYS, ROOT, VERSIONS, Overlay, check
from mooring_server.config import Settings
from mooring_server.rpc.probes import LIVE
from mooring_server.telemetry import traces

from tools import kube_apiserver

# beside the two that can be set: what closing sockets, the engine and the store may take
CLOSING_SECONDS = 10.0
REFUSALS = (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError)
DOCUMENT = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")


def settings_of(overlay: Overlay, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings that a pod's environment makes."""
    for name in list(os.environ):
        if name.startswith("MOORING_"):
            monkeypatch.delenv(name)
    secrets = {"MOORING_DATABASE_URL": "postgresql://h/d", "MOORING_OBJECTS_URL": "s3://bucket/prefix"}
    known = {f"MOORING_{name.upper()}" for name in Settings.model_fields}
    for name, value in overlay.environment.items():
        if name.startswith("MOORING_"):
            assert name in known, "the server would ignore it"
            monkeypatch.setenv(name, secrets[name] if value.startswith("secret ") else value)
    return Settings()


def test_every_overlay_is_tested():
    assert {path.name for path in OVERLAYS} == {"single-gpu", "replicas", "development"}


# ------------------------------------------------------------------------------------------------ schemas


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_known_to_the_last_field(overlay, version):
    assert len(overlay.objects) >= 9
    for document in overlay.objects:
        check(document, version)


def wrong_field(overlay: Overlay) -> dict:
    document = copy.deepcopy(overlay.one("StatefulSet"))
    document["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    return document


def wrong_type(overlay: Overlay) -> dict:
    document = copy.deepcopy(overlay.one("PodDisruptionBudget"))
    document["spec"]["maxUnavailable"] = [1]
    return document


def wrong_kind(overlay: Overlay) -> dict:
    return {**overlay.one("PodDisruptionBudget"), "kind": "PodDisruptionBudgets"}


@pytest.mark.parametrize("break_it", [wrong_field, wrong_type, wrong_kind])
def test_the_schemas_refuse_what_is_wrong(overlay, break_it):
    document = break_it(overlay)
    with pytest.raises(
        (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError)
    ) as refused:
        check(document, VERSIONS[-1])
    assert re.search(r"livenesProbe|not valid|PodDisruptionBudgets", refused.value.message)


def test_the_service_monitor_s_schema_refuses_what_is_wrong(rendered):
    objects = list(yaml.safe_load_all(rendered["single-gpu"]))
    monitor = Overlay("single-gpu", objects).one("ServiceMonitor")
    for change in ({"targetport": 1}, {"interval": 15}, {"scheme": "grpc"}):
        document = copy.deepcopy(monitor)
        document["spec"]["endpoints"][0] |= change
        with pytest.raises(ValidationError):
            check(document, VERSIONS[-1])


# ------------------------------------------------------------------------------------------------ settings


def test_the_environment_makes_settings_that_others_can_reach_only_with_credentials(overlay, monkeypatch):
    settings = settings_of(overlay, monkeypatch)
    assert Path(settings.state_dir) == Path("/var/lib/mooring")
    ports = {port["name"]: port["containerPort"] for port in overlay.container["ports"]}
    addresses = {
        "grpc": settings.listen,
        "metrics": settings.metrics_listen,
        "health": settings.health_listen,
    }
    assert {name: int(address.rpartition(":")[2]) for name, address in addresses.items()} == ports
    assert settings.health_listen.startswith("0.0.0.0:"), "the kubelet asks from the node"
    if overlay.name == "development":
        assert settings.listen.startswith("127.0.0.1:")
    else:
        assert settings.listen.startswith("0.0.0.0:")
        assert settings.auth
        assert settings.tls_cert


def test_a_pod_is_given_longer_than_the_drain_takes(overlay, monkeypatch):
    settings = settings_of(overlay, monkeypatch)
    drain = settings.drain_pause_seconds + settings.drain_seconds + CLOSING_SECONDS
    assert overlay.pod["spec"]["terminationGracePeriodSeconds"] > drain


def test_replicas_share_their_state_and_a_single_server_keeps_its_own(overlay, monkeypatch):
    settings = settings_of(overlay, monkeypatch)
    spec = overlay.one("StatefulSet")["spec"]
    if overlay.name == "replicas":
        assert spec["replicas"] > 1
        assert settings.storage_url.startswith("postgresql://")
        assert settings.objects_url.startswith("s3://")
        assert "volumeClaimTemplates" not in spec
        state = next(v for v in overlay.pod["spec"]["volumes"] if v["name"] == "state")
        assert settings.disk_cache_bytes < _bytes(state["emptyDir"]["sizeLimit"])
    else:
        assert spec["replicas"] == 1
        assert [claim["metadata"]["name"] for claim in spec["volumeClaimTemplates"]] == ["state"]


def _bytes(text: str) -> int:
    return int(text.removesuffix("Gi")) * 2**30


# ------------------------------------------------------------------------------------------------ probes


def test_probes_ask_the_health_port_and_liveness_asks_for_the_process_alone(overlay):
    from mooring_server.server import _SERVICES

    ports = {port["name"]: port["containerPort"] for port in overlay.container["ports"]}
    probes = {kind: overlay.container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
    assert {probe["grpc"]["port"] for probe in probes.values()} == {ports["health"]}
    assert probes["liveness"]["grpc"]["service"] == LIVE
    assert probes["readiness"]["grpc"]["service"] in _SERVICES
    assert probes["startup"]["grpc"].get("service", "") == "", "every service, once the weights are resident"
    startup = probes["startup"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
    readiness, pause = probes["readiness"], 10
    assert readiness["periodSeconds"] * readiness["failureThreshold"] <= pause


# ------------------------------------------------------------------------------------------------ security


def test_pods_are_restricted(overlay):
    spec, container = overlay.pod["spec"], overlay.container
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] >= 10000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
    assert "initContainers" not in spec
    labels = overlay.one("Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_whatever_the_server_writes_to_has_a_volume_and_temporary_ones_a_limit(overlay, monkeypatch):
    settings = settings_of(overlay, monkeypatch)
    writable = {m["mountPath"] for m in overlay.container["volumeMounts"] if not m.get("readOnly")}
    assert writable == {str(settings.state_dir), "/tmp", "/var/cache/mooring"}
    for volume in overlay.pod["spec"]["volumes"]:
        if "emptyDir" in volume:
            assert volume["emptyDir"]["sizeLimit"], volume["name"]


def test_secrets_are_named_and_never_written(overlay):
    assert not overlay.all("Secret")
    named = {
        volume["secret"]["secretName"] for volume in overlay.pod["spec"]["volumes"] if "secret" in volume
    }
    for variable in overlay.container.get("env", []):
        assert "value" not in variable
        named.add(variable["valueFrom"]["secretKeyRef"]["name"])
    for name in named:
        assert f"`{name}`" in DOCUMENT, "docs/deploy.md tells how to make it"
    for value in overlay.one("ConfigMap")["data"].values():
        assert not re.search(r"://[^/]*:[^/]*@", value), "a password"


def test_images_are_pinned_by_digest_but_for_development(overlay):
    image = overlay.container["image"]
    if overlay.name == "development":
        assert image == "mooring:dev"
    else:
        assert re.fullmatch(r"[\w./-]+@sha256:[0-9a-f]{64}", image)


# ------------------------------------------------------------------------------------------------ network


def test_nothing_is_allowed_but_what_is_named(overlay):
    policies = {each["metadata"]["name"]: each["spec"] for each in overlay.all("NetworkPolicy")}
    deny = policies.pop("default-deny")
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ports = {port["name"] for port in overlay.container["ports"]}
    allowed = set()
    for name, spec in policies.items():
        assert spec["podSelector"]["matchLabels"].items() <= overlay.pod["metadata"]["labels"].items(), name
        for direction in ("ingress", "egress"):
            for rule in spec.get(direction, []):
                assert rule["ports"], f"{name} opens every port"
                if direction == "ingress":
                    assert rule["from"], f"{name} is open to everybody"
                    assert all("namespaceSelector" in peer and "podSelector" in peer for peer in rule["from"])
                    assert {port["port"] for port in rule["ports"]} <= ports
                allowed |= {(direction, port["port"]) for port in rule["ports"]}
    expected = {("ingress", "grpc"), ("egress", 53)}
    if overlay.name != "development":
        expected |= {("ingress", "metrics")}
    if overlay.name == "replicas":
        expected |= {("egress", 5432), ("egress", 443)}
    assert allowed == expected


def test_selectors_find_the_pods_and_ports_exist(overlay):
    labels = overlay.pod["metadata"]["labels"]
    ports = {port["name"] for port in overlay.container["ports"]}
    for service in overlay.all("Service"):
        assert service["spec"]["selector"].items() <= labels.items()
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    stateful = overlay.one("StatefulSet")["spec"]
    headless = overlay.one("Service", stateful["serviceName"])["spec"]
    assert headless["clusterIP"] == "None"
    selecting = [stateful["selector"], overlay.one("PodDisruptionBudget")["spec"]["selector"]]
    selecting += [each["labelSelector"] for each in overlay.pod["spec"]["topologySpreadConstraints"]]
    for selector in selecting:
        assert selector["matchLabels"].items() <= labels.items()
        assert selector["matchLabels"]
    for monitor in overlay.all("ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"]
        found = [s for s in overlay.all("Service") if wanted.items() <= s["metadata"]["labels"].items()]
        (port,) = [endpoint["port"] for endpoint in monitor["spec"]["endpoints"]]
        scraped = [s for s in found if port in {each["name"] for each in s["spec"]["ports"]}]
        assert len(scraped) == 1, "each pod once"


def test_traces_find_a_way_out_to_the_collector_that_is_named(tmp_path, monkeypatch):
    wanted = {
        "resources": [os.path.relpath(KUBERNETES / "overlays" / "single-gpu", tmp_path)],
        "components": [os.path.relpath(OPTIONAL, tmp_path)],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(wanted), encoding="utf-8")
    overlay = Overlay("own", [each for each in yaml.safe_load_all(kube_apiserver.render(tmp_path)) if each])
    for document in overlay.objects:
        check(document, VERSIONS[-1])
    variables = {name: value for name, value in overlay.environment.items() if name.startswith("OTEL_")}
    host, _, port = variables["OTEL_EXPORTER_OTLP_ENDPOINT"].removeprefix("http://").partition(":")
    (rule,) = overlay.one("NetworkPolicy", "mooring-traces")["spec"]["egress"]
    assert [each["port"] for each in rule["ports"]] == [int(port)]
    (peer,) = rule["to"]
    names = peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert host == f"otel-collector.{names}"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tracing = traces.from_environment("0")
    assert tracing.on
    tracing.close(1.0)
    commented = (KUBERNETES / "base" / "kustomization.yaml").read_text(encoding="utf-8")
    for name, value in variables.items():
        assert f"# - {name}={value}\n" in commented


# ------------------------------------------------------------------------------------------------ operation


def test_a_rollout_needs_no_spare_device_and_a_drain_takes_one_pod_at_a_time(overlay):
    # no surge by construction: a StatefulSet makes a pod only when its predecessor is gone
    spec = overlay.one("StatefulSet")["spec"]
    assert spec["updateStrategy"] == {"type": "RollingUpdate"}
    assert not overlay.all("Deployment")
    assert overlay.one("PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_pods_ask_for_what_they_use(overlay):
    resources = overlay.container["resources"]
    assert {"cpu", "memory", "ephemeral-storage"} <= set(resources["requests"])
    assert {"memory", "ephemeral-storage"} <= set(resources["limits"])
    assert "cpu" not in resources["limits"], "throttling stalls every caller at once"
    device = resources["limits"].get("nvidia.com/gpu")
    assert device == (None if overlay.name == "development" else "1")
    assert (overlay.environment.get("MOORING_DEVICE") == "cuda:0") == (device == "1")
    name = overlay.pod["spec"]["priorityClassName"]
    assert overlay.one("PriorityClass", name)["value"] < 1_000_000_000


def test_a_changed_setting_replaces_the_pods(overlay):
    assert re.fullmatch(r"mooring-[a-z0-9]{10}", overlay.one("ConfigMap")["metadata"]["name"])


def test_every_file_of_kubernetes_is_used():
    listed = {path.relative_to(KUBERNETES).as_posix() for path in KUBERNETES.rglob("*.yaml")}
    used: set[str] = set()
    waiting = [*OVERLAYS, OPTIONAL]
    while waiting:
        folder = waiting.pop()
        content = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
        used.add((folder / "kustomization.yaml").resolve().relative_to(KUBERNETES).as_posix())
        patches = [each["path"] for each in content.get("patches", []) if "path" in each]
        for name in [*content.get("resources", []), *content.get("components", []), *patches]:
            path = (folder / name).resolve()
            if path.is_dir():
                waiting.append(path)
            else:
                used.add(path.relative_to(KUBERNETES).as_posix())
    assert used == listed
