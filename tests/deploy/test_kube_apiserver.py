"""Every overlay, as a strict dry run on a real API server (etcd and kube-apiserver built from Go modules)."""

from __future__ import annotations

import os
import shutil

import pytest
import yaml
from manifests import CRD, OVERLAYS

from tools import kube_apiserver

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]


@pytest.fixture(scope="module")
def config():
    """A fresh API server that knows ServiceMonitors. The first time it is built, in about 13 minutes."""
    if not kube_apiserver.built():
        if shutil.which("go") is None and not os.environ.get("CI"):
            pytest.skip("Go builds the API server, and is not on the PATH")
        kube_apiserver.build()
    with kube_apiserver.running() as config:
        done = kube_apiserver.kubectl(config, "apply", "-f", str(CRD))
        assert done.returncode == 0, done.stderr
        wait = ("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
        done = kube_apiserver.kubectl(config, *wait)
        assert done.returncode == 0, done.stderr
        yield config


@pytest.mark.parametrize("name", [path.name for path in OVERLAYS])
def test_the_server_accepts_every_object(config, rendered, name):
    said = kube_apiserver.accepted(config, rendered[name], "mooring")
    objects = [each for each in yaml.safe_load_all(rendered[name]) if each]
    assert len(said.splitlines()) == len(objects)


PLANTED = {
    "an unknown field": ("livenessProbe:", "livenesProbe:", "livenesProbe"),
    "a value out of range": (
        "terminationGracePeriodSeconds: 90",
        "terminationGracePeriodSeconds: -1",
        "must be",
    ),
    "a pod that may be root": ("runAsNonRoot: true", "runAsNonRoot: false", "runAsNonRoot"),
    "an unknown field of a custom kind": ("scrapeTimeout:", "scrapetimeout:", "scrapetimeout"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_the_server_refuses_what_is_wrong(config, rendered, what):
    right, wrong, named = PLANTED[what]
    manifests = rendered["single-gpu"]
    assert right in manifests
    with pytest.raises(kube_apiserver.ToolError, match=named):
        kube_apiserver.accepted(config, manifests.replace(right, wrong), "mooring")
