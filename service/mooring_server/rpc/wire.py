"""Requests whose bytes are no message of the contract, told as the caller's error.

grpc.aio decodes outside of every interceptor and answers a failure there with UNKNOWN and the exception's
text, a stack trace in the log and no metrics. So decoding never fails: what cannot be decoded is handed on as
such, and refused where every other error is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Self

from google.protobuf.message import DecodeError

from mooring_server.errors import MooringError, Reason


@dataclass(frozen=True)
class _Undecodable:
    problem: str


def lenient(decode: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """A deserializer that never fails, for `checked` to look at what it gives."""
    if decode is None:
        return None

    def decoded(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError as error:
            return _Undecodable(str(error))

    return decoded


def checked(request: Any) -> Any:
    """The request, or the stream of requests, of a handler.

    Raises:
        MooringError: INVALID_FIELD where it could not be decoded; from a stream when its turn comes.
    """
    return _CheckedStream(request) if hasattr(request, "__aiter__") else _check(request)


class _CheckedStream:
    """Not a generator: a handler that cancels its wait for the next message may go on reading."""

    def __init__(self, messages: Any) -> None:
        self._messages: AsyncIterator[Any] = aiter(messages)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        return _check(await anext(self._messages))


def _check(message: Any) -> Any:
    if isinstance(message, _Undecodable):
        raise MooringError(
            Reason.INVALID_FIELD,
            f"The request's bytes are not the message they should be: {message.problem}.",
            remedy="Encode it with stubs that were made from proto/mooring/v1; strings must be UTF-8.",
        )
    return message
