"""What must hold after every break: nothing lost, half or double, and no row that refers to nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from mooring_server.errors import MooringError
from mooring_server.jobs.batch_rows import image_key
from mooring_server.storage import schema
from mooring_server.storage.models import Adapter, AliasMove, Job, JobState, MoveKind, Verdict
from sqlalchemy import Connection, func, select

from .place import TENANT, Place, pages
from .table import Row
from .work import load, photos_of, records_of, trained_digest


class Checker:
    """Looks at one place, again and again; what was whole once is read again only at the end."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._store, self._objects = place.store(), place.objects()
        self._photos = photos_of(self._store, self._objects)
        self._whole: set[str] = set()

    def close(self) -> None:
        """Close the database."""
        self._store.close()

    def running(self) -> dict[str, str]:
        """Jobs that are being run, with the lease of each; none while the database is away."""
        jobs = pages(self._store.list_jobs, TENANT, states=[JobState.RUNNING])
        return {job.job_id: job.lease for job in jobs}

    def kinds_running(self) -> set[str]:
        """Their kinds."""
        return {job.kind for job in pages(self._store.list_jobs, TENANT, states=[JobState.RUNNING])}

    def worker_of(self, kind: str) -> str:
        """Who runs a job of that kind; "" for nobody."""
        jobs = list(pages(self._store.list_jobs, TENANT, kinds=[kind], states=[JobState.RUNNING]))
        return jobs[0].worker if jobs else ""

    def taken_over(self, held: dict[str, str]) -> bool:
        """Whether each of those jobs has ended or runs under another lease."""
        for job_id, lease in held.items():
            job = self._store.get_job(TENANT, job_id)
            if not job.state.final and (job.state is not JobState.RUNNING or job.lease == lease):
                return False
        return True

    def look(self, row: Row, *, finished: bool = False) -> None:
        """Note everything that is wrong.

        Args:
            row: where it is noted.
            finished: every request was answered and every job is to be done; all is read again.
        """
        if finished:
            self._whole.clear()
        said = self._place.said()
        answered = [note for note in said if "done" in note]
        row.acknowledged = len({note["number"] for note in answered})
        for note in said:
            if "fault" in note:
                row.found("lost", f"a call met an untyped fault: {note['fault']}")
        # Work may go on meanwhile: what refers is read before what it refers to, here and below.
        moves = list(pages(self._store.list_alias_moves, TENANT, "duck"))
        jobs = {job.job_id: job for job in pages(self._store.list_jobs, TENANT)}
        adapters = list(pages(self._store.list_adapters, TENANT))
        row.jobs, row.takeovers = len(jobs), sum(max(0, job.attempts - 1) for job in jobs.values())
        self._answers(row, answered, adapters, jobs)
        for adapter in adapters:
            self._once(row, adapter.object_key, lambda adapter=adapter: load(self._objects, adapter))
        self._photo_files(row)
        for job in jobs.values():
            self._job(row, job, adapters, finished=finished)
        self._published(row, moves, jobs)
        self._doubles(row, moves, adapters, jobs, finished=finished)
        with self._store.reading() as connection:
            for problem in orphans(connection):
                row.found("orphans", problem)
        verdict = self._store.verify_audit()
        if verdict.problem:
            row.found("half", f"the audit log: {verdict.problem}")

    def _once(self, row: Row, key: str, read: Callable[[], Any]) -> None:
        """Read an object that a row names, unless it was read before."""
        if key in self._whole:
            return
        try:
            read()
            self._whole.add(key)
        except KeyError:
            row.found("lost", f"a row names {key}, which is not there")
        except (MooringError, ValueError) as error:
            row.found("half", f"a row names {key}: {error}")

    def _answers(
        self, row: Row, answered: list[dict[str, Any]], adapters: list[Adapter], jobs: dict[str, Job]
    ) -> None:
        decisions = {d.decision_id for d in pages(self._store.list_gate_decisions, TENANT)}
        imported = {adapter.object_key for adapter in adapters if not adapter.job_id}
        photos = set(self._photo_keys())
        there = {
            "upload": photos,
            "import": imported,
            "publish": decisions,
            **dict.fromkeys(("train", "evaluate", "batch"), jobs.keys()),
        }
        heard: dict[int, str] = {}
        for note in answered:
            op, number = note["done"], note["number"]
            for answer in note["answers"]:
                if heard.setdefault(number, answer) != answer:
                    row.found("double", f"{op} {number} was answered with {heard[number]} and {answer}")
                if answer not in there[op]:
                    row.found("lost", f"{op} {number} was answered with {answer}, which is not there")

    def _photo_keys(self) -> Iterator[str]:
        for subject in pages(self._store.list_subjects, TENANT):
            yield from (photo.object_key for photo in self._store.photos(TENANT, subject.subject_id))

    def _photo_files(self, row: Row) -> None:
        for key in self._photo_keys():
            self._once(row, key, lambda key=key: self._objects.get(key))

    def _job(self, row: Row, job: Job, adapters: list[Adapter], *, finished: bool) -> None:
        name = f"{job.kind} {job.job_id}"
        if job.state is JobState.FAILED:
            row.found("lost", f"{name} failed: {job.error}")
        if finished and not job.state.final:
            row.found("lost", f"{name} is still {job.state}")
        if job.state is not JobState.SUCCEEDED or job.result is None:
            return
        for artifact in job.result["artifacts"]:
            key = artifact["object_key"]
            self._once(row, key, lambda key=key: self._objects.get(key))
        if job.kind == "train":
            made = [adapter for adapter in adapters if adapter.job_id == job.job_id]
            if len(made) != 1:
                row.found("double" if made else "half", f"{name} succeeded with {len(made)} adapters")
            wanted = trained_digest(self._photos, job)
            if any(adapter.digest != wanted for adapter in made) or job.result["digest"] != wanted:
                row.found("half", f"{name} has not the digest of an undisturbed run")
        elif job.kind == "batch":
            self._once(row, f"{name}'s manifest", lambda: self._batch(row, job))

    def _batch(self, row: Row, job: Job) -> None:
        """Every row once, each image what the manifest says, all as of an undisturbed run."""
        assert job.result is not None
        (artifact,) = job.result["artifacts"]
        manifest = [json.loads(line) for line in self._objects.get(artifact["object_key"]).splitlines()]
        numbers = [record["row"] for record in manifest]
        if numbers != sorted(set(numbers)):
            row.found("double", f"batch {job.job_id}: the manifest has the rows {numbers}")
        signed = {"sha256", "size_bytes"}
        if [{k: v for k, v in record.items() if k not in signed} for record in manifest] != records_of(job):
            row.found("half", f"batch {job.job_id}: not the manifest of an undisturbed run: {manifest}")
        done = self._store.batch_rows(TENANT, job.job_id)
        if [one.position for one in done] != list(range(1, len(done) + 1)):
            row.found("half", f"batch {job.job_id}: positions {[one.position for one in done]}")
        if sorted(one.row for one in done) != numbers:
            row.found("half", f"batch {job.job_id}: records of rows {sorted(one.row for one in done)}")
        for record in manifest:
            if "sha256" in record:
                data = self._objects.get(image_key(job.job_id, record["row"], record["sha256"]))
                if hashlib.sha256(data).hexdigest() != record["sha256"]:
                    row.found("half", f"batch {job.job_id}, row {record['row']}: another image")

    def _published(self, row: Row, moves: list[AliasMove], jobs: dict[str, Job]) -> None:
        """What is live was let through by the gate, on an evaluation that is there and of that digest."""
        decisions = {d.decision_id: d for d in pages(self._store.list_gate_decisions, TENANT)}
        for decision in decisions.values():
            if decision.verdict is not Verdict.PASSED:
                row.found("lost", f"the gate refused duck@{decision.version}: {decision.checks}")
        for move in moves:
            if move.kind is not MoveKind.PUBLISH:
                continue
            decision = decisions.get(move.decision_id)
            evaluation = None if decision is None else jobs.get(decision.evaluation_job_id)
            if evaluation is None or evaluation.state is not JobState.SUCCEEDED or not evaluation.result:
                row.found("half", f"duck@{move.version} was published without its evaluation")
            elif evaluation.result["figures"]["adapter_digest"] != decision.digest:
                row.found("half", f"duck@{move.version} was published by another digest's evaluation")

    def _doubles(
        self,
        row: Row,
        moves: list[AliasMove],
        adapters: list[Adapter],
        jobs: dict[str, Job],
        *,
        finished: bool,
    ) -> None:
        """No more things than requests; in the end, when all were answered, no fewer either."""
        there = {
            "upload": len(list(self._photo_keys())) - 1,
            "import": sum(not adapter.job_id for adapter in adapters),
            "publish": len(moves),
            **{
                kind: sum(job.kind == kind for job in jobs.values())
                for kind in ("train", "evaluate", "batch")
            },
        }
        said = self._place.said()
        for op, count in there.items():
            begun = len({note["number"] for note in said if note.get("begin") == op})
            if count > begun:
                row.found("double", f"{begun} requests of {op} made {count}")
            if finished and count < begun:
                row.found("lost", f"{begun} requests of {op} made {count}")
        of_jobs = [adapter.job_id for adapter in adapters if adapter.job_id]
        if len(of_jobs) != len(set(of_jobs)):
            row.found("double", "a job with two adapters")


def orphans(connection: Connection) -> Iterator[str]:
    """Rows that refer to rows that are not there, by columns; foreign keys say so only of some of them."""
    jobs, adapters, decisions = schema.jobs, schema.adapters, schema.gate_decisions
    requests, moves = schema.requests, schema.alias_moves
    references = [
        ("events of a job", schema.job_events.c.job_id, jobs.c.job_id, None),
        ("rows of a batch", schema.batch_rows.c.job_id, jobs.c.job_id, None),
        ("photos of a subject", schema.photos.c.subject_id, schema.subjects.c.subject_id, None),
        ("adapters of a job", adapters.c.job_id, jobs.c.job_id, adapters.c.job_id.is_not(None)),
        ("aliases", schema.adapter_aliases.c.move, moves.c.number, None),
        ("moves of an alias", moves.c.decision_id, decisions.c.decision_id, moves.c.decision_id != ""),
        ("requests of a job", requests.c.resource, jobs.c.job_id, requests.c.rpc.like("CreateJob/%")),
        (
            "requests of an import",
            requests.c.resource,
            adapters.c.object_key,
            requests.c.rpc == "ImportAdapter",
        ),
        (
            "requests of a publication",
            requests.c.resource,
            decisions.c.decision_id,
            requests.c.rpc == "PublishAdapter",
        ),
        ("decisions", decisions.c.evaluation_job_id, jobs.c.job_id, decisions.c.evaluation_job_id != ""),
    ]
    for name, column, target, only in references:
        query = select(func.count()).select_from(column.table).where(column.not_in(select(target)))
        count = connection.scalar(query if only is None else query.where(only))
        if count:
            yield f"{count} {name} that do not exist"
