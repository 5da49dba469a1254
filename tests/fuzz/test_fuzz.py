"""Every method of every service, under requests that are nearly right: it answers, it ends, it stays up.

This sends about 1,500 messages, `python -m tests.fuzz` 50,000. A failure prints the method and the bytes;
hypothesis has shortened them by then.
"""

from __future__ import annotations

import threading

import grpc
import pytest
from mooring import _requests
from mooring.v1 import subject_pb2
from mooring_server.storage.objects import LocalObjects

from .calling import ask
from .campaign import Campaign
from .site import BY_NAME, METHODS, Resources, Site, embedded, leftovers

MESSAGES = 1500
_HANDLES, _THREADS = 24, 12
"""More than before that may be there: pools that fill up, connections that close in a moment."""


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    state = tmp_path_factory.mktemp("fuzz")
    with embedded(state) as (site, server):
        yield site, server
    assert leftovers(state) == []


@pytest.fixture(scope="module")
def site(running) -> Site:
    return running[0]


@pytest.fixture(scope="module")
def before(site):
    return site.others(), Resources.of(site.pid)


@pytest.fixture(scope="module")
def campaign(site, before) -> Campaign:
    return Campaign(site)


def fuzz(campaign: Campaign, number: int) -> None:
    campaign.run(METHODS[number], MESSAGES // len(METHODS), number)


@pytest.mark.parametrize("number", range(len(METHODS)), ids=[method.name for method in METHODS])
def test_no_handler_breaks(campaign, number):
    fuzz(campaign, number)
    campaign.site.settle()
    assert not campaign.site.bugs_told(), "calls that ended in a bug after their caller had left"


def test_what_was_sent_got_far_enough_to_matter(campaign):
    """A fuzzer whose every message is refused at the door would pass anything."""
    for number, method in enumerate(METHODS):
        if not campaign.tallies[method.name].calls:  # run without the tests above
            fuzz(campaign, number)
    assert campaign.shallow() == []


def test_afterwards_everything_is_as_it_was(campaign, before):
    site = campaign.site
    things, held = before
    assert site.serving()
    assert site.jobs_broken() == []
    after = site.others()
    assert [name for name in things if things[name] != after[name]] == []
    now = Resources.of(site.pid)
    assert now.threads <= held.threads + _THREADS
    assert now.handles <= held.handles + _HANDLES


# ------------------------------------------------------------------------------------- that it can fail


def test_a_handler_that_breaks_is_found_and_its_input_told(running, monkeypatch):
    site, server = running
    store = server.server.runtime.store
    listed = store.list_subjects

    def broken(*arguments, page_size=0, **options):
        if page_size > 3:
            raise ZeroDivisionError
        return listed(*arguments, page_size=page_size, **options)

    monkeypatch.setattr(store, "list_subjects", broken)
    with pytest.raises(AssertionError, match=r"ListSubjects: INTERNAL"):
        Campaign(site).run(BY_NAME["ListSubjects"], 200, 1)


def test_a_handler_that_hangs_is_found(running, monkeypatch):
    site, server = running
    release = threading.Event()
    monkeypatch.setattr(server.server.runtime.store, "list_jobs", lambda *_a, **_k: release.wait(60))
    try:
        with pytest.raises(AssertionError, match=r"hung"):
            Campaign(site, patience=0.5).run(BY_NAME["ListJobs"], 20, 1, shrink=False)
    finally:
        release.set()
    site.settle()


def test_work_that_goes_on_when_its_caller_has_left_is_found(running):
    site, server = running
    gate = server.server.runtime.gate
    server.server._metrics.in_flight.inc()
    try:
        with pytest.raises(AssertionError, match=r"never ended"):
            site.settle(patience=0.5)
    finally:
        server.server._metrics.in_flight.dec()
    assert not gate.in_flight


def test_a_touched_tenant_is_found(site):
    things = site.others()
    created = _requests.create_subject("rex2", class_noun="dog", rights="owned")
    deleted = subject_pb2.DeleteSubjectRequest(name="tenants/-/subjects/rex2")
    with grpc.insecure_channel(site.target) as channel:
        ask(channel, site._keys["other"], BY_NAME["CreateSubject"], created)
        after = site.others()
        ask(channel, site._keys["other"], BY_NAME["DeleteSubject"], deleted)
    assert [name for name in things if things[name] != after[name]] == ["ListSubjects"]


def test_an_object_that_nothing_refers_to_and_half_a_file_are_found(tmp_path):
    LocalObjects(tmp_path / "objects").put("adapters/x.safetensors", b"x")
    half = tmp_path / "objects" / "adapters" / ".tmp-1"
    half.write_bytes(b"x")
    assert leftovers(tmp_path) == ["adapters/x.safetensors", str(half)]
