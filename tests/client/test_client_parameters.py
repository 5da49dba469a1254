"""What the contract lets a caller say, both Python clients can say: each field of each request arrives.

The fields are read from the descriptors: a new call or field that the clients were not taught fails here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import mooring
import pytest
from google.api import field_behavior_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from mooring.v1 import adapter_pb2, job_pb2, personalization_pb2, subject_pb2
from scripted_server import ScriptedServer

CONTRACT = (adapter_pb2, job_pb2, personalization_pb2, subject_pb2)
METHODS: dict[str, MethodDescriptor] = {
    method.name: method
    for module in CONTRACT
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
NOT_SAID = {
    "parent": "the caller's own tenant; no other is allowed",
    "page_size": "pages are followed",
    "page_token": "pages are followed",
    "file": "announced by the client",
    "chunk": "cut by the client",
    "update_mask": "follows from what was given",
}
IDENTIFIER, OUTPUT_ONLY = field_behavior_pb2.IDENTIFIER, field_behavior_pb2.OUTPUT_ONLY


@dataclass(frozen=True)
class Call:
    """How both clients spell an RPC.

    Args:
        method: of the clients.
        needs: arguments without which it cannot be called.
        spelled: the argument that sets a field, where its name is another; None: there is but one value.
    """

    method: str
    needs: dict[str, Any] = field(default_factory=dict)
    spelled: dict[str, str | None] = field(default_factory=dict)


FILES = [("a.safetensors", b"x")]
ADAPTER = Call("", {"adapter": "rex"}, {"name": "adapter"})
JOB = Call("", {"job": "j"}, {"name": "job"})
SUBJECT = Call("", {"subject": "rex"}, {"name": "subject"})
CALLS = {
    "GetServerInfo": Call("server_info"),
    "Train": Call("train", {"subject": "rex"}),
    "Evaluate": Call("evaluate"),
    "Generate": Call("generate", {"prompt": "x"}),
    "RunBatch": Call("run_batch", {"rows": b"{}"}),
    "CreateSubject": Call(
        "create_subject",
        {"subject_id": "rex", "class_noun": "dog", "rights": "owned"},
        {"basis": "rights"},
    ),
    "UploadPhotos": Call("upload_photos", {"subject": "rex", "photos": [b"x"]}),
    "GetSubject": Call("get_subject", SUBJECT.needs, SUBJECT.spelled),
    "ListSubjects": Call("list_subjects"),
    "DeleteSubject": Call("delete_subject", SUBJECT.needs, SUBJECT.spelled),
    "GetAdapter": Call("get_adapter", ADAPTER.needs, ADAPTER.spelled),
    "ListAdapters": Call("list_adapters"),
    "DeleteAdapter": Call("delete_adapter", ADAPTER.needs, ADAPTER.spelled),
    "ExportAdapter": Call("export_adapter", ADAPTER.needs, ADAPTER.spelled | {"format": "file_format"}),
    "ImportAdapter": Call(
        "import_adapter", {"adapter_id": "rex", "files": FILES, "rights": "owned"}, {"basis": "rights"}
    ),
    "PublishAdapter": Call("publish_adapter", ADAPTER.needs, ADAPTER.spelled),
    "RollBackAdapter": Call("roll_back_adapter", ADAPTER.needs, ADAPTER.spelled),
    "DeleteAlias": Call("delete_alias", {"alias": "rex@live"}, {"name": "alias"}),
    "ListAliases": Call("list_aliases"),
    "ListAliasMoves": Call("list_alias_moves", ADAPTER.needs, ADAPTER.spelled),
    "GetGatePolicy": Call("gate_policy", {}, {"name": None}),
    "UpdateGatePolicy": Call("update_gate_policy"),
    "ListGateDecisions": Call("list_gate_decisions"),
    "GetJob": Call("get_job", JOB.needs, JOB.spelled),
    "ListJobs": Call("list_jobs"),
    "CancelJob": Call("cancel_job", JOB.needs, JOB.spelled),
    "WatchJob": Call("watch", JOB.needs, JOB.spelled),
    "GetEvaluation": Call("get_evaluation", JOB.needs, JOB.spelled),
    "DownloadArtifact": Call("download_artifact", {"job": "j", "filename": "f"}, JOB.spelled),
    "DownloadBatch": Call("download_batch", JOB.needs, JOB.spelled),
}
THE_SAME_AS_GENERATE = "GenerateBatch"


def settable(message: Descriptor, inside: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of the fields that a caller sets; a message that is not repeated is looked into."""
    for one in message.fields:
        behaviour = one.GetOptions().Extensions[field_behavior_pb2.field_behavior]
        if one.name in NOT_SAID or {IDENTIFIER, OUTPUT_ONLY} & set(behaviour):
            continue
        path = (*inside, one.name)
        if one.message_type is None or one.is_repeated:
            yield path
        else:
            yield from settable(one.message_type, path)


def descriptor_of(message: Descriptor, path: tuple[str, ...]) -> FieldDescriptor:
    first, *rest = path
    found = message.fields_by_name[first]
    return descriptor_of(found.message_type, tuple(rest)) if rest else found


def sample(one: FieldDescriptor) -> Any:
    """An argument that cannot be taken for the default."""
    if one.name == "more_adapters":
        return {"max": 0.5}
    if one.enum_type is not None:
        prefix = one.enum_type.values[0].name.removesuffix("UNSPECIFIED")
        value: Any = one.enum_type.values[1].name.removeprefix(prefix).lower()
    else:
        kinds = {FieldDescriptor.CPPTYPE_STRING: "x", FieldDescriptor.CPPTYPE_BOOL: True}
        value = kinds.get(one.cpp_type, 3)
    return [value] if one.is_repeated else value


def is_set(message: Message, path: tuple[str, ...]) -> bool:
    first, *rest = path
    if rest:
        return message.HasField(first) and is_set(getattr(message, first), tuple(rest))
    return first in {one.name for one, _ in message.ListFields()}


def first_of(result: Any) -> None:
    """Iterators make their call when they are asked."""
    if hasattr(result, "__next__"):
        next(result)


async def first_of_aio(result: Any) -> None:
    await (anext(result) if hasattr(result, "__anext__") else result)


FIELDS = [
    (name, path)
    for name, call in CALLS.items()
    for path in settable(METHODS[name].input_type)
    if call.spelled.get(path[-1], path[-1]) is not None
]


def test_every_call_of_the_contract_is_one_of_the_clients() -> None:
    assert {*CALLS, THE_SAME_AS_GENERATE} == METHODS.keys()
    batched = [path for path in settable(METHODS[THE_SAME_AS_GENERATE].input_type) if path != ("id",)]
    assert batched == [("request", *path) for name, path in FIELDS if name == "Generate"]


def test_both_clients_have_the_same_methods() -> None:
    def public(client: type) -> set[str]:
        return {name for name, _ in inspect.getmembers(client, callable) if not name.startswith("_")}

    assert public(mooring.Client) == public(mooring.aio.Client)


@pytest.mark.parametrize("kind", ["sync", "aio"])
@pytest.mark.parametrize(
    ("name", "path"), FIELDS, ids=lambda value: value if isinstance(value, str) else ".".join(value)
)
async def test_every_field_can_be_set(
    server: ScriptedServer, kind: str, name: str, path: tuple[str, ...]
) -> None:
    call, wanted = CALLS[name], METHODS[name].input_type
    argument = call.spelled.get(path[-1], path[-1])
    assert argument is not None
    arguments = dict(call.needs)
    arguments.setdefault(argument, sample(descriptor_of(wanted, path)))
    received: list[Message] = []

    def take(request: Any, context: Any) -> None:
        received.extend([request] if isinstance(request, Message) else request)
        context.abort(grpc.StatusCode.ABORTED, "That was all.")

    server.answers[name] = take
    if kind == "sync":
        with mooring.Client(server.target) as client, pytest.raises(mooring.errors.MooringError):
            first_of(getattr(client, call.method)(**arguments))
    else:
        async with mooring.aio.Client(server.target) as client:
            with pytest.raises(mooring.errors.MooringError):
                await first_of_aio(getattr(client, call.method)(**arguments))
    assert any(is_set(message, path) for message in received), f"{call.method}({argument}=…)"
