"""The life of jobs against a model of it: random claims, crashes, cancellations, releases and endings."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from mooring_server.errors import MooringError, Reason
from mooring_server.storage.jobs import LeaseLostError
from mooring_server.storage.models import Job, JobState, Lease
from mooring_server.storage.store import Store
from store_rows import publish

LEASE = 10.0
MAX_CRASHES = 2
FINAL = {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
MOVES = {
    None: {JobState.PENDING},
    JobState.PENDING: {JobState.RUNNING, JobState.CANCELLED},
    JobState.RUNNING: {JobState.RUNNING, JobState.PENDING, *FINAL},
}


@dataclass
class Expected:
    job_id: str
    state: JobState = JobState.PENDING
    lease: str = ""
    expires: float = 0.0
    crashes: int = 0
    cancel_requested: bool = False
    published: list[str] = field(default_factory=list)


class JobLife(RuleBasedStateMachine):
    """Several runners and users act on a few jobs; the store must agree with `Expected` at every point."""

    jobs = Bundle("jobs")
    claims = Bundle("claims")

    @initialize()
    def open(self) -> None:
        self.files = contextlib.ExitStack()
        folder = self.files.enter_context(tempfile.TemporaryDirectory())
        self.now = 1000.0
        self.store = Store(f"sqlite:///{folder}/db", clock=lambda: self.now)
        self.expected: dict[str, Expected] = {}

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.files.close()

    @rule(target=jobs)
    def create(self) -> str:
        job = self.store.create_job("acme", "train", {"n": len(self.expected)})
        self.expected[job.job_id] = Expected(job.job_id)
        return job.job_id

    @rule(seconds=st.sampled_from([1.0, 4.0, LEASE + 1]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=claims)
    def claim(self) -> Job | None:
        job = self.store.claim_job("w", LEASE, max_crashes=MAX_CRASHES)
        wanted = None
        for expected in self.expected.values():  # in order of creation
            abandoned = expected.state is JobState.RUNNING and expected.expires < self.now
            if expected.state is not JobState.PENDING and not abandoned:
                continue
            crashes = expected.crashes + abandoned
            if expected.cancel_requested:
                expected.state = JobState.CANCELLED
            elif crashes >= MAX_CRASHES:
                expected.state = JobState.FAILED
            else:
                wanted = expected
                wanted.crashes = crashes
                break
        assert (job and job.job_id) == (wanted and wanted.job_id)
        if job is None or wanted is None:
            return None
        assert job.lease
        assert job.lease != wanted.lease
        wanted.state, wanted.lease, wanted.expires = JobState.RUNNING, job.lease, self.now + LEASE
        return job

    def holder(self, claim: Job) -> Expected | None:
        """The model's job while `claim` is its current one."""
        expected = self.expected[claim.job_id]
        holds = expected.state is JobState.RUNNING and expected.lease == claim.lease
        return expected if holds else None

    @rule(claim=claims)
    def heartbeat(self, claim: Job | None) -> None:
        if claim is None:
            return
        told = self.store.heartbeat("acme", claim.job_id, claim.lease, LEASE)
        held = self.holder(claim)
        if held is None:
            assert told is Lease.LOST
            return
        assert told is (Lease.CANCEL_REQUESTED if held.cancel_requested else Lease.HELD)
        held.expires = self.now + LEASE

    @rule(claim=claims)
    def progress(self, claim: Job | None) -> None:
        if claim is None:
            return
        with contextlib.suppress(LeaseLostError):
            self.store.append_event("acme", claim.job_id, claim.lease, "progress", {"step": 1})
            assert self.holder(claim) is not None
            return
        assert self.holder(claim) is None

    @rule(claim=claims)
    def checkpoint(self, claim: Job | None) -> None:
        if claim is None:
            return
        held = self.holder(claim)
        try:
            self.store.note_checkpoint("acme", claim.job_id, claim.lease, f"jobs/{claim.job_id}/c")
        except LeaseLostError:
            assert held is None
        else:
            assert held is not None
            held.crashes = 0

    @rule(claim=consumes(claims))
    def release(self, claim: Job | None) -> None:
        if claim is None:
            return
        held = self.holder(claim)
        self.store.release_job("acme", claim.job_id, claim.lease)
        if held is not None:
            held.state = JobState.CANCELLED if held.cancel_requested else JobState.PENDING

    @rule(claim=claims, state=st.sampled_from(sorted(FINAL)))
    def finish(self, claim: Job | None, state: JobState) -> None:
        if claim is None:
            return
        held = self.holder(claim)
        try:
            self.store.finish_job("acme", claim.job_id, claim.lease, state)
        except LeaseLostError:
            assert held is None
        else:
            assert held is not None
            held.state = state

    @rule(claim=claims)
    def publish(self, claim: Job | None) -> None:
        if claim is None:
            return
        held = self.holder(claim)
        try:
            adapter = publish(self.store, job_id=claim.job_id, lease=claim.lease)
        except LeaseLostError:
            assert held is None
        else:
            assert held is not None
            held.state = JobState.SUCCEEDED
            held.published.append(adapter.name)

    @rule(job_id=jobs)
    def cancel(self, job_id: str) -> None:
        expected = self.expected[job_id]
        try:
            job = self.store.request_cancel("acme", job_id)
        except MooringError as error:
            assert error.reason is Reason.JOB_NOT_CANCELLABLE  # noqa: PT017 - both ways are right
            assert expected.state in {JobState.SUCCEEDED, JobState.FAILED}
            return
        abandoned = expected.state is JobState.RUNNING and expected.expires < self.now
        if expected.state is JobState.PENDING or abandoned:
            expected.state = JobState.CANCELLED
        elif expected.state is JobState.RUNNING:
            expected.cancel_requested = True
        assert job.state is expected.state

    @invariant()
    def the_store_agrees(self) -> None:
        for expected in getattr(self, "expected", {}).values():
            job = self.store.get_job("acme", expected.job_id)
            assert job.state is expected.state
            if job.state is JobState.RUNNING:
                assert (job.lease, job.lease_expires) == (expected.lease, expected.expires)
                assert (job.crashes, job.cancel_requested) == (expected.crashes, expected.cancel_requested)
            else:
                assert (job.lease, job.lease_expires) == ("", None)
            assert (job.end_time is not None) == job.state.final

    @invariant()
    def histories_are_whole(self) -> None:
        for job_id in getattr(self, "expected", {}):
            events = self.store.events("acme", job_id)
            assert [event.seq for event in events] == list(range(1, len(events) + 1))
            moves = [JobState(event.payload["state"]) for event in events if event.kind == "state"]
            for before, after in zip([None, *moves], moves, strict=False):
                assert after in MOVES[before]
            assert moves[-1] is self.store.get_job("acme", job_id).state

    @invariant()
    def a_job_publishes_once(self) -> None:
        for expected in getattr(self, "expected", {}).values():
            assert len(expected.published) <= 1
            if expected.published:
                assert self.store.get_job("acme", expected.job_id).result["adapter"] == expected.published[0]


TestJobLife = JobLife.TestCase
TestJobLife.settings = settings(
    max_examples=20,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
