"""Quotas: the bucket and the depth by themselves, device time over replicas, and what callers are told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mooring.v1 import job_pb2
from mooring.v1 import personalization_pb2 as pb
from mooring_server.config import Quota, Role
from mooring_server.errors import MooringError
from mooring_server.rpc import quotas as quotas_module
from mooring_server.rpc.quotas import DAY_SECONDS, DeviceTime, Quotas, TokenBucket
from mooring_server.server import EmbeddedServer
from rpc_calls import DEADLINE, Failure, Stubs, failure_of, make_subject, png, publish, read_failure, upload
from test_access import info
from test_generate import generate

# -- the bucket ---------------------------------------------------------------------------------------------


@given(
    rate=st.floats(0.01, 1000),
    burst=st.floats(1, 100),
    waits=st.lists(st.floats(0, 10), min_size=1, max_size=60),
)
def test_a_bucket_lets_pass_its_burst_and_its_rate_and_no_more(
    rate: float, burst: float, waits: list[float]
) -> None:
    bucket, now, passed = TokenBucket(rate, burst, 0.0), 0.0, 0
    for wait in waits:
        now += wait
        passed += bucket.take(now) == 0
        assert passed <= burst + rate * now + 1e-6 * (1 + passed)


@given(rate=st.floats(0.01, 1000), burst=st.floats(1, 10), calls=st.integers(1, 30))
def test_the_wait_that_is_told_is_enough_and_a_refusal_costs_nothing(
    rate: float, burst: float, calls: int
) -> None:
    bucket, now = TokenBucket(rate, burst, 0.0), 0.0
    for _ in range(calls):
        wait = bucket.take(now)
        if wait:
            assert bucket.take(now) == pytest.approx(wait)
            now += wait
            assert bucket.take(now) == 0


def test_a_clock_that_goes_back_adds_nothing() -> None:
    bucket = TokenBucket(1.0, 1.0, 100.0)
    assert bucket.take(100.0) == 0
    assert bucket.take(50.0) == pytest.approx(1.0)
    assert bucket.take(100.5) == pytest.approx(0.5)


def test_tenants_have_buckets_of_their_own() -> None:
    quotas = Quotas(
        lambda tenant: Quota(requests_per_second=1, burst=1) if tenant == "a" else Quota(), lambda: 0.0
    )
    quotas.take_call("a")
    with pytest.raises(MooringError) as caught:
        quotas.take_call("a")
    assert caught.value.metadata["cause"] == "requests_per_second"
    assert caught.value.retry_after == pytest.approx(1.0)
    for _ in range(100):
        quotas.take_call("b")


def test_the_last_place_in_a_queue_goes_to_one_of_two_callers() -> None:
    quotas = Quotas(lambda _tenant: Quota(queue_depth=3), lambda: 0.0)
    inside, leave = threading.Barrier(8), threading.Event()
    refused: list[MooringError] = []

    def call(_: int) -> None:
        inside.wait(DEADLINE)
        try:
            with quotas.queued("a"):
                leave.wait(DEADLINE)
        except MooringError as error:
            refused.append(error)
            if len(refused) == 5:
                leave.set()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(call, range(8)))
    assert len(refused) == 5
    assert {error.metadata["cause"] for error in refused} == {"queue_depth"}
    assert quotas.depth("a") == 0


# -- device time --------------------------------------------------------------------------------------------


class Account:
    """What the store keeps, shared by replicas."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.broken = False
        self.now = 3 * DAY_SECONDS + 60.0

    def add(self, seconds: dict[str, float]) -> None:
        if self.broken:
            raise OSError("the database is away")
        for tenant, spent in seconds.items():
            self.seconds[tenant] = self.seconds.get(tenant, 0.0) + spent

    def read(self, tenant: str) -> tuple[float, float]:
        return self.seconds.get(tenant, 0.0), self.now


def test_device_time_of_all_replicas_counts_and_what_is_not_written_yet_too() -> None:
    account = Account()
    one, two = (DeviceTime(account.add, account.read) for _ in range(2))
    one.used("acme", 6.0)
    one.require("acme", 10.0)
    one.write()
    two.used("acme", 4.0)
    one.require("acme", 10.0)  # cannot know yet
    with pytest.raises(MooringError) as caught:
        two.require("acme", 10.0)
    assert caught.value.metadata == {
        "cause": "device_seconds_per_day",
        "scope": "tenant",
        "limit": "10",
        "used": "10",
    }
    assert caught.value.retry_after == pytest.approx(DAY_SECONDS - 60.0)
    two.write()
    with pytest.raises(MooringError):
        one.require("acme", 10.0)
    one.require("other", 10.0)
    one.require("acme", None)


def test_device_time_is_kept_while_the_database_is_away() -> None:
    account = Account()
    time = DeviceTime(account.add, account.read)
    time.used("acme", 2.0)
    account.broken = True
    with pytest.raises(OSError, match="away"):
        time.write()
    time.used("acme", 3.0)
    account.broken = False
    time.write()
    time.write()
    assert account.seconds == {"acme": 5.0}


# -- over a connection --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(guarded: EmbeddedServer, keys: dict[tuple[str, Role], str]) -> Stubs:
    """A caller of the tenant whose limits are narrow: see the fixture `guarded`."""
    return Stubs(guarded.target, keys["small", Role.ADMIN])


def told(failure: Failure) -> dict[str, Any]:
    assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    assert failure.metadata["scope"] == "tenant"
    return {
        "cause": failure.metadata["cause"],
        "limit": failure.metadata["limit"],
        "pushback": int(failure.trailers["grpc-retry-pushback-ms"]),
        "retry": failure.retry,
    }


def test_bytes_jobs_and_adapters_are_refused_with_cause_and_push_back(
    guarded: EmbeddedServer, small: Stubs
) -> None:
    runtime = guarded.server.runtime
    name = make_subject(small, "pet", photos=1)
    kept = sorted(runtime.objects.list("photos/"))
    full = failure_of(lambda: upload(small, name, {"large.png": png(9, size=(300, 300))}))
    assert sorted(runtime.objects.list("photos/")) == kept, "what is refused must not fill the store either"
    assert told(full) == {"cause": "stored_bytes", "limit": "100000", "pushback": -1, "retry": False}

    job = runtime.store.create_job("small", "elsewhere", {})  # of no kind that a runner takes
    train = pb.TrainRequest(subject=name)
    busy = failure_of(lambda: small.personalization.Train(train, timeout=DEADLINE))
    assert told(busy) == {"cause": "concurrent_jobs", "limit": "1", "pushback": 30_000, "retry": True}
    runtime.store.request_cancel("small", job.job_id)

    for adapter_id in ("one", "two"):
        publish(runtime, adapter_id, tenant="small", row={"size_bytes": 1})
    many = failure_of(lambda: small.personalization.Train(train, timeout=DEADLINE))
    assert told(many) == {"cause": "adapters", "limit": "2", "pushback": -1, "retry": False}


def test_of_two_generations_at_once_one_is_refused_and_a_batch_waits(
    guarded: EmbeddedServer, small: Stubs
) -> None:
    runtime = guarded.server.runtime
    with runtime.quotas.queued("small"):
        full = failure_of(lambda: generate(small))
        assert told(full) == {"cause": "queue_depth", "limit": "1", "pushback": 1000, "retry": True}
        request = pb.GenerateRequest(prompt="a photo of a dog", steps=1)
        batch = small.personalization.GenerateBatch(
            iter([pb.GenerateBatchRequest(id=str(i), request=request) for i in range(3)]), timeout=DEADLINE
        )
    answers = list(batch)
    assert [answer for answer in answers if answer.HasField("error")] == []
    assert {answer.id for answer in answers if answer.HasField("done")} == {"0", "1", "2"}
    assert runtime.quotas.depth("small") == 0


def test_a_tenant_may_not_hold_every_call_of_the_server_with_streams(
    guarded: EmbeddedServer, keys: dict[tuple[str, Role], str], limited: Callable[..., None]
) -> None:
    other, acme = (Stubs(guarded.target, keys[tenant, Role.USER]) for tenant in ("other", "acme"))
    runtime = guarded.server.runtime
    job = runtime.store.create_job("other", "elsewhere", {})  # of no kind that a runner takes
    limited(concurrent_calls=2)
    request = job_pb2.WatchJobRequest(name=f"tenants/-/jobs/{job.job_id}")
    watches = [other.jobs.WatchJob(request, timeout=DEADLINE) for _ in range(2)]
    for watch in watches:
        assert next(watch).job.state == job_pb2.JOB_STATE_PENDING
    full = failure_of(lambda: info(other))
    assert told(full) == {"cause": "concurrent_calls", "limit": "2", "pushback": 1000, "retry": True}
    assert info(acme)
    runtime.store.request_cancel("other", job.job_id)
    for watch in watches:
        list(watch)
    assert info(other)


def test_the_server_runs_so_many_calls_and_says_so_beyond(
    guarded: EmbeddedServer, keys: dict[tuple[str, Role], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    acme = Stubs(guarded.target, keys["acme", Role.USER])
    monkeypatch.setattr(quotas_module, "MAX_CALLS", 1)
    with guarded.server.runtime.quotas.calling("other"):
        full = failure_of(lambda: info(acme))
    assert (full.reason, full.metadata["scope"]) == ("QUEUE_FULL", "server")
    assert (full.code, full.retry) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    assert info(acme)


def test_calls_that_a_role_is_denied_count_too_and_so_do_not_fill_the_audit_log(
    guarded: EmbeddedServer, keys: dict[tuple[str, Role], str], limited: Callable[..., None]
) -> None:
    other = Stubs(guarded.target, keys["other", Role.READ_ONLY])
    store = guarded.server.runtime.store
    limited(requests_per_second=0.001, burst=1)
    train, before = pb.TrainRequest(), store.audit_head().number
    reasons = [
        failure_of(lambda: other.personalization.Train(train, timeout=DEADLINE)).reason for _ in range(3)
    ]
    assert reasons == ["NOT_ALLOWED", "QUOTA_EXCEEDED", "QUOTA_EXCEEDED"]
    written = store.audit_entries(tenant="other", after=before)
    assert [entry.decision for entry in written] == ["denied"]


@pytest.fixture
def limited(guarded: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces the limits of the tenant "other" on the running server."""

    def limit(**values: Any) -> None:
        before = guarded.server.settings.quota_of
        quota = Quota(**values)

        def quota_of(tenant: str) -> Quota:
            return quota if tenant == "other" else before(tenant)

        monkeypatch.setattr(type(guarded.server.settings), "quota_of", lambda _self, tenant: quota_of(tenant))
        monkeypatch.setattr(guarded.server._quotas, "_quota_of", quota_of)

    return limit


def test_calls_above_the_rate_are_refused_with_the_time_to_wait(
    guarded: EmbeddedServer, keys: dict[tuple[str, Role], str], limited: Callable[..., None]
) -> None:
    limited(requests_per_second=0.001, burst=2)
    stubs = Stubs(guarded.target, keys["other", Role.READ_ONLY])

    def call(_: int) -> Failure | None:
        try:
            stubs.personalization.GetServerInfo(pb.GetServerInfoRequest(), timeout=DEADLINE)
        except grpc.RpcError as error:
            failed: Any = error
            return read_failure(failed.code(), failed.details(), failed.trailing_metadata())
        return None

    with ThreadPoolExecutor(2) as threads:
        failures = [failure for failure in threads.map(call, range(6)) if failure is not None]
    assert len(failures) == 4
    for failure in failures:
        assert told(failure)["cause"] == "requests_per_second"
        assert 900_000 < told(failure)["pushback"] <= 1_000_000


def test_device_time_is_counted_and_ends_for_the_day(
    guarded: EmbeddedServer, keys: dict[tuple[str, Role], str], limited: Callable[..., None]
) -> None:
    runtime = guarded.server.runtime
    stubs = Stubs(guarded.target, keys["other", Role.USER])
    runtime.device_time.write()
    before = runtime.store.device_seconds("other")[0]
    assert generate(stubs)[-1].HasField("done")
    runtime.device_time.write()
    used = runtime.store.device_seconds("other")[0]
    assert used > before
    limited(device_seconds_per_day=used / 2)
    spent = told(failure_of(lambda: generate(stubs)))
    assert spent["cause"] == "device_seconds_per_day"
    assert 0 < spent["pushback"] <= DAY_SECONDS * 1000
    train = failure_of(lambda: stubs.personalization.Train(pb.TrainRequest(subject="tenants/-/subjects/x")))
    assert told(train)["cause"] == "device_seconds_per_day"
