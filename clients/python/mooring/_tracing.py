"""Spans around calls, where OpenTelemetry's API is installed (`pip install mooring[tracing]`).

A CLIENT span for each call by the program's own tracer provider, and its context in the call's metadata by
the program's own propagator (W3C `traceparent` by default), so that the server's spans are in the same trace.
A program that has set up no provider gets no spans, and only passes on the context that it is in.

It wraps the channel's four kinds of callables rather than intercept them: gRPC's interceptors put calls of
their own around streams, and the calls' cancellation and flow control shall be gRPC's. One span covers all of
gRPC's own retries of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar, cast

import grpc

Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]
Channel = TypeVar("Channel")


def traced(channel: Channel) -> Channel:
    """The channel with spans around its calls; the channel itself where the API is not installed."""
    try:
        from opentelemetry import trace
    except ImportError:
        return channel
    return cast("Channel", _Traced(channel, trace.get_tracer("mooring"), _BlockingCalls))


def traced_aio(channel: Channel) -> Channel:
    """As `traced`, for a channel of `grpc.aio`."""
    try:
        from opentelemetry import trace
    except ImportError:
        return channel
    return cast("Channel", _Traced(channel, trace.get_tracer("mooring"), _AsyncCalls))


class _Span:
    """One call's span.

    Args:
        tracer: of OpenTelemetry.
        method: "/package.Service/Method".
    """

    def __init__(self, tracer: Any, method: str) -> None:
        from opentelemetry.trace import SpanKind

        service, _, name = method.removeprefix("/").rpartition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        self._span = tracer.start_span(f"{service}/{name}", kind=SpanKind.CLIENT, attributes=attributes)

    def sent_with(self, metadata: Metadata | None) -> Metadata | None:
        """The call's metadata with the span's context."""
        from opentelemetry import propagate, trace

        carrier: dict[str, str] = {}
        propagate.inject(carrier, trace.set_span_in_context(self._span))
        return [*(metadata or ()), *carrier.items()] if carrier else metadata

    def end(self, code: grpc.StatusCode | None) -> None:
        """The call has ended; None: with an error that is not gRPC's."""
        from opentelemetry.trace import Status, StatusCode

        if code is not None:
            self._span.set_attribute("rpc.grpc.status_code", code.value[0])
        if code is not grpc.StatusCode.OK:
            name = "UNKNOWN" if code is None else code.name
            self._span.set_attribute("error.type", name)
            self._span.set_status(Status(StatusCode.ERROR, name))
        self._span.end()


class _BlockingCalls:
    """How calls of `grpc` are started under a span."""

    @staticmethod
    def to_one(method: Callable[..., Any], span: _Span, request: Any, options: dict[str, Any]) -> Any:
        """A call that returns its response."""
        try:
            response = method(request, **options)
        except grpc.RpcError as error:
            span.end(_code_of(error))
            raise
        except BaseException:
            span.end(None)
            raise
        span.end(grpc.StatusCode.OK)
        return response

    @staticmethod
    def to_many(method: Callable[..., Any], span: _Span, request: Any, options: dict[str, Any]) -> Any:
        """A call that returns an iterator of responses, which is the call."""
        try:
            call = method(request, **options)
        except BaseException:
            span.end(None)
            raise
        call.add_done_callback(lambda ended: span.end(_code_of(ended)))
        return call


class _AsyncCalls:
    """How calls of `grpc.aio` are started under a span."""

    @staticmethod
    def to_one(method: Callable[..., Any], span: _Span, request: Any, options: dict[str, Any]) -> Any:
        """Every call of `grpc.aio` is an object that tells its end."""
        try:
            call = method(request, **options)
        except BaseException:
            span.end(None)
            raise
        call.add_done_callback(lambda ended: span.end(_code_now(ended)))
        return call

    to_many = to_one


class _Traced:
    """A channel as stubs see it."""

    def __init__(self, channel: Any, tracer: Any, calls: type[_BlockingCalls | _AsyncCalls]) -> None:
        self._channel, self._tracer, self._calls = channel, tracer, calls

    def unary_unary(self, method: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        """As `grpc.Channel.unary_unary`, and so are the next three."""
        made = self._channel.unary_unary(method, *arguments, **named)
        return self._wrapped(method, made, self._calls.to_one)

    def stream_unary(self, method: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        """A stream of requests, one response."""
        made = self._channel.stream_unary(method, *arguments, **named)
        return self._wrapped(method, made, self._calls.to_one)

    def unary_stream(self, method: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        """One request, a stream of responses."""
        made = self._channel.unary_stream(method, *arguments, **named)
        return self._wrapped(method, made, self._calls.to_many)

    def stream_stream(self, method: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        """Streams both ways."""
        made = self._channel.stream_stream(method, *arguments, **named)
        return self._wrapped(method, made, self._calls.to_many)

    def close(self, *arguments: Any) -> Any:
        """As the channel's own: to be awaited where that is."""
        return self._channel.close(*arguments)

    def _wrapped(
        self, name: str, method: Callable[..., Any], start: Callable[..., Any]
    ) -> Callable[..., Any]:
        def call(request: Any, *, metadata: Metadata | None = None, **options: Any) -> Any:
            span = _Span(self._tracer, name)
            return start(method, span, request, {**options, "metadata": span.sent_with(metadata)})

        return call


def _code_of(call: Any) -> grpc.StatusCode | None:
    """The status of an ended call, or of the error that it raised."""
    code = call.code()
    return code if isinstance(code, grpc.StatusCode) else None


def _code_now(call: Any) -> grpc.StatusCode | None:
    """The status of an ended call of `grpc.aio`, whose `code` is a coroutine that need not wait any more."""
    asked = call.code()
    try:
        asked.send(None)
    except StopIteration as known:
        return known.value if isinstance(known.value, grpc.StatusCode) else None
    asked.close()
    return None
