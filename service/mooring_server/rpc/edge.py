"""The outermost interceptor: admission, errors, metrics, span and the canonical log line of every call.

A call is admitted in an order that tells a stranger nothing: identity, then the tenant's rate (a refusal by
role is written to the audit log, which nobody shall fill), then the role's permission, then whether the
server is ready, then a place among the tenant's running calls and the server's; only then does the handler
look anything up.

One place on purpose: only here is it known how a call really ended. grpc.aio tells by exceptions alone:
`AbortError` (an `Exception`; the status is already set on the context), `CancelledError` (the peer left, its
deadline passed or the server stops) and anything else, which grpc would report as UNKNOWN with the
exception's text. `context.cancelled()` is False in done-callbacks, so no callback is used.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import grpc
import grpc.aio
import structlog

from mooring_server.errors import MooringError, Reason
from mooring_server.rpc import facts, permissions, status, wire
from mooring_server.rpc.caller import CALLER, Caller
from mooring_server.rpc.identity import Authenticator
from mooring_server.rpc.permissions import Permission, Rule
from mooring_server.rpc.quotas import Quotas
from mooring_server.storage.audit import ACTOR, Actor
from mooring_server.telemetry.logs import get_logger
from mooring_server.telemetry.metrics import Metrics
from mooring_server.telemetry.traces import UNTRACED, CallSpan, Tracing

log = get_logger("mooring.rpc")

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
if TYPE_CHECKING:
    _ServerInterceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    _ServerInterceptor = grpc.aio.ServerInterceptor  # generic in the type stubs only
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DEADLINE_MARGIN_SECONDS = 0.1
_QUIET = ("grpc.health.", "grpc.reflection.")


@dataclass
class Gate:
    """Whether calls are taken, and how many are being handled; shared by the interceptor and the drain.

    Attributes:
        ready: the base model is resident.
        draining: set when shutdown begins; long-lived streams end when they see it.
        in_flight: calls being handled, health and reflection not counted.
        idle: set while there are none.
    """

    ready: bool = False
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    in_flight: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    def enter(self) -> None:
        """Count a call."""
        self.in_flight += 1
        self.idle.clear()

    def require_ready(self) -> None:
        """Refuse what comes too early or too late. Raises DRAINING (UNAVAILABLE)."""
        if self.draining.is_set():
            raise MooringError(
                Reason.DRAINING, "The server is shutting down.", remedy="Repeat in a few seconds."
            )
        if not self.ready:
            raise MooringError(
                Reason.DRAINING, "The base model is still being loaded.", remedy="Repeat in a few seconds."
            )

    def leave(self) -> None:
        """Count its end."""
        self.in_flight -= 1
        if not self.in_flight:
            self.idle.set()


async def _untold(_tenant: str, _method: str) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class Access:
    """Who may call what, and how often.

    Attributes:
        authenticator: finds the identity behind a call.
        quotas: count calls.
        rule_of: what "package.Service/Method" needs; None refuses it to everybody.
        denied: told the tenant and the method of a call that a role was denied.
    """

    authenticator: Authenticator
    quotas: Quotas
    rule_of: Callable[[str], Rule | None]
    denied: Callable[[str, str], Awaitable[None]] = field(default=_untold)


@dataclass(frozen=True)
class _Call:
    """A method as metrics and logs name it."""

    shape: str
    service: str
    method: str

    @property
    def name(self) -> str:
        """As `permissions.RULES` names it."""
        return f"{self.service}/{self.method}"

    @property
    def quiet(self) -> bool:
        """Health and reflection: probes call them all day, and they answer before the base is resident."""
        return self.service.startswith(_QUIET)


class EdgeInterceptor(_ServerInterceptor):
    """Wraps every method of every service.

    Args:
        metrics: where the gRPC trio is counted.
        gate: refuses calls until the base is resident.
        access: who may call what.
        tracing: makes a span of each call; health and reflection have none.
    """

    def __init__(self, metrics: Metrics, gate: Gate, access: Access, tracing: Tracing | None = None) -> None:
        self._metrics = metrics
        self._gate = gate
        self._access = access
        self._tracing = tracing or Tracing()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Replace the handler by one that runs it under observation; unknown methods stay unknown."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        service, _, method = handler_call_details.method.removeprefix("/").rpartition("/")
        shape = (
            ("client_stream" if handler.request_streaming else "unary")
            if not (handler.response_streaming)
            else ("bidi_stream" if handler.request_streaming else "server_stream")
        )
        call = _Call(shape, service, method)
        make, inner = {
            "unary": (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
            "client_stream": (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
            "server_stream": (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
            "bidi_stream": (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
        }[shape]

        async def answer(request: Any, context: Context) -> Any:
            return await self._observe(call, context, lambda: inner(wire.checked(request), context))

        async def stream(request: Any, context: Context) -> None:
            await self._observe(call, context, lambda: _send(inner(wire.checked(request), context), context))

        return make(
            stream if handler.response_streaming else answer,
            request_deserializer=wire.lenient(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    async def _admit(
        self, call: _Call, context: Context, request_id: str, span: CallSpan
    ) -> AbstractContextManager[None]:
        """Let a call pass or refuse it; see the module for the order. Returns its place among others."""
        place: AbstractContextManager[None] = nullcontext()
        rule = self._access.rule_of(call.name)
        if rule is None or rule.permission is not Permission.OPEN:
            identity = await self._access.authenticator.identify(context)
            structlog.contextvars.bind_contextvars(
                tenant=identity.tenant, role=identity.role.value, credential=identity.subject
            )
            span.caller(identity.tenant)
            ACTOR.set(Actor(identity.subject, identity.role.value, call.name, request_id))
            if not call.quiet:
                self._access.quotas.take_call(identity.tenant)
            try:
                allowed = permissions.require(identity.role, rule)
            except MooringError:
                await self._access.denied(identity.tenant, call.name)
                raise
            CALLER.set(Caller(identity, request_id, allowed))
            if not call.quiet:
                place = self._access.quotas.calling(identity.tenant)
        if not call.quiet:
            self._gate.require_ready()
        return place

    async def _observe(self, call: _Call, context: Context, run: Callable[[], Awaitable[Any]]) -> Any:
        request_id = _request_id(context)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id, method=call.name)
        labels = (call.shape, call.service, call.method)
        code, reason, started = grpc.StatusCode.OK, "", time.perf_counter()
        done = facts.begin()
        span = self._span(call, context, request_id)
        self._metrics.started.labels(*labels).inc()
        if not call.quiet:
            self._gate.enter()
            self._metrics.in_flight.inc()
        try:
            context.set_trailing_metadata((("x-request-id", request_id),))
            with await self._admit(call, context, request_id, span):
                answer = await run()
            code = _set_code(context)
        except asyncio.CancelledError:
            code = _cancel_code(context)
            raise
        except grpc.aio.AbortError:
            code = _set_code(context)
            raise
        except MooringError as error:
            code, reason = status.grpc_code(error), error.reason.value
            await _abort(context, error, request_id)
        except Exception as failure:
            if context.done():  # the peer left while we were sending to it
                code = _cancel_code(context)
                raise
            code, reason = grpc.StatusCode.INTERNAL, Reason.INTERNAL.value
            log.exception("unexpected error", error_type=type(failure).__name__)
            hidden = MooringError(
                Reason.INTERNAL,
                f"The server failed on request {request_id}.",
                remedy="Please report it with that id; the server's log has the cause.",
            )
            await _abort(context, hidden, request_id)
        else:
            return answer
        finally:
            seconds = time.perf_counter() - started
            self._metrics.handled.labels(*labels, code.name).inc()
            self._metrics.handling.labels(*labels).observe(seconds)
            if reason:
                self._metrics.errors.labels(reason).inc()
            write = log.debug if call.quiet else log.warning if code is grpc.StatusCode.INTERNAL else log.info
            write(
                "rpc",
                code=code.name,
                seconds=round(seconds, 6),
                peer=context.peer(),
                **({"reason": reason} if reason else {}),
                **done,
            )
            span.end((code.value[0], code.name), reason, done)
            if not call.quiet:
                self._metrics.in_flight.dec()
                self._gate.leave()

    def _span(self, call: _Call, context: Context, request_id: str) -> CallSpan:
        if call.quiet:
            return UNTRACED
        span = self._tracing.call(call.service, call.method, request_id, context.invocation_metadata() or ())
        structlog.contextvars.bind_contextvars(**span.ids)
        return span


async def _send(result: Any, context: Context) -> None:
    """Run a streaming handler of either kind: one that yields, or one that writes by itself."""
    if not hasattr(result, "__aiter__"):
        await result
        return
    messages: AsyncIterator[Any] = result
    try:
        async for message in messages:
            await context.write(message)
    finally:
        # A cancelled loop leaves the generator suspended: without this its `finally` would run at some later
        # garbage collection, and a disconnected caller's images would go on being drawn until then.
        close = getattr(messages, "aclose", None)
        if close is not None:
            await close()


async def _abort(context: Context, error: MooringError, request_id: str) -> NoReturn:
    await context.abort(
        status.grpc_code(error), status.message_of(error), status.trailing_metadata(error, request_id)
    )


def _request_id(context: Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == "x-request-id" and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex


def _set_code(context: Context) -> grpc.StatusCode:
    """The status that the handler set on the context (grpc.aio gives a number); OK when it set none."""
    value: Any = context.code()
    if isinstance(value, grpc.StatusCode):
        return value
    return next((code for code in grpc.StatusCode if code.value[0] == value), grpc.StatusCode.OK)


def _cancel_code(context: Context) -> grpc.StatusCode:
    # A caller whose deadline passes resets the stream, often a moment before our own clock of it runs out.
    left = context.time_remaining()
    late = left is not None and left <= _DEADLINE_MARGIN_SECONDS
    return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
