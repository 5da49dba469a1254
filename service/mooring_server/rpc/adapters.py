"""AdapterService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from mooring.v1 import adapter_pb2 as pb
from mooring.v1 import adapter_pb2_grpc

from mooring_server.engine.adapters import export_diffusers, to_safetensors
from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.jobs import subjects as lifecycle
from mooring_server.rpc import caller, convert, names, transfer
from mooring_server.rpc.edge import Context
from mooring_server.rpc.runtime import Provide, Runtime


class AdapterServicer(adapter_pb2_grpc.AdapterServiceServicer):
    """Adapters over the store.

    Args:
        runtime: gives the server's parts.
    """

    def __init__(self, runtime: Provide) -> None:
        self._runtime = runtime

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.GetAdapterResponse:
        """See the contract."""
        del context
        where = names.resolve_adapter(caller.tenant(), request.name)
        record = await asyncio.to_thread(
            self._runtime().store.get_adapter, where.tenant, where.id, where.version
        )
        return pb.GetAdapterResponse(adapter=convert.adapter(record, layers=True))

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: Context
    ) -> pb.ListAdaptersResponse:
        """See the contract."""
        del context
        tenant = names.check_parent(caller.tenant(), request.parent)
        records, token = await asyncio.to_thread(
            self._runtime().store.list_adapters,
            tenant,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListAdaptersResponse(
            adapters=[convert.adapter(record, layers=False) for record in records], next_page_token=token
        )

    async def DeleteAdapter(
        self, request: pb.DeleteAdapterRequest, context: Context
    ) -> pb.DeleteAdapterResponse:
        """See the contract."""
        del context
        runtime = self._runtime()
        where = names.resolve_adapter(caller.tenant(), request.name)
        await asyncio.to_thread(
            lifecycle.delete_adapter, runtime.store, runtime.objects, where.tenant, where.id, where.version
        )
        return pb.DeleteAdapterResponse()

    async def ExportAdapter(
        self, request: pb.ExportAdapterRequest, context: Context
    ) -> AsyncIterator[pb.ExportAdapterResponse]:
        """See the contract."""
        del context
        if request.format not in pb.AdapterFormat.values():
            problem = f"must be NATIVE or DIFFUSERS, not {request.format}"
            raise MooringError(
                Reason.INVALID_FIELD, f"format {problem}.", fields=[FieldViolation("format", problem)]
            )
        where = names.resolve_adapter(caller.tenant(), request.name)
        files = await asyncio.to_thread(_files, self._runtime(), where, request.format)
        for filename, data in files.items():
            yield pb.ExportAdapterResponse(file=transfer.header_of(filename, data))
            for chunk in transfer.chunks(data):
                yield pb.ExportAdapterResponse(chunk=chunk)


def _files(runtime: Runtime, where: names.Resolved, form: int) -> dict[str, bytes]:
    record = runtime.store.get_adapter(where.tenant, where.id, where.version)
    weights = runtime.adapters.get(record)
    if form == pb.ADAPTER_FORMAT_DIFFUSERS:
        return export_diffusers(weights)
    return {f"{record.adapter_id}-{record.version}.safetensors": to_safetensors(weights)}
