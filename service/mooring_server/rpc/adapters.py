"""AdapterService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from mooring.v1 import adapter_pb2 as pb
from mooring.v1 import adapter_pb2_grpc, media_pb2

from mooring_server.engine.adapters import export_diffusers, to_safetensors, too_large
from mooring_server.engine.formats import MAX_FILES
from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.jobs.imports import ImportRequest, import_adapter
from mooring_server.rpc import caller, convert, names, transfer
from mooring_server.rpc.edge import Context
from mooring_server.rpc.publishing import Publishing
from mooring_server.rpc.runtime import Provide, Runtime, find_adapter
from mooring_server.rpc.transfer import IncomingFile
from mooring_server.storage.database import check_text
from mooring_server.storage.models import Adapter


class AdapterServicer(Publishing, adapter_pb2_grpc.AdapterServiceServicer):
    """Adapters over the store.

    Args:
        runtime: gives the server's parts.
    """

    def __init__(self, runtime: Provide) -> None:
        super().__init__(runtime)
        self._importing = asyncio.Lock()  # one conversion at a time: each holds its file several times over

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.GetAdapterResponse:
        """See the contract."""
        del context
        where = names.resolve_adapter(caller.tenant(), request.name)
        found = await asyncio.to_thread(_describe, self._runtime(), where, show_deleted=request.show_deleted)
        return pb.GetAdapterResponse(adapter=found)

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: Context
    ) -> pb.ListAdaptersResponse:
        """See the contract."""
        del context
        tenant = names.check_parent(caller.tenant(), request.parent)
        return await asyncio.to_thread(_list, self._runtime(), tenant, request)

    async def DeleteAdapter(
        self, request: pb.DeleteAdapterRequest, context: Context
    ) -> pb.DeleteAdapterResponse:
        """See the contract."""
        del context
        runtime = self._runtime()
        where = names.resolve_adapter(caller.tenant(), request.name)
        await asyncio.to_thread(_delete, runtime, where)
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
        runtime, tenant = self._runtime(), caller.tenant()
        with runtime.held.call(tenant) as hold:
            files = await runtime.long.run(tenant, _files, runtime, where, request.format)
            hold(sum(len(data) for _, data in files))
            await asyncio.to_thread(
                runtime.store.record, where.tenant, "ExportAdapter", request.name, decision="allowed"
            )
            for header, data in files:
                yield pb.ExportAdapterResponse(file=header)
                for chunk in transfer.chunks(data):
                    yield pb.ExportAdapterResponse(chunk=chunk)

    async def ImportAdapter(
        self, request_iterator: AsyncIterator[pb.ImportAdapterRequest], context: Context
    ) -> pb.ImportAdapterResponse:
        """See the contract."""
        del context
        runtime, tenant = self._runtime(), caller.tenant()
        with runtime.held.call(tenant) as hold:
            wanted, files = await self._receive(runtime, tenant, request_iterator, hold)
            async with self._importing:
                record = await runtime.long.run(tenant, _import, runtime, tenant, wanted, files)
        return pb.ImportAdapterResponse(adapter=convert.adapter(record, layers=True))

    async def _receive(
        self,
        runtime: Runtime,
        tenant: str,
        messages: AsyncIterator[pb.ImportAdapterRequest],
        hold: Callable[[int], None],
    ) -> tuple[ImportRequest, _IncomingFiles]:
        wanted = None
        files = _IncomingFiles(runtime.settings.max_adapter_bytes)
        async for message in messages:
            kind = message.WhichOneof("content")
            if kind == "adapter":
                if wanted is not None:
                    raise _protocol("adapter", "comes once, in the first message")
                names.check_parent(tenant, message.adapter.parent, "adapter.parent")
                wanted = _wanted(message.adapter)
            elif wanted is None:
                raise _protocol("adapter", "must be in the first message")
            elif kind == "file":
                await runtime.long.run(tenant, files.start, message.file)
            elif kind == "chunk":
                files.add(message.chunk)
                hold(files.held_bytes)
            else:
                raise _protocol("content", "must be a file header, or a chunk after one")
        if wanted is None:
            raise _protocol("adapter", "must be in the first message")
        return wanted, files


class _IncomingFiles:
    """The files of an import, refused as soon as they are too many or announce too much.

    Args:
        max_bytes: of all files together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._announced = 0
        self._count = 0
        self._file: IncomingFile | None = None
        self._files: dict[str, bytes] = {}

    @property
    def held_bytes(self) -> int:
        """What they take of memory."""
        coming = 0 if self._file is None else self._file.held_bytes
        return coming + sum(len(data) for data in self._files.values())

    def start(self, header: media_pb2.FileHeader) -> None:
        """Hash the file before, and begin the next one.

        Raises:
            MooringError: INVALID_FIELD, ADAPTER_TOO_LARGE, or what ails the one before.
        """
        self._close()
        if self._count == MAX_FILES:
            raise _protocol("files", f"holds more than {MAX_FILES} files")
        self._file = IncomingFile(header, self._count, self._max_bytes)
        self._count += 1
        self._announced += header.size_bytes
        if self._announced > self._max_bytes:
            raise too_large(self._announced, self._max_bytes)

    def add(self, chunk: bytes) -> None:
        """Take the next bytes of the current file."""
        if self._file is None:
            raise _protocol("content", "must be a file header, or a chunk after one")
        self._file.add(chunk)

    def finish(self) -> dict[str, bytes]:
        """Name → content. Raises INVALID_FIELD without any file, DIGEST_MISMATCH."""
        self._close()
        if not self._files:
            raise _protocol("files", "at least one is required")
        return self._files

    def _close(self) -> None:
        if self._file is None:
            return
        name = self._file.header.filename.replace("\\", "/").rpartition("/")[2]
        field = f"files[{self._file.index}].filename"
        if not name or name in self._files:
            raise _protocol(field, "must be a name of its own")
        check_text(field, name, limit=255)
        self._files[name] = self._file.finish()
        self._file = None


def _wanted(declared: pb.AdapterImport) -> ImportRequest:
    problems = []
    if len(declared.class_noun) > 64:
        problems.append(FieldViolation("adapter.class_noun", "must have at most 64 characters"))
    if len(declared.placeholder) > 32 or declared.placeholder != "".join(declared.placeholder.split()):
        problems.append(
            FieldViolation("adapter.placeholder", "must have at most 32 characters and no blanks")
        )
    if problems:
        text = "; ".join(f"{problem.field} {problem.description}" for problem in problems)
        raise MooringError(Reason.INVALID_FIELD, f"{text}.", fields=problems)
    check_text("adapter.class_noun", declared.class_noun, limit=64)
    rights = convert.rights_document(declared.rights, "adapter.rights")
    if rights:
        check_text("adapter.rights.statement", rights["statement"], limit=1000)
    return ImportRequest(
        adapter_id=names.check_id(declared.adapter_id, "adapter.adapter_id"),
        rights=rights,
        class_noun=declared.class_noun.strip(),
        placeholder=declared.placeholder,
        request_id=names.check_request_id(declared.request_id, "adapter.request_id"),
    )


def _protocol(field: str, problem: str) -> MooringError:
    return MooringError(
        Reason.INVALID_FIELD,
        f"The import stream is out of order: {field} {problem}.",
        remedy="Send what the files are, then for each file its header and its chunks.",
        fields=[FieldViolation(field, problem)],
    )


def _describe(runtime: Runtime, where: names.Resolved, *, show_deleted: bool) -> pb.Adapter:
    record = runtime.store.get_adapter(
        where.tenant, where.id, where.version, alias=where.alias, show_deleted=show_deleted
    )
    aliases, decision = runtime.store.standing(record.tenant, [record])[record.name]
    return convert.adapter(record, layers=True, aliases=aliases, gate_decision=decision)


def _list(runtime: Runtime, tenant: str, request: pb.ListAdaptersRequest) -> pb.ListAdaptersResponse:
    records, token = runtime.store.list_adapters(
        tenant,
        show_deleted=request.show_deleted,
        page_size=request.page_size,
        page_token=request.page_token,
    )
    standing = runtime.store.standing(tenant, records)
    found = []
    for record in records:
        aliases, decision = standing[record.name]
        found.append(convert.adapter(record, layers=False, aliases=aliases, gate_decision=decision))
    return pb.ListAdaptersResponse(adapters=found, next_page_token=token)


def _delete(runtime: Runtime, where: names.Resolved) -> None:
    for deleted in runtime.store.delete_adapter(where.tenant, where.id, where.version, alias=where.alias):
        runtime.adapters.forget(deleted.object_key)


def _import(runtime: Runtime, tenant: str, wanted: ImportRequest, files: _IncomingFiles) -> Adapter:
    return import_adapter(
        runtime.store,
        runtime.objects,
        runtime.bank,
        tenant,
        wanted,
        files.finish(),
        max_bytes=runtime.settings.max_adapter_bytes,
    )


def _files(runtime: Runtime, where: names.Resolved, form: int) -> list[tuple[media_pb2.FileHeader, bytes]]:
    record = find_adapter(runtime, where)
    weights = runtime.adapters.get(record)
    if form == pb.ADAPTER_FORMAT_DIFFUSERS:
        files = export_diffusers(weights, runtime.base)
    else:
        files = {f"{record.adapter_id}-{record.version}.safetensors": to_safetensors(weights)}
    return [(transfer.header_of(filename, data), data) for filename, data in files.items()]
