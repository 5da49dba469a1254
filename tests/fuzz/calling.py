"""Calls of any method with any bytes, ended in any way; says what became of them, and what must not."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from mooring_server.errors import REASON_CODE, Reason

PATIENCE = 120.0
"""Seconds after which a call counts as hung; far from what a busy machine needs."""
WORK = 3000
"""Steps of denoising from which a call may take longer than that."""
BAD_CODES = {
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.ABORTED,
}
_OURS = "mooring."
_OWN_LIMIT = 4 * 2**20
Metadata = Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True)
class Leave:
    """How a caller leaves.

    Attributes:
        sent: after so many requests, or None: it sends them all.
        answers: after so many answers.
        drop: by closing its connection rather than by cancelling.
    """

    sent: int | None = None
    answers: int = 12
    drop: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a call.

    Attributes:
        code: its status; CANCELLED where the caller left.
        reason: of its ErrorInfo, "" without one.
        answers: as they came.
        seconds: how long it took.
        left: the caller did not stay to the end.
    """

    code: grpc.StatusCode
    reason: str = ""
    answers: tuple[bytes, ...] = ()
    seconds: float = 0.0
    left: bool = False


def methods_of(services: Sequence[str]) -> list[MethodDescriptor]:
    """Every method of the services, from their descriptors."""
    pool = descriptor_pool.Default()
    return [method for name in services for method in pool.FindServiceByName(name).methods]


def path_of(method: MethodDescriptor) -> str:
    """As HTTP/2 names it."""
    return f"/{method.containing_service.full_name}/{method.name}"


def ask(channel: grpc.Channel, key: str, method: MethodDescriptor, *requests: Message) -> list[Any]:
    """An ordinary call that must succeed; its answers."""
    stub = _stub(channel, method)
    sent = iter([r.SerializeToString() for r in requests]) if method.client_streaming else None
    running = stub(
        requests[0].SerializeToString() if sent is None else sent,
        metadata=[("authorization", f"Bearer {key}")],
        timeout=PATIENCE,
    )
    answer = GetMessageClass(method.output_type)
    return [answer.FromString(data) for data in (running if method.server_streaming else [running])]


def call(
    target: str | grpc.Channel,
    method: MethodDescriptor,
    requests: Sequence[bytes],
    leave: Leave = Leave(),
    metadata: Metadata = (),
    patience: float = PATIENCE,
) -> Outcome:
    """Make one call with raw bytes.

    Args:
        target: the server, or a connection to it that is used where none is to be dropped.
        method: what to call.
        requests: encoded messages, exactly one unless the method takes a stream.
        leave: how the caller leaves.
        metadata: beside the messages.
        patience: seconds after which it is a hang.

    Raises:
        AssertionError: it answered with a status that means a bug, or not at all.
    """
    if isinstance(target, str):
        with grpc.insecure_channel(target) as channel:
            return call(channel, method, requests, leave, metadata, patience)
    started = time.perf_counter()
    handle: queue.SimpleQueue[Any] = queue.SimpleQueue()
    end = target.close if leave.drop else None
    sent = _sent(requests, leave.sent, handle) if method.client_streaming else requests[0]
    stub = _stub(target, method)
    running = (stub if method.server_streaming else stub.future)(sent, timeout=patience, metadata=metadata)
    handle.put(end or running.cancel)
    if leave.sent is not None and not method.client_streaming:
        (end or running.cancel)()
    answers: list[bytes] = []
    left = leave.sent is not None

    def outcome(code: grpc.StatusCode, reason: str = "", *, gone: bool = False) -> Outcome:
        return Outcome(code, reason, tuple(answers), time.perf_counter() - started, gone)

    try:
        if not method.server_streaming:
            answers.append(running.result())
        else:
            for answer in running:
                answers.append(answer)
                if len(answers) >= leave.answers:
                    (end or running.cancel)()
                    return outcome(grpc.StatusCode.CANCELLED, gone=True)
    except (grpc.FutureCancelledError, ValueError):  # the second from a channel that was closed
        assert left
        return outcome(grpc.StatusCode.CANCELLED, gone=True)
    except grpc.RpcError as error:
        code, reason = _judged(method, requests, error, len(answers), left=left)
        return outcome(code, reason, gone=left and code is grpc.StatusCode.CANCELLED)
    return outcome(grpc.StatusCode.OK)


def _stub(channel: grpc.Channel, method: MethodDescriptor) -> Any:
    sides = ["stream" if stream else "unary" for stream in (method.client_streaming, method.server_streaming)]
    return getattr(channel, "_".join(sides))(path_of(method))  # no serializers: bytes in, bytes out


def _sent(
    requests: Sequence[bytes], leave_after: int | None, handle: queue.SimpleQueue[Any]
) -> Iterator[bytes]:
    """The requests, then half-close; or a call that is left after some of them."""
    yield from requests[:leave_after]
    if leave_after is not None:
        handle.get()()


def _judged(
    method: MethodDescriptor, requests: Sequence[bytes], error: Any, answers: int, *, left: bool
) -> tuple[grpc.StatusCode, str]:
    """The code and reason of a call that failed after so many answers. Raises AssertionError for a bug."""
    code: grpc.StatusCode = error.code()
    if left and code is grpc.StatusCode.CANCELLED:
        return code, ""
    where = f"{path_of(method)}: {code.name}: {str(error.details())[:300]!r}"
    shown = f"for {b' '.join(requests)[:300]!r}"
    assert code not in BAD_CODES, f"{where} {shown}"
    trailers = dict(error.trailing_metadata() or ())
    details = trailers.get("grpc-status-details-bin")
    if details is None:
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            assert _work(method, requests) > WORK, f"{path_of(method)}: hung after {answers} answers {shown}"
            return code, "CLIENT_DEADLINE"
        too_large = any(len(request) > _OWN_LIMIT for request in requests)
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and too_large:
            return code, "MESSAGE_TOO_LARGE"
        assert not method.containing_service.full_name.startswith(_OURS), f"{where} has no details {shown}"
        return code, ""
    info = error_details_pb2.ErrorInfo()
    unpacked = any(detail.Unpack(info) for detail in status_pb2.Status.FromString(details).details[:1])
    assert unpacked, f"{where} has no ErrorInfo {shown}"
    assert info.domain == "mooring", where
    assert REASON_CODE[Reason(info.reason)].value == code.name, f"{where} with the reason {info.reason}"
    return code, info.reason


def _work(method: MethodDescriptor, requests: Sequence[bytes]) -> int:
    """Denoising steps that the requests may ask for together."""
    kind, work = GetMessageClass(method.input_type), 0
    for data in requests:
        try:
            message: Any = kind.FromString(data)
        except DecodeError:
            continue
        inner = getattr(message, "request", message)
        work += max(1, getattr(inner, "steps", 0)) * max(1, getattr(inner, "count", 0))
    return work
