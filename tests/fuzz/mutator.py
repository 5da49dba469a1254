"""Requests that are nearly right, made from the contract's descriptors.

`calls` draws what one call sends: messages that the server would take, with a few fields made extreme; the
files that an upload carries, with a few bytes changed and their digests right again, so that they get past
the door; now and then messages left out, doubled or exchanged; and damage that only the wire can carry
(bytes that are no UTF-8, unknown fields, a field of another type, a cut end, groups in groups).

Messages, fields and calls that the contract gains are covered without a change here: `Hints` only adds what
descriptors cannot know, such as names that exist and words that a prompt may hold.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.api import field_behavior_pb2, resource_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

F = FieldDescriptor
_BEHAVIOR = field_behavior_pb2.field_behavior
STREAM = 6
"""Most messages of a stream that is no upload; files of one."""
_INTEGERS = {
    F.TYPE_INT32: (-(2**31), 2**31 - 1),
    F.TYPE_SINT32: (-(2**31), 2**31 - 1),
    F.TYPE_SFIXED32: (-(2**31), 2**31 - 1),
    F.TYPE_INT64: (-(2**63), 2**63 - 1),
    F.TYPE_SINT64: (-(2**63), 2**63 - 1),
    F.TYPE_SFIXED64: (-(2**63), 2**63 - 1),
    F.TYPE_UINT32: (0, 2**32 - 1),
    F.TYPE_FIXED32: (0, 2**32 - 1),
    F.TYPE_UINT64: (0, 2**64 - 1),
    F.TYPE_FIXED64: (0, 2**64 - 1),
}
_FLOATS = [0.0, -0.0, 0.12, 1.0, -1.0, 2.0, 30.0, float("nan"), float("inf"), -float("inf"), 1e308, 5e-324]
_NASTY = [
    "",
    " ",
    "\0",
    "a\0b",
    "\ud7ff\ue000\U0010ffff",
    "../../etc/passwd",
    "%s%n{}{0}$(x)`x`'\";--",
    "\u202eabc\u200b",
    "é" * 300,
    "a" * 70_000,
    "<rex>" * 50,
    "<" + "漢" * 1000 + ">",
    "\U0001f600" * 60,
    "\r\nx: y",
]
_DEPTH = 4
_LARGE = b"\0" * (5 * 2**20)
"""More than the server takes in one message."""


@dataclass(frozen=True)
class Hints:
    """What the descriptors cannot know.

    Attributes:
        good: values that get far, by "Message.field" or by field name; a list among them is a whole repeated
            field.
        needed: "Message.field" of what the contract calls optional and no call gets far without.
        names: resource names that exist or nearly do, by resource type.
        files: (name, content) that an upload may carry, by method name; those of "" for any other.
        keys: credentials, the first one that of the calls that shall get far.
    """

    good: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    needed: frozenset[str] = frozenset()
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    files: Mapping[str, Sequence[tuple[str, bytes]]] = field(default_factory=dict)
    keys: Sequence[str] = ("",)


@st.composite
def calls(draw: st.DrawFn, method: MethodDescriptor, hints: Hints) -> list[bytes]:
    """The encoded messages of one call: exactly one where the method takes no stream."""
    kind = method.input_type
    # from "everything as it should be" to "everything drawn at random"
    wild = draw(st.sampled_from([0, 0, 0, 0, 1, 1, 3, 10]))
    if not method.client_streaming:
        sent = [_filled(draw, kind, hints, 0, wild).SerializePartialToString()]
    elif {"file", "chunk"} <= set(kind.fields_by_name):
        sent = _upload(draw, method, hints, wild)
    else:
        sent = []
        for number in range(draw(st.integers(0 if wild else 1, STREAM))):
            message = _filled(draw, kind, hints, 0, wild)
            if "id" in kind.fields_by_name and draw(st.integers(0, 9)) >= wild:
                message.id = f"r{number}"
            sent.append(message.SerializePartialToString())
    if method.client_streaming and sent and _rarely(draw):
        sent = _disorder(draw, sent)
    if sent and _rarely(draw):
        victim = draw(st.integers(0, len(sent) - 1))
        sent[victim] = _damage(sent[victim], draw(_damages(kind)))
    return sent


def _rarely(draw: st.DrawFn) -> bool:
    """One time in ten or so; a number in the middle, as hypothesis likes the ends of a range."""
    return draw(st.integers(0, 10)) == 4


# ------------------------------------------------------------------------------------------------ messages


def _filled(draw: st.DrawFn, descriptor: Descriptor, hints: Hints, depth: int, wild: int) -> Any:
    """A message that protobuf itself would encode; `wild` of its fields in ten are extreme."""
    message = GetMessageClass(descriptor)()
    chosen: dict[str, FieldDescriptor] = {}
    for each in descriptor.fields:
        behaviors = each.GetOptions().Extensions[_BEHAVIOR]
        oneof = each.containing_oneof
        if field_behavior_pb2.OUTPUT_ONLY in behaviors and draw(st.integers(0, 9)) >= wild:
            continue
        if oneof is not None and len(oneof.fields) > 1:
            chosen[oneof.full_name] = draw(st.sampled_from(list(oneof.fields)))
        elif draw(st.integers(0, 19)) < (20 - wild if _needed(each, hints) else 6):
            chosen[each.full_name] = each
    for each in chosen.values():
        _set(draw, message, each, hints, depth, wild)
    return message


def _needed(each: FieldDescriptor, hints: Hints) -> bool:
    behaviors = each.GetOptions().Extensions[_BEHAVIOR]
    return field_behavior_pb2.REQUIRED in behaviors or (
        f"{each.containing_type.name}.{each.name}" in hints.needed
    )


def _set(
    draw: st.DrawFn, message: Message, each: FieldDescriptor, hints: Hints, depth: int, wild: int
) -> None:
    extreme = draw(st.integers(0, 9)) < wild
    count = (
        draw(st.sampled_from([0, 1, 5, 40, 200]) if extreme else st.integers(1, 2)) if each.is_repeated else 1
    )
    if each.type == F.TYPE_MESSAGE:
        if depth >= _DEPTH:
            return
        for _ in range(min(count, 40)):
            inner = _filled(draw, each.message_type, hints, depth + 1, wild)
            target = getattr(message, each.name)
            (target.add() if each.is_repeated else target).MergeFrom(inner)
            if not each.is_repeated:
                target.SetInParent()
        return
    value = _extreme(each) if extreme else _good(message, each, hints)
    if each.is_repeated:
        drawn = [draw(value) for _ in range(count)]
        getattr(message, each.name).extend(drawn[0] if drawn and isinstance(drawn[0], list) else drawn)
    else:
        setattr(message, each.name, draw(value))


def _good(message: Message, each: FieldDescriptor, hints: Hints) -> st.SearchStrategy[Any]:
    """A value that the server is likely to take."""
    for name in (f"{message.DESCRIPTOR.name}.{each.name}", each.name):
        if name in hints.good:
            return st.sampled_from(hints.good[name])
    if each.type == F.TYPE_STRING:
        reference = each.GetOptions().Extensions[resource_pb2.resource_reference]
        named = hints.names.get(reference.type)
        return st.sampled_from(named) if named else st.sampled_from(["a", "dog", "x1"])
    if each.type == F.TYPE_BYTES:
        return st.binary(max_size=64)
    if each.type == F.TYPE_BOOL:
        return st.booleans()
    if each.type == F.TYPE_ENUM:
        known = [value.number for value in each.enum_type.values]
        required = field_behavior_pb2.REQUIRED in each.GetOptions().Extensions[_BEHAVIOR]
        return st.sampled_from(known[1:] if required else known)  # 0 is "not specified"
    if each.type in _INTEGERS:
        return st.integers(0, 4)
    return st.sampled_from([0.1, 0.5, 1.0])


def _extreme(each: FieldDescriptor) -> st.SearchStrategy[Any]:
    """A value that protobuf can carry and few people think of."""
    if each.type == F.TYPE_STRING:
        return st.sampled_from(_NASTY) | st.text(max_size=40)
    if each.type == F.TYPE_BYTES:
        return st.binary(max_size=200) | st.just(b"\0" * (2**20 + 1))
    if each.type == F.TYPE_BOOL:
        return st.booleans()
    if each.type == F.TYPE_ENUM:
        return st.sampled_from([-1, 0, 99, 2**31 - 1, -(2**31)])
    if each.type in _INTEGERS:
        low, high = _INTEGERS[each.type]
        return st.sampled_from([low, high, max(low, -1), 0, high // 2, 10**6]) | st.integers(low, high)
    floats = st.sampled_from(_FLOATS) | st.floats()
    return floats.map(_single) if each.type == F.TYPE_FLOAT else floats


def _single(value: float) -> float:
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return float("inf")


# ------------------------------------------------------------------------------------------------ uploads


def _upload(draw: st.DrawFn, method: MethodDescriptor, hints: Hints, wild: int) -> list[bytes]:
    """What the files are for, then for each its header and its chunks."""
    kind = method.input_type
    make = GetMessageClass(kind)
    sent: list[Message] = []
    for each in kind.fields:
        if each.name not in {"file", "chunk"} and draw(st.integers(0, 19)) >= wild:
            first = make()
            _set(draw, first, each, hints, 0, wild)
            sent.append(first)
    pool = hints.files.get(method.name) or hints.files.get("") or [("a.txt", b"a")]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3])) if wild < 10 else draw(st.integers(0, STREAM))):
        name, data = draw(st.sampled_from(pool))
        if draw(st.integers(0, 9)) < 2 + wild:
            data = _changed(draw, data)
        header = make()
        header.file.filename = name
        header.file.size_bytes = len(data)
        header.file.sha256 = hashlib.sha256(data).hexdigest()
        if draw(st.integers(0, 19)) < wild:
            header.file.Clear()
            header.file.MergeFrom(_filled(draw, header.file.DESCRIPTOR, hints, 1, wild))
        sent.append(header)
        cut = draw(st.integers(0, len(data))) if draw(st.booleans()) else 0
        sent += [make(chunk=part) for part in (data[:cut], data[cut:]) if part]
    return [message.SerializePartialToString() for message in sent]


def _changed(draw: st.DrawFn, data: bytes) -> bytes:
    """A file with a few bytes other than they were, most of them near its begin: there headers are."""
    for _ in range(draw(st.integers(1, 3))):
        end = len(data) if draw(st.integers(0, 3)) == 0 else min(len(data), 400)
        position = draw(st.integers(0, max(0, end)))
        what = draw(st.sampled_from(["flip", "cut", "drop", "insert", "double"]))
        if what == "flip":
            data = data[:position] + bytes([draw(st.integers(0, 255))]) + data[position + 1 :]
        elif what == "cut":
            data = data[:position]
        elif what == "drop":
            data = data[:position] + data[position + draw(st.integers(1, 9)) :]
        elif what == "insert":
            data = data[:position] + draw(st.binary(min_size=1, max_size=9)) + data[position:]
        else:
            data = data[: position + 20] + data[position:]
    return data


def _disorder(draw: st.DrawFn, sent: list[bytes]) -> list[bytes]:
    one, other = (draw(st.integers(0, len(sent) - 1)) for _ in range(2))
    what = draw(st.sampled_from(["drop", "double", "exchange", "end early"]))
    if what == "drop":
        return sent[:one] + sent[one + 1 :]
    if what == "double":
        return [*sent[:other], sent[one], *sent[other:]]
    if what == "end early":
        return sent[:one]
    changed = list(sent)
    changed[one], changed[other] = sent[other], sent[one]
    return changed


# ------------------------------------------------------------------------------------------------ the wire


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, wire_type: int, payload: bytes) -> bytes:
    head = _varint(number << 3 | wire_type)
    return head + (_varint(len(payload)) if wire_type == 2 else b"") + payload


def _damages(descriptor: Descriptor) -> st.SearchStrategy[tuple[str, Any]]:
    """A kind of damage, and what it needs."""
    kinds: list[st.SearchStrategy[tuple[str, Any]]] = [
        st.tuples(st.just("cut"), st.integers(1, 8)),
        st.tuples(st.just("flip"), st.tuples(st.integers(0, 400), st.integers(1, 255))),
        st.tuples(st.just("append"), st.binary(min_size=1, max_size=12)),
        st.tuples(
            st.just("append"), st.just(_field(536_870_911, 2, b"unknown" * 9) + _field(31, 0, b"\x01"))
        ),
        # groups are long gone from the language, and still in the wire format: a group in a group in …
        st.tuples(st.just("append"), st.just(_varint(99 << 3 | 3) * 150)),
        st.tuples(st.just("replace"), st.binary(max_size=60)),
        st.tuples(st.just("append"), st.just(_field(31, 2, _LARGE))),
    ]
    numbers = [each.number for each in descriptor.fields]
    if numbers:
        strings = [each.number for each in descriptor.fields if each.type == F.TYPE_STRING]
        no_utf8 = b"\xff\xfe\xc3("
        kinds += [st.tuples(st.just("append"), st.just(_field(number, 2, no_utf8))) for number in strings]
        other = st.builds(_field, st.sampled_from(numbers), st.sampled_from([0, 1, 5]), st.binary(max_size=8))
        kinds.append(st.tuples(st.just("append"), other))
    return st.one_of(kinds)


def _damage(data: bytes, damage: tuple[str, Any]) -> bytes:
    kind, what = damage
    if kind == "cut":
        return data[:-what]
    if kind == "flip" and data:
        position = what[0] % len(data)
        return data[:position] + bytes([data[position] ^ what[1]]) + data[position + 1 :]
    if kind == "append":
        return data + what
    if kind == "replace":
        return what
    return data


# ------------------------------------------------------------------------------------------------ metadata


def metadata(keys: Sequence[str]) -> st.SearchStrategy[list[tuple[str, str | bytes]]]:
    """What goes beside the messages: nineteen times in twenty a good credential alone."""
    good = ("authorization", f"Bearer {keys[0]}")
    printable = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=200)
    authorizations = st.sampled_from([f"Bearer {key}" for key in keys]) | st.sampled_from(
        ["", "Bearer", "Bearer ", "Basic eDp5", "bearer " + "a" * 3000, good[1] + "x", "Bearer moor_0_0"]
    )
    request_ids = st.sampled_from(["", "a" * 64, "a" * 65, "../x", "%0a", "ok-1"]) | printable
    traces = st.sampled_from(["00-" + "0" * 32 + "-" + "0" * 16 + "-00", "00-x", "ff-" + "f" * 32, ""])
    odd = st.one_of(
        st.tuples(st.just("authorization"), authorizations | printable).map(lambda pair: [pair]),
        st.tuples(st.just("authorization"), authorizations).map(lambda pair: [good, pair]),
        st.tuples(st.just("x-request-id"), request_ids).map(lambda pair: [good, pair, pair]),
        st.tuples(st.sampled_from(["traceparent", "tracestate", "baggage"]), traces | printable).map(
            lambda pair: [good, pair]
        ),
        st.tuples(st.just("grpc-trace-bin"), st.binary(max_size=40)).map(lambda pair: [good, pair]),
        st.tuples(st.sampled_from(["x-a-bin", "authorization-bin"]), st.binary(max_size=300)).map(
            lambda pair: [good, pair]
        ),
        st.just([good, *((f"x-many-{number}", "v" * 20) for number in range(40))]),
        st.just([]),
    )
    return st.integers(0, 20).flatmap(lambda number: odd if number == 7 else st.just([good]))
