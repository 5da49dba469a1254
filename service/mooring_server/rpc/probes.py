"""Health on a port of its own, in plain gRPC, for those who can show no credential: probes of Kubernetes.

The kubelet's built-in gRPC probes speak no TLS and send no token, so beside an authenticated main port they
need another. Nothing but `grpc.health.v1` answers here: it tells anybody who can reach the port whether the
server serves, and nothing else. Readiness and start-up ask for "" or a service; liveness asks for `live`,
which is SERVING for as long as the event loop answers: while weights are loaded, while the device is busy or
broken, while calls are drained. A restart helps in none of these.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

LIVE = "live"
"""The name to ask for to learn whether the process answers at all."""
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 4096),
]
_MAX_CALLS = 32
if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


class Probes:
    """The health port.

    Args:
        health: the main port's health servicer; its answers are given here too.
    """

    def __init__(self, health: Any) -> None:
        self._server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=_MAX_CALLS)
        health_pb2_grpc.add_HealthServicer_to_server(_ProbeServicer(health), self._server)

    async def start(self, address: str) -> str:
        """Listen. Returns "host:port" with the port that was taken. Raises RuntimeError when it is in use."""
        port = self._server.add_insecure_port(address)
        await self._server.start()
        return f"{address.rpartition(':')[0]}:{port}"

    async def stop(self) -> None:
        """Close the port and end what watches it."""
        await self._server.stop(None)


class _ProbeServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # it ships no types
    def __init__(self, health: Any) -> None:
        self._health = health

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Answer once."""
        if request.service == LIVE:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        answer: health_pb2.HealthCheckResponse = await self._health.Check(request, context)
        return answer

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Answer at every change; `live` never changes, so it is answered once."""
        if request.service == LIVE:
            yield health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
            return
        await self._health.Watch(request, context)
