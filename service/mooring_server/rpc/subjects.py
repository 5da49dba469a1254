"""SubjectService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from mooring.v1 import subject_pb2 as pb
from mooring.v1 import subject_pb2_grpc

from mooring_server.errors import FieldViolation, MooringError, Reason
from mooring_server.jobs import subjects as lifecycle
from mooring_server.jobs.subjects import PhotoUpload
from mooring_server.rpc import caller, convert, names
from mooring_server.rpc.edge import Context
from mooring_server.rpc.runtime import Provide, Runtime
from mooring_server.rpc.transfer import IncomingFile


class SubjectServicer(subject_pb2_grpc.SubjectServiceServicer):
    """Subjects and their photos over the store.

    Args:
        runtime: gives the server's parts.
    """

    def __init__(self, runtime: Provide) -> None:
        self._runtime = runtime

    async def CreateSubject(
        self, request: pb.CreateSubjectRequest, context: Context
    ) -> pb.CreateSubjectResponse:
        """See the contract."""
        del context
        runtime = self._runtime()
        tenant = names.check_parent(caller.tenant(), request.parent)
        request_id = names.check_request_id(request.request_id)
        subject_id = names.check_id(request.subject_id, "subject_id")
        wanted = request.subject
        placeholder = wanted.placeholder or f"<{subject_id}>"
        _check_words(wanted.class_noun, placeholder)
        record = await asyncio.to_thread(
            runtime.store.create_subject,
            tenant,
            subject_id,
            display_name=wanted.display_name or subject_id,
            class_noun=wanted.class_noun,
            placeholder=placeholder,
            rights=convert.rights_document(wanted.rights, "subject.rights"),
            request_id=request_id,
        )
        return pb.CreateSubjectResponse(subject=convert.subject(record))

    async def GetSubject(self, request: pb.GetSubjectRequest, context: Context) -> pb.GetSubjectResponse:
        """See the contract."""
        del context
        where = names.resolve_subject(caller.tenant(), request.name)
        subject = await asyncio.to_thread(self._with_photos, where.tenant, where.id)
        return pb.GetSubjectResponse(subject=subject)

    async def ListSubjects(
        self, request: pb.ListSubjectsRequest, context: Context
    ) -> pb.ListSubjectsResponse:
        """See the contract."""
        del context
        tenant = names.check_parent(caller.tenant(), request.parent)
        records, token = await asyncio.to_thread(
            self._runtime().store.list_subjects,
            tenant,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListSubjectsResponse(
            subjects=[convert.subject(record) for record in records], next_page_token=token
        )

    async def DeleteSubject(
        self, request: pb.DeleteSubjectRequest, context: Context
    ) -> pb.DeleteSubjectResponse:
        """See the contract."""
        del context
        runtime = self._runtime()
        where = names.resolve_subject(caller.tenant(), request.name)
        await asyncio.to_thread(
            lifecycle.delete_subject, runtime.store, runtime.objects, where.tenant, where.id
        )
        return pb.DeleteSubjectResponse()

    async def UploadPhotos(
        self, request_iterator: AsyncIterator[pb.UploadPhotosRequest], context: Context
    ) -> pb.UploadPhotosResponse:
        """See the contract."""
        del context
        runtime, tenant = self._runtime(), caller.tenant()
        with runtime.held.call(tenant) as hold:
            return await self._upload(runtime, tenant, request_iterator, hold)

    async def _upload(
        self,
        runtime: Runtime,
        tenant: str,
        messages: AsyncIterator[pb.UploadPhotosRequest],
        hold: Callable[[int], None],
    ) -> pb.UploadPhotosResponse:
        upload: PhotoUpload | None = None
        file: IncomingFile | None = None
        where = names.Resolved(names.NOBODY, "")
        count = 0
        async for message in messages:
            kind = message.WhichOneof("content")
            if kind == "subject":
                if upload is not None:
                    raise _protocol("subject", "comes once, in the first message")
                where = names.resolve_subject(tenant, message.subject, "subject")
                upload = await asyncio.to_thread(
                    PhotoUpload,
                    runtime.store,
                    runtime.objects,
                    where.tenant,
                    where.id,
                    decode=runtime.decoders.decode,
                )
            elif upload is None:
                raise _protocol("subject", "must be in the first message")
            elif kind == "file":
                await runtime.long.run(tenant, _finish, upload, file)
                file = IncomingFile(message.file, count, runtime.settings.max_photo_bytes)
                count += 1
            elif kind == "chunk" and file is not None:
                file.add(message.chunk)
                hold(upload.held_bytes + file.held_bytes)
            else:
                raise _protocol("content", "must be a file header, or a chunk after one")
        if upload is None:
            raise _protocol("subject", "must be in the first message")
        await runtime.long.run(tenant, _finish, upload, file)
        try:
            photos, added = await runtime.long.run(tenant, upload.commit)
        except MooringError:
            runtime.metrics.photos.labels("refused").inc(count)
            raise
        runtime.metrics.photos.labels("added").inc(added)
        runtime.metrics.photos.labels("known").inc(len(photos) - added)
        return pb.UploadPhotosResponse(
            photos=[convert.photo(photo) for photo in photos],
            added_count=added,
            subject=await asyncio.to_thread(self._with_photos, where.tenant, where.id),
        )

    def _with_photos(self, tenant: str, subject_id: str) -> pb.Subject:
        store = self._runtime().store
        return convert.subject(store.get_subject(tenant, subject_id), store.photos(tenant, subject_id))


def _finish(upload: PhotoUpload, file: IncomingFile | None) -> None:
    """Hash and decode a file; what is wrong with it is kept for the end, beside other files' errors."""
    if file is None:
        return
    try:
        data = file.finish()
    except MooringError as error:
        upload.reject(error)
    else:
        upload.add(file.header.filename, data)


def _check_words(class_noun: str, placeholder: str) -> None:
    problems = []
    if not class_noun.strip() or len(class_noun) > 64:
        problems.append(FieldViolation("subject.class_noun", "must have 1 to 64 characters"))
    if len(placeholder) > 32 or placeholder != "".join(placeholder.split()):
        problems.append(FieldViolation("subject.placeholder", "must have 1 to 32 characters and no blanks"))
    if problems:
        text = "; ".join(f"{problem.field} {problem.description}" for problem in problems)
        raise MooringError(
            Reason.INVALID_FIELD,
            f"{text}.",
            remedy="For example class noun “dog” and placeholder “<rex>”.",
            fields=problems,
        )


def _protocol(field: str, problem: str) -> MooringError:
    return MooringError(
        Reason.INVALID_FIELD,
        f"The upload stream is out of order: {field} {problem}.",
        remedy="Send the subject, then for each file its header and its chunks.",
        fields=[FieldViolation(field, problem)],
    )
