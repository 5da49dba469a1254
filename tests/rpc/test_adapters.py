"""AdapterService on a real server."""

from __future__ import annotations

import hashlib

import pytest
from mooring.v1 import adapter_pb2 as pb
from mooring_server.engine.adapters import from_safetensors
from rpc_calls import DEADLINE, failure_of, publish
from safetensors.torch import load


def get(stubs, name):
    return stubs.adapters.GetAdapter(pb.GetAdapterRequest(name=name), timeout=DEADLINE).adapter


def delete(stubs, name):
    return stubs.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name=name), timeout=DEADLINE)


def export(stubs, name, form=pb.ADAPTER_FORMAT_UNSPECIFIED) -> dict[str, bytes]:
    files, headers = {}, {}
    for message in stubs.adapters.ExportAdapter(
        pb.ExportAdapterRequest(name=name, format=form), timeout=DEADLINE
    ):
        if message.HasField("file"):
            current = message.file.filename
            headers[current], files[current] = message.file, b""
        else:
            assert 0 < len(message.chunk) <= 2**20
            files[current] += message.chunk
    for filename, data in files.items():
        assert len(data) == headers[filename].size_bytes
        assert hashlib.sha256(data).hexdigest() == headers[filename].sha256
    return files


def test_an_adapter_is_described(stubs, runtime):
    row = publish(runtime, "plain")
    adapter = get(stubs, "tenants/local/adapters/plain")
    assert adapter.name == "tenants/local/adapters/plain@1"
    assert (adapter.version, adapter.rank, adapter.digest) == (1, 4, row.digest)
    assert adapter.base_digest == runtime.base.digest
    assert (adapter.placeholder, adapter.class_noun, adapter.method) == ("<rex>", "dog", "spectral")
    assert adapter.drift_budget == 0.12
    assert not adapter.HasField("drift")
    assert get(stubs, "tenants/-/adapters/plain@1") == adapter


def test_the_native_export_is_the_adapter_again(stubs, runtime):
    row = publish(runtime, "travel")
    files = export(stubs, "tenants/-/adapters/travel@1")
    assert list(files) == ["travel-1.safetensors"]
    assert from_safetensors(files["travel-1.safetensors"], runtime.base).digest == row.digest


def test_the_diffusers_export_has_its_files(stubs, runtime):
    publish(runtime, "abroad")
    files = export(stubs, "tenants/-/adapters/abroad", pb.ADAPTER_FORMAT_DIFFUSERS)
    assert {"pytorch_lora_weights.safetensors", "learned_embeds.safetensors", "README.txt"} <= files.keys()
    assert all(key.startswith("unet.") for key in load(files["pytorch_lora_weights.safetensors"]))


def test_versions_are_listed_in_pages_newest_first(stubs, runtime):
    for seed in range(3):
        publish(runtime, "many", seed=seed)
    found, token = [], ""
    while True:
        request = pb.ListAdaptersRequest(page_size=2, page_token=token)
        page = stubs.adapters.ListAdapters(request, timeout=DEADLINE)
        found += [adapter.name for adapter in page.adapters]
        token = page.next_page_token
        if not token:
            break
    assert len(found) == len(set(found))
    versions = [name.rpartition("@")[2] for name in found if "/many@" in name]
    assert versions == ["3", "2", "1"]


def test_deleting_a_version_leaves_the_others_and_its_number_is_not_given_again(stubs, runtime):
    for seed in range(2):
        publish(runtime, "doomed", seed=seed)
    delete(stubs, "tenants/-/adapters/doomed@2")
    assert failure_of(lambda: get(stubs, "tenants/-/adapters/doomed@2")).reason == "ADAPTER_NOT_FOUND"
    assert get(stubs, "tenants/-/adapters/doomed").version == 1
    assert publish(runtime, "doomed", seed=9).version == 3
    delete(stubs, "tenants/-/adapters/doomed")
    assert failure_of(lambda: get(stubs, "tenants/-/adapters/doomed")).reason == "ADAPTER_NOT_FOUND"
    again = failure_of(lambda: delete(stubs, "tenants/-/adapters/doomed"))
    assert again.reason == "ADAPTER_NOT_FOUND"


@pytest.mark.parametrize("bad", ["plain", "plain@0", "plain@-x", "p@1@2", "Plain", ""])
def test_bad_names(stubs, bad):
    name = bad if bad == "plain" else f"tenants/-/adapters/{bad}"
    for call in (get, export):
        failure = failure_of(lambda call=call: call(stubs, name))
        assert (failure.code.name, failure.reason) == ("INVALID_ARGUMENT", "BAD_RESOURCE_NAME")


def test_exports_are_refused_where_they_should_be(stubs, runtime):
    publish(runtime, "rivals", tenant="rival")
    for name in ("tenants/rival/adapters/rivals@1", "tenants/local/adapters/rivals@1"):
        assert failure_of(lambda name=name: export(stubs, name)).reason == "ADAPTER_NOT_FOUND"
    assert failure_of(lambda: export(stubs, "tenants/-/adapters/x", 9)).reason == "INVALID_FIELD"
    row = publish(runtime, "lost", seed=77)
    runtime.objects.delete(row.object_key)
    assert failure_of(lambda: export(stubs, "tenants/-/adapters/lost")).reason == "ADAPTER_NOT_FOUND"
