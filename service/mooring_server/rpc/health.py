"""grpc.health.v1 with its newest call: grpcio's asyncio servicer has no `List` yet and would fail on it."""

from __future__ import annotations

from grpc_health.v1 import health, health_pb2

from mooring_server.rpc.edge import Context


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc, name-defined]  # it ships no types
    """grpcio's servicer, and `List` over the same statuses."""

    async def List(
        self, request: health_pb2.HealthListRequest, context: Context
    ) -> health_pb2.HealthListResponse:
        """Every service's status, "" for the server's own."""
        del request, context
        statuses = {
            name: health_pb2.HealthCheckResponse(status=status)
            for name, status in self._server_status.items()
        }
        return health_pb2.HealthListResponse(statuses=statuses)
