"""grpc.health.v1 for a port that strangers reach.

grpcio's asyncio servicer keeps the statuses. Its `Watch` does not serve here: it writes to a watcher while it
holds the lock that every change of a status needs, so that a watcher who stops reading would keep a server
from becoming ready and from draining; and it takes any number of watchers, each of which holds one of the
server's calls for as long as it likes. Its `List` is not there yet.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

from mooring_server.rpc.edge import Context

MAX_WATCHERS = 64
"""Of the server together: health needs no credential, so watching must leave the calls to who has one."""


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc, name-defined]  # it ships no types
    """grpcio's servicer with a bounded `Watch` that holds no lock, and with `List`."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = asyncio.Event()
        self._watching = 0

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

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """A service's status now and at every change; statuses in between may be left out."""
        if self._watching >= MAX_WATCHERS:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHERS} calls watch already: use Check."
            )
        self._watching += 1
        told = None
        try:
            while True:
                changed = self._changed  # taken before the status: a change after it is not missed
                unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
                status = self._server_status.get(request.service, unknown)
                if status != told:
                    await context.write(health_pb2.HealthCheckResponse(status=status))
                    told = status
                else:
                    await changed.wait()
        finally:
            self._watching -= 1

    async def _set(self, service: str, status: Any) -> None:
        """Called by `set` and `enter_graceful_shutdown`; waits for nobody."""
        self._server_status[service] = status
        self._changed.set()
        self._changed = asyncio.Event()
