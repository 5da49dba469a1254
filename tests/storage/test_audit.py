"""The audit log: every change has its entry, and whatever is done to the entries behind its back is found."""

from __future__ import annotations

import json
import re
import threading

import pytest
from mooring_server.errors import MooringError
from mooring_server.storage import schema
from mooring_server.storage.audit import ACTOR, GENESIS, Actor, Head
from mooring_server.storage.store import Store
from sqlalchemy import delete, insert, select, update
from store_rows import new_subject, publish

LOG = schema.audit_log


def fill(store: Store, count: int = 6) -> list:
    for number in range(count):
        store.record("acme", "Generate", f"adapter-{number}", decision="allowed", prompt_hash="sha256:ab")
    return list(store.audit_entries())


def behind_its_back(store: Store, *statements) -> None:
    with store.writing() as connection:
        for statement in statements:
            connection.execute(statement)


def test_an_untouched_log_is_intact(store):
    assert store.verify_audit().head == Head(0, GENESIS)
    entries = fill(store)
    verdict = store.verify_audit()
    assert verdict.intact
    assert verdict.head == store.audit_head() == Head(6, entries[-1].hash)
    assert [entry.number for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert entries[0].previous_hash == GENESIS


def test_a_change_and_its_entry_come_together(store):
    token = ACTOR.set(Actor("key-1", "admin", "SubjectService/CreateSubject", "r1"))
    try:
        subject = new_subject(store, "acme", "rex", class_noun="dog")
    finally:
        ACTOR.reset(token)
    (entry,) = store.audit_entries()
    assert (entry.subject, entry.role, entry.method) == ("key-1", "admin", "SubjectService/CreateSubject")
    assert (entry.tenant, entry.resource, entry.decision) == (
        "acme",
        f"subjects/{subject.subject_id}",
        "done",
    )
    with pytest.raises(MooringError):
        new_subject(store, "acme", "rex", class_noun="cat")
    assert store.audit_head().number == 1, "what was refused left no entry"


def test_every_change_of_the_store_has_an_entry(store):
    new_subject(store, "acme", "rex", class_noun="dog")
    job = store.create_job("acme", "train", {"subject": "rex"})
    store.request_cancel("acme", job.job_id)
    adapter = publish(store, "acme", "rex")
    store.delete_adapter("acme", "rex")
    store.delete_subject("acme", "rex")
    entries = list(store.audit_entries())
    assert [(entry.method, entry.resource) for entry in entries] == [
        ("CreateSubject", "subjects/rex"),
        ("CreateJob/train", f"jobs/{job.job_id}"),
        ("EndJob/train", f"jobs/{job.job_id}"),
        ("CancelJob", f"jobs/{job.job_id}"),
        ("AddAdapter", "adapters/rex@1"),
        ("DeleteAdapter", "adapters/rex@1"),
        ("DeleteSubject", "subjects/rex"),
    ]
    assert entries[2].decision == "cancelled"
    assert entries[4].digests == adapter.digest
    assert store.verify_audit().intact


@pytest.mark.parametrize(
    "field", ["time", "tenant", "subject", "role", "method", "resource", "decision", "prompt_hash", "digests"]
)
def test_an_edited_entry_is_found(store, field):
    fill(store)
    value = 1.5 if field == "time" else "other"
    behind_its_back(store, update(LOG).filter_by(number=3).values({field: value}))
    verdict = store.verify_audit()
    assert verdict.head.number == 2
    assert "entry 3 was changed" in verdict.problem


def test_an_edited_entry_with_its_hash_made_anew_is_found_at_the_next(store):
    import dataclasses

    entries = fill(store)
    forged = dataclasses.replace(entries[2], tenant="other")
    values = {"tenant": "other", "hash": forged.computed_hash()}
    behind_its_back(store, update(LOG).filter_by(number=3).values(values))
    assert "entry 4 does not follow entry 3" in store.verify_audit().problem


def test_a_deleted_entry_is_found(store):
    fill(store)
    behind_its_back(store, delete(LOG).filter_by(number=4))
    verdict = store.verify_audit()
    assert (verdict.head.number, "entry 4 is missing" in verdict.problem) == (3, True)


def test_a_deleted_entry_whose_gap_was_closed_is_found(store):
    fill(store)
    behind_its_back(
        store,
        delete(LOG).filter_by(number=4),
        update(LOG).filter_by(number=5).values(number=4),
        update(LOG).filter_by(number=6).values(number=5),
    )
    assert "entry 4" in store.verify_audit().problem


def test_swapped_entries_are_found(store):
    fill(store)
    behind_its_back(
        store,
        update(LOG).filter_by(number=2).values(number=99),
        update(LOG).filter_by(number=3).values(number=2),
        update(LOG).filter_by(number=99).values(number=3),
    )
    assert "entry 2" in store.verify_audit().problem


def test_a_cut_log_is_found_by_its_head(store):
    fill(store)
    behind_its_back(store, delete(LOG).where(LOG.c.number > 4))
    assert "ends at entry 4, its head says 6" in store.verify_audit().problem


def test_a_cut_log_with_its_head_set_back_is_found_by_a_head_recorded_elsewhere(store):
    recorded = Head(6, fill(store)[-1].hash)
    with store.reading() as connection:
        fourth = connection.scalar(select(LOG.c.hash).filter_by(number=4))
    behind_its_back(
        store,
        delete(LOG).where(LOG.c.number > 4),
        update(schema.audit_head).values(number=4, hash=fourth),
    )
    assert store.verify_audit().intact, "the chain alone cannot see it"
    assert "entry 6 was recorded" in store.verify_audit(expected=[recorded]).problem
    assert "entry 6 was recorded" in store.verify_audit(recorded).problem
    fill(store, 4)
    assert "and has hash" in store.verify_audit(expected=[recorded]).problem, "grown again"


def test_an_entry_added_past_the_head_is_found(store):
    entries = fill(store)
    import dataclasses

    extra = dataclasses.replace(entries[-1], number=7, previous_hash=entries[-1].hash)
    extra = dataclasses.replace(extra, hash=extra.computed_hash())
    behind_its_back(store, insert(LOG).values(**dataclasses.asdict(extra)))
    assert "added past the head" in store.verify_audit().problem


def test_what_came_since_is_verified_alone(store):
    fill(store)
    place = store.verify_audit().head
    fill(store, 3)
    assert store.verify_audit(place).head.number == 9
    behind_its_back(store, update(LOG).filter_by(number=8).values(role="other"))
    assert "entry 8" in store.verify_audit(place).problem


def test_replicas_write_one_chain(open_store):
    stores = [open_store(), open_store()]

    def write(store: Store) -> None:
        for number in range(15):
            store.record("acme", "Generate", str(number), decision="allowed")

    threads = [threading.Thread(target=write, args=[store]) for store in stores for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verdict = stores[0].verify_audit()
    assert verdict.intact, verdict.problem
    assert verdict.head.number == 60


def test_tail_and_tenant(store):
    fill(store, 3)
    store.record("other", "Generate", "x", decision="allowed")
    assert [entry.number for entry in store.audit_entries(last=2)] == [3, 4]
    assert [entry.number for entry in store.audit_entries(tenant="acme", last=2)] == [2, 3]
    assert [entry.tenant for entry in store.audit_entries(after=3)] == ["other"]


def test_the_command_verifies_tails_and_exports(tmp_path):
    from mooring_server.cli import app
    from typer.testing import CliRunner

    state = tmp_path / "state"
    store = Store(f"sqlite:///{state}/mooring.db")
    entries = fill(store, 3)
    call = lambda *words: CliRunner().invoke(app, ["audit", *words, "--state-dir", str(state)])  # noqa: E731
    told = call("verify")
    assert told.exit_code == 0, told.output
    assert f"3 entries; head 3:{entries[-1].hash}" in told.output
    assert len(re.findall(r"allowed Generate adapter-", call("tail").output)) == 3
    assert json.loads(call("tail", "-n", "1", "--json").output)[0]["number"] == 3
    exported = tmp_path / "audit.jsonl"
    assert call("export", "--out", str(exported)).exit_code == 0
    lines = [json.loads(line) for line in exported.read_text().splitlines()]
    assert [line["hash"] for line in lines] == [entry.hash for entry in entries]
    assert call("verify", "--expect", f"2:{entries[1].hash}").exit_code == 0
    assert call("verify", "--expect", f"2:{entries[2].hash}").exit_code == 1
    assert call("verify", "--expect", "nonsense").exit_code == 2
    behind_its_back(store, update(LOG).filter_by(number=2).values(tenant="other"))
    broken = call("verify")
    store.close()
    assert broken.exit_code == 1
    assert "entry 2 was changed" in broken.output
