"""The contract as a file: lint, breaking changes, stale stubs, and what it says beside what the code does."""

from __future__ import annotations

import os
import re
import shutil

import pytest
from google.api import field_behavior_pb2, resource_pb2
from mooring.v1 import (
    adapter_pb2,
    errors_pb2,
    evaluation_pb2,
    gate_pb2,
    job_pb2,
    media_pb2,
    personalization_pb2,
    subject_pb2,
    training_pb2,
)
from mooring_server.errors import REASON_CODE, Reason

from tools import protos

MODULES = (
    adapter_pb2,
    errors_pb2,
    evaluation_pb2,
    gate_pb2,
    job_pb2,
    media_pb2,
    personalization_pb2,
    subject_pb2,
    training_pb2,
)
CONTRACT = protos.PROTO / "mooring" / "v1"


@pytest.fixture
def changed(tmp_path):
    """A copy of the contract to spoil."""
    copy = tmp_path / "proto"
    shutil.copytree(protos.PROTO, copy)
    return copy


def _replace(proto, file, old, new):
    path = proto / "mooring" / "v1" / file
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} is no longer in {file}"
    path.write_text(text.replace(old, new))


def test_lint_passes():
    done = protos.lint()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("  // The new job.\n  Job job = 1;\n}\n\n// Request of PersonalizationService.Evaluate.",
         "  Job job = 1;\n}\n\n// Request of PersonalizationService.Evaluate.", "comment"),
        ("  SAMPLER_DDIM = 1;", "  DDIM = 1;", "prefixed"),
    ],
)  # fmt: skip
def test_lint_notices(changed, old, new, rule):
    _replace(changed, "personalization.proto", old, new)
    done = protos.lint(changed)
    assert done.returncode != 0
    assert rule in done.stdout


def test_lint_notices_unformatted_files(changed):
    _replace(changed, "errors.proto", "enum ErrorReason {", "enum   ErrorReason {")
    assert protos.lint(changed).returncode != 0


def test_nothing_breaks_the_contract_given_out():
    done = protos.breaking()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("int32 preview_interval = 12", "int32 preview_interval = 13"),
        ("string prompt = 1 [", "bytes prompt = 1 ["),
        ("rpc Generate(GenerateRequest) returns (stream GenerateResponse)",
         "rpc Generate(GenerateRequest) returns (GenerateResponse)"),
    ],
)  # fmt: skip
def test_a_breaking_change_is_noticed(changed, old, new):
    _replace(changed, "personalization.proto", old, new)
    assert protos.breaking(changed).returncode != 0


def test_a_new_field_breaks_nothing(changed):
    _replace(
        changed,
        "media.proto",
        "  bool last = 10 [",
        "  // New.\n  bool a = 11;\n  // True for the chunk that completes the image.\n  bool last = 10 [",
    )
    done = protos.breaking(changed)
    assert done.returncode == 0, done.stdout + done.stderr


def test_committed_stubs_are_those_of_the_contract(tmp_path):
    protos.generate(tmp_path)
    fresh = {p.name: p.read_bytes() for p in (tmp_path / "mooring" / "v1").iterdir()}
    kept = {p.name: p.read_bytes() for p in (protos.STUBS / "mooring" / "v1").iterdir() if p.is_file()}
    assert sorted(fresh) == sorted(kept)
    stale = [name for name in fresh if fresh[name] != kept[name]]
    assert not stale, f"run `python -m tools.protos generate`: {stale}"


def test_committed_go_stubs_are_those_of_the_contract(tmp_path):
    if shutil.which("go") is None:
        if os.environ.get("MOORING_TEST_GO") == "require":
            pytest.fail("MOORING_TEST_GO=require, and there is no Go on the PATH")
        pytest.skip("no Go on the PATH: whether the Go stubs are stale was not checked")
    protos.generate_go(tmp_path)
    fresh = {p.name: p.read_bytes() for p in (tmp_path / protos.GO_PACKAGE).iterdir()}
    kept = {p.name: p.read_bytes() for p in (protos.GO_STUBS / protos.GO_PACKAGE).iterdir()}
    assert sorted(fresh) == sorted(kept)
    stale = [name for name in fresh if fresh[name] != kept[name]]
    assert not stale, f"run `python -m tools.protos generate`: {stale}"


def test_error_reasons_are_the_servers():
    names = {name.removeprefix("ERROR_REASON_") for name, _ in errors_pb2.ErrorReason.items()}
    assert names - {"UNSPECIFIED"} == {reason.value for reason in Reason}


def test_each_reason_is_documented_with_its_status_code():
    text = (CONTRACT / "errors.proto").read_text()
    comment = r"// ([A-Z_]+): (?:[^\n]*\n  //)*[^\n]*\n  ERROR_REASON_([A-Z_]+) ="
    documented = {name: code for code, name in re.findall(comment, text)}
    assert documented == {reason.value: code.value for reason, code in REASON_CODE.items()}


def _messages():
    def walk(message):
        yield message
        for nested in message.nested_types:
            yield from walk(nested)

    for module in MODULES:
        for message in module.DESCRIPTOR.message_types_by_name.values():
            yield from walk(message)


def test_every_request_field_says_whether_it_is_required():
    unsaid = [
        field.full_name
        for message in _messages()
        if message.name.endswith("Request")
        for field in message.fields
        if not field.containing_oneof and not field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
    ]
    assert not unsaid


def test_every_resource_has_the_pattern_of_its_name_field():
    resources = {}
    for message in _messages():
        resource = message.GetOptions().Extensions[resource_pb2.resource]
        if resource.type:
            resources[message.name] = resource.pattern[0]
    assert resources == {
        "Subject": "tenants/{tenant}/subjects/{subject}",
        "Adapter": "tenants/{tenant}/adapters/{adapter}@{version}",
        "GatePolicy": "tenants/{tenant}/gatePolicy",
        "GateDecision": "tenants/{tenant}/gateDecisions/{gate_decision}",
        "Job": "tenants/{tenant}/jobs/{job}",
    }


def test_documented_training_defaults_are_the_trainers():
    from mooring_server.training.config import TrainConfig

    text = (CONTRACT / "training.proto").read_text()
    documented = re.findall(r"Default: ([\d.]+|true|false)\.\n  optional (\w+) (\w+) =", text)
    kinds = {"int32": int, "uint64": int, "double": float, "bool": lambda value: value == "true"}
    assert len(documented) == 13
    defaults = TrainConfig()
    assert {name: kinds[kind](value) for value, kind, name in documented} == {
        name: getattr(defaults, name) for _, _, name in documented
    }


def test_documented_generation_defaults_are_the_engines():
    from mooring_server.engine.requests import AdapterUse, GenerationRequest

    text = (CONTRACT / "personalization.proto").read_text()
    documented = re.findall(r"Default: ([\d.]+)\.\n  optional (\w+) (\w+) =", text)
    assert len(documented) == 6
    default, use = GenerationRequest(prompt=""), AdapterUse(weights=None)
    for value, _, name in documented:
        engine = use.scale if name in {"adapter_scale", "scale"} else getattr(default, name)
        assert float(value) == engine, name


def test_documented_evaluation_defaults_are_the_evaluators():
    from mooring_server.evaluation.config import EvaluationConfig

    text = (CONTRACT / "evaluation.proto").read_text()
    documented = re.findall(r"Default: ([\d.]+)\.\n  optional (\w+) (\w+) =", text)
    assert len(documented) == 4
    for value, _, name in documented:
        assert float(value) == getattr(EvaluationConfig(), name), name


def test_the_documented_reasons_are_all_of_them_with_their_codes():
    text = (protos.ROOT / "docs" / "api.md").read_text()
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \|", text, re.MULTILINE))
    assert rows == {reason.value: code.value for reason, code in REASON_CODE.items()}


def test_the_documented_calls_are_all_of_them():
    text = (protos.ROOT / "docs" / "api.md").read_text()
    services = [s for module in MODULES for s in module.DESCRIPTOR.services_by_name.values()]
    for service in services:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{service.name}` |"))
        documented = re.findall(r"`([A-Za-z]+)`", row)[1:]
        assert sorted(documented) == sorted(method.name for method in service.methods)
