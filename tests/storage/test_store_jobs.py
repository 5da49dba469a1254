from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from mooring_server.errors import MooringError, Reason
from mooring_server.storage.jobs import LeaseLostError
from mooring_server.storage.models import JobState, Lease
from mooring_server.storage.store import Store
from store_rows import publish

LEASE = 30.0


def claim(store: Store, worker: str = "w1", **options):
    return store.claim_job(worker, LEASE, **options)


def key(job) -> tuple[str, str, str]:
    return job.tenant, job.job_id, job.lease


def states(store: Store, job) -> list[str]:
    return [e.payload["state"] for e in store.events(job.tenant, job.job_id) if e.kind == "state"]


def test_a_new_job_waits_and_is_claimed_in_order_of_arrival(store: Store) -> None:
    first = store.create_job("acme", "train", {"n": 1})
    second = store.create_job("other", "evaluate", {"n": 2})
    assert (first.state, first.spec, first.last_event) == (JobState.PENDING, {"n": 1}, 1)
    claimed = [claim(store), claim(store), claim(store)]
    assert [job and job.job_id for job in claimed] == [first.job_id, second.job_id, None]
    assert (claimed[0].state, claimed[0].worker, claimed[0].attempts) == (JobState.RUNNING, "w1", 1)


def test_tenants_take_turns_and_a_tenants_own_jobs_keep_their_order(store: Store, clock) -> None:
    def queue(tenant: str, count: int, kind: str = "train") -> list[str]:
        return [store.create_job(tenant, kind, {"n": n}).job_id for n in range(count)]

    def next_one() -> str:
        clock.now += 1
        return claim(store, kinds=["train"]).job_id

    many = queue("many", 5)
    queue("other", 3, "evaluate")
    first = [next_one(), next_one()]
    few, one = queue("few", 2), queue("other", 1)
    rest = [next_one() for _ in range(6)]
    assert first + rest == [*many[:2], few[0], one[0], many[2], few[1], *many[3:]]
    assert claim(store, kinds=["train"]) is None


def test_a_job_whose_runner_died_waits_for_one_job_of_another_tenant_at_most(store: Store, clock) -> None:
    lost = store.create_job("acme", "train", {})
    assert claim(store).job_id == lost.job_id
    others = [store.create_job("other", "train", {"n": n}).job_id for n in range(2)]
    clock.now += LEASE + 1
    assert claim(store).job_id == others[0]
    clock.now += 1
    assert claim(store).job_id == lost.job_id


def test_a_claim_can_be_for_some_kinds_only(store: Store) -> None:
    store.create_job("acme", "train", {})
    evaluation = store.create_job("acme", "evaluate", {})
    assert claim(store, kinds=["evaluate"]).job_id == evaluation.job_id
    assert claim(store, kinds=["evaluate"]) is None


def test_each_job_goes_to_one_of_many_claimers(open_store) -> None:
    replicas = [open_store() for _ in range(3)]
    made = {replicas[0].create_job("acme", "train", {"n": n}).job_id for n in range(24)}

    def work(number: int) -> list[str]:
        got = []
        while (job := claim(replicas[number % 3], f"w{number}")) is not None:
            got.append(job.job_id)
        return got

    with ThreadPoolExecutor(9) as pool:
        got = [job_id for ids in pool.map(work, range(9)) for job_id in ids]
    assert len(got) == len(made)
    assert set(got) == made


def test_the_same_request_makes_one_job_even_at_the_same_time(open_store) -> None:
    replicas = [open_store() for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        jobs = list(
            pool.map(
                lambda n: replicas[n % 4].create_job("acme", "train", {"a": 1}, request_id="r"), range(16)
            )
        )
    assert len({job.job_id for job in jobs}) == 1
    assert len(replicas[0].list_jobs("acme")[0]) == 1


def test_the_calling_span_stays_with_the_job_over_every_claim(store: Store) -> None:
    first, second = (f"00-{n:032x}-{n:016x}-01" for n in (1, 2))
    job = store.create_job("acme", "train", {}, request_id="r", traceparent=first)
    again = store.create_job("acme", "train", {}, request_id="r", traceparent=second)
    assert (again.job_id, again.traceparent) == (job.job_id, first), "the call that made it"
    for _ in range(2):
        claimed = store.claim_job("w", 60)
        assert claimed is not None
        assert claimed.traceparent == first
        store.release_job("acme", job.job_id, claimed.lease)
    assert store.create_job("acme", "train", {}).traceparent is None


def test_a_request_id_is_bound_to_payload_kind_and_tenant(store: Store) -> None:
    job = store.create_job("acme", "train", {"a": 1, "b": 2}, request_id="r")
    assert store.create_job("acme", "train", {"b": 2, "a": 1}, request_id="r") == job
    with pytest.raises(MooringError) as caught:
        store.create_job("acme", "train", {"a": 2}, request_id="r")
    assert caught.value.reason is Reason.REQUEST_ID_REUSED
    assert store.create_job("acme", "evaluate", {"a": 2}, request_id="r").job_id != job.job_id
    assert store.create_job("other", "train", {"a": 2}, request_id="r").job_id != job.job_id


def test_a_lease_holds_while_it_is_renewed(store: Store, clock) -> None:
    job = store.create_job("acme", "train", {})
    held = claim(store)
    for _ in range(5):
        clock.now += LEASE - 1
        assert store.heartbeat(*key(held), LEASE) is Lease.HELD
        assert claim(store, "w2") is None
    assert store.get_job("acme", job.job_id).lease_expires == clock.now + LEASE


def test_an_expired_lease_is_taken_over_and_its_holder_can_write_nothing_more(store: Store, clock) -> None:
    store.create_job("acme", "train", {})
    dead = claim(store, "w1")
    clock.now += LEASE + 1
    heir = claim(store, "w2")
    assert (heir.job_id, heir.attempts, heir.crashes) == (dead.job_id, 2, 1)
    assert store.heartbeat(*key(dead), LEASE) is Lease.LOST
    for write in (
        lambda: store.append_event(*key(dead), "progress", {"step": 1}),
        lambda: store.note_checkpoint(*key(dead), "jobs/1/c"),
        lambda: store.finish_job(*key(dead), JobState.SUCCEEDED, result={}),
        lambda: publish(store, job_id=dead.job_id, lease=dead.lease),
    ):
        with pytest.raises(LeaseLostError):
            write()
    store.release_job(*key(dead))
    assert store.get_job("acme", heir.job_id).lease == heir.lease
    assert store.list_adapters("acme") == ([], "")
    assert store.heartbeat(*key(heir), LEASE) is Lease.HELD


def test_an_expired_lease_that_nobody_took_is_still_its_holders(store: Store, clock) -> None:
    store.create_job("acme", "train", {})
    held = claim(store)
    clock.now += 10 * LEASE
    assert store.heartbeat(*key(held), LEASE) is Lease.HELD
    assert claim(store, "w2") is None


def test_a_released_job_is_claimed_again_without_counting_a_crash(store: Store) -> None:
    store.create_job("acme", "train", {})
    held = claim(store)
    store.release_job(*key(held))
    again = claim(store, "w2")
    assert (again.job_id, again.attempts, again.crashes) == (held.job_id, 2, 0)
    assert again.start_time == held.start_time
    assert states(store, held) == ["PENDING", "RUNNING", "PENDING", "RUNNING"]


def test_a_job_that_keeps_killing_its_runner_is_failed(store: Store, clock) -> None:
    job = store.create_job("acme", "train", {})
    for crashes in range(3):
        assert claim(store).crashes == crashes
        clock.now += LEASE + 1
    assert claim(store) is None
    ended = store.get_job("acme", job.job_id)
    assert (ended.state, ended.error["reason"]) == (JobState.FAILED, "INTERNAL")
    assert "3 times" in ended.error["message"]


def test_progress_between_crashes_starts_the_count_again(store: Store, clock) -> None:
    store.create_job("acme", "train", {})
    for _ in range(6):
        held = claim(store)
        store.note_checkpoint(*key(held), "jobs/1/c")
        clock.now += LEASE + 1
    assert claim(store).crashes == 1


def test_cancelling_a_waiting_job_ends_it_at_once(store: Store) -> None:
    job = store.create_job("acme", "train", {})
    assert store.request_cancel("acme", job.job_id).state is JobState.CANCELLED
    assert store.request_cancel("acme", job.job_id).state is JobState.CANCELLED
    assert claim(store) is None
    assert states(store, job) == ["PENDING", "CANCELLED"]


def test_cancelling_a_running_job_asks_its_runner(store: Store) -> None:
    job = store.create_job("acme", "train", {})
    held = claim(store)
    asked = store.request_cancel("acme", job.job_id)
    assert (asked.state, asked.cancel_requested) == (JobState.RUNNING, True)
    assert store.heartbeat(*key(held), LEASE) is Lease.CANCEL_REQUESTED
    assert store.finish_job(*key(held), JobState.CANCELLED).state is JobState.CANCELLED


@pytest.mark.parametrize("way", ["cancel after the crash", "crash after the cancel", "release"])
def test_a_cancelled_job_never_runs_again(store: Store, clock, way: str) -> None:
    job = store.create_job("acme", "train", {})
    held = claim(store)
    if way == "cancel after the crash":
        clock.now += LEASE + 1
    store.request_cancel("acme", job.job_id)
    if way == "crash after the cancel":
        clock.now += LEASE + 1
    if way == "release":
        store.release_job(*key(held))
    assert claim(store, "w2") is None
    assert store.get_job("acme", job.job_id).state is JobState.CANCELLED


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED])
def test_a_job_that_ended_cannot_be_cancelled(store: Store, state: JobState) -> None:
    store.create_job("acme", "train", {})
    held = claim(store)
    store.finish_job(*key(held), state, result={} if state is JobState.SUCCEEDED else None)
    with pytest.raises(MooringError) as caught:
        store.request_cancel("acme", held.job_id)
    assert caught.value.reason is Reason.JOB_NOT_CANCELLABLE


def test_events_are_numbered_without_gaps_and_can_be_resumed(store: Store) -> None:
    store.create_job("acme", "train", {})
    held = claim(store)
    for step in range(5):
        store.append_event(*key(held), "progress", {"step": step, "previews": ["x"]})
    error = {"reason": "TRAINING_DIVERGED", "message": "m", "remedy": "r"}
    store.finish_job(*key(held), JobState.FAILED, error=error)
    events = store.events("acme", held.job_id)
    assert [event.seq for event in events] == list(range(1, 9))
    assert events[-1].payload == {"state": "FAILED", "error": error}
    assert store.events("acme", held.job_id, after=4) == events[4:]
    assert store.events("acme", held.job_id, after=4, limit=2) == events[4:6]
    assert store.events("acme", held.job_id, after=8) == []
    job = store.get_job("acme", held.job_id)
    assert (job.progress, job.error, job.result, job.last_event) == ({"step": 4}, error, None, 8)


def test_figures_that_json_cannot_say_are_refused(store: Store) -> None:
    store.create_job("acme", "train", {})
    held = claim(store)
    with pytest.raises(Exception, match="JSON"):
        store.append_event(*key(held), "progress", {"loss": float("nan")})
    assert store.get_job("acme", held.job_id).last_event == 2


def test_another_tenants_job_looks_like_none(store: Store) -> None:
    job = store.create_job("other", "train", {})
    for call in (store.get_job, store.events, store.request_cancel):
        with pytest.raises(MooringError) as caught:
            call("acme", job.job_id)
        assert caught.value.reason is Reason.JOB_NOT_FOUND
    assert store.get_job("other", job.job_id).cancel_requested is False


def test_lists_filter_by_kind_and_state(store: Store) -> None:
    train = store.create_job("acme", "train", {})
    evaluation = store.create_job("acme", "evaluate", {})
    claim(store)

    def ids(**filters):
        return [job.job_id for job in store.list_jobs("acme", **filters)[0]]

    assert ids() == [evaluation.job_id, train.job_id]
    assert ids(kinds=["train"]) == [train.job_id]
    assert ids(states=[JobState.PENDING]) == [evaluation.job_id]
    assert ids(kinds=["train"], states=[JobState.PENDING]) == []
    assert store.count_jobs() == {("train", JobState.RUNNING): 1, ("evaluate", JobState.PENDING): 1}


def test_listeners_hear_of_committed_changes(store: Store) -> None:
    heard: list[tuple[str, str]] = []

    def broken(_tenant: str, _job_id: str) -> None:
        raise RuntimeError

    store.subscribe(broken)  # must not harm the others
    end = store.subscribe(lambda tenant, job_id: heard.append((tenant, store.get_job(tenant, job_id).state)))
    job = store.create_job("acme", "train", {})
    store.finish_job(*key(claim(store)), JobState.SUCCEEDED, result={})
    assert heard == [("acme", s) for s in (JobState.PENDING, JobState.RUNNING, JobState.SUCCEEDED)]
    end()
    end()
    store.create_job("acme", "train", {})
    assert len(heard) == 3
    assert job.state is JobState.PENDING
