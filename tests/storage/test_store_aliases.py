"""Aliases and gate decisions in both databases: at once, in pages, and killed at any instant."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mooring_server.errors import MooringError, Reason
from mooring_server.storage.models import Adapter, Judgement, MoveKind, Verdict
from mooring_server.storage.store import Store
from store_rows import judged, point, publish

REFUSE = judged(Verdict.REFUSED)


def reason_of(call, *args, **values) -> Reason:
    with pytest.raises(MooringError) as caught:
        call(*args, **values)
    return caught.value.reason


def test_a_refusal_keeps_its_decision_and_nothing_else(store: Store) -> None:
    publish(store)
    published, decision = store.publish_alias(
        "acme", "duck", 1, "live", judge=REFUSE, actor="ann", request_id="r"
    )
    assert published is None
    assert store.list_gate_decisions("acme") == ([decision], "")
    assert store.list_aliases("acme") == store.list_alias_moves("acme", "duck") == ([], "")
    assert point(store, 1, request_id="r").version == 1  # the refused request is not remembered


def test_publishers_of_several_processes_form_one_chain(open_store) -> None:
    stores = [open_store() for _ in range(4)]
    for _ in range(8):
        publish(stores[0])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: point(stores[n % 4], n + 1), range(8)))
    moves = stores[0].list_alias_moves("acme", "duck")[0][::-1]
    assert sorted(move.version for move in moves) == list(range(1, 9))
    assert [move.previous_version for move in moves] == [None, *(move.version for move in moves[:-1])]
    back = []
    while stores[1].list_aliases("acme")[0][0].previous_version is not None:
        back.append(stores[2].roll_back_alias("acme", "duck", "live", actor="ann").version)
    assert back == [move.version for move in moves[-2::-1]]


def test_one_request_repeated_at_once_is_one_move(open_store) -> None:
    stores = [open_store() for _ in range(3)]
    publish(stores[0])
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda n: point(stores[n % 3], 1, request_id="same"), range(6)))
    assert len(set(answers)) == 1
    assert len(stores[0].list_alias_moves("acme", "duck")[0]) == 1
    assert len(stores[0].list_gate_decisions("acme")[0]) == 1


@pytest.mark.parametrize("rival", ["delete", "policy"])
def test_nothing_changes_between_the_judgement_and_the_move(open_store, rival: str) -> None:
    """While the gate thinks, another process tries to delete the version, or to change the policy."""
    store, other = open_store(), open_store()
    publish(store)
    judging, done = threading.Event(), threading.Event()
    outcome: list[object] = []

    def act() -> None:
        judging.wait(30)
        try:
            if rival == "delete":
                outcome.append(other.delete_adapter("acme", "duck", 1))
            else:
                outcome.append(other.update_gate_policy("acme", lambda _: {"mode": "off"}, actor="bob"))
        except MooringError as error:
            outcome.append(error.reason)
        done.set()

    def slow(_adapter: Adapter, _evaluations: list, policy: dict | None) -> Judgement:
        judging.set()
        assert not done.wait(0.3)
        return Judgement(Verdict.PASSED, [], policy or {"mode": "enforce"}, "")

    thread = threading.Thread(target=act)
    thread.start()
    published, decision = store.publish_alias("acme", "duck", 1, "live", judge=slow, actor="ann")
    thread.join(30)
    assert published is not None
    assert (decision.policy, decision.policy_revision) == ({"mode": "enforce"}, 0)
    if rival == "delete":
        assert outcome == [Reason.ADAPTER_IN_USE]
        assert store.get_adapter("acme", "duck", alias="live").version == 1
    else:
        assert store.gate_policy("acme").revision == 1


def test_pages_of_aliases_moves_and_decisions(store: Store) -> None:
    publish(store)
    for number in range(5):
        point(store, 1, alias=f"a{number}")
    point(store, 1, alias="a0", judge=judged(Verdict.WARNED))

    def pages(call) -> list:
        found, token = [], ""
        while True:
            page, token = call(page_size=2, page_token=token)
            found += page
            if not token:
                return found

    aliases = pages(lambda **page: store.list_aliases("acme", **page))
    assert [alias.alias for alias in aliases] == [f"a{number}" for number in range(5)]
    moves = pages(lambda **page: store.list_alias_moves("acme", "duck", **page))
    assert [move.alias for move in moves] == ["a0", "a4", "a3", "a2", "a1", "a0"]
    assert {move.kind for move in moves} == {MoveKind.PUBLISH}
    decisions = pages(lambda **page: store.list_gate_decisions("acme", adapter_id="duck", version=1, **page))
    assert [item.verdict for item in decisions] == [Verdict.WARNED, *[Verdict.PASSED] * 5]
    assert [move.decision_id for move in moves] == [item.decision_id for item in decisions]
    assert store.list_alias_moves("acme", "duck", alias="a3")[0][0].alias == "a3"
    standing = store.standing("acme", store.list_adapters("acme")[0])
    assert standing == {"duck@1": ([f"a{number}" for number in range(5)], decisions[0])}
    assert reason_of(store.list_aliases, "other", page_token="x") is Reason.BAD_PAGE_TOKEN
    assert store.list_aliases("other") == store.list_gate_decisions("other") == ([], "")


def test_a_rollback_leaves_out_versions_for_another_base(store: Store) -> None:
    bases = ["sha256:" + digit * 64 for digit in "aab"]
    for base, number in zip((bases[0], bases[2], bases[0]), range(1, 4), strict=True):
        publish(store, base_digest=base)
        point(store, number)
    assert store.list_aliases("acme")[0][0].previous_version == 1
    assert store.roll_back_alias("acme", "duck", "live", actor="ann").version == 1


WORKER = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[2])
from sqlalchemy import event
from mooring_server.storage.store import Store
from store_rows import judged, point, publish

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def child(act, n):
    store = Store(sys.argv[1])
    engine, left = store._engine, [n]
    def statement(*_):
        left[0] -= 1
        if not left[0]:
            die()
    if n == 0:                                   # written, and not yet committed
        event.listen(engine, "commit", die)
    elif n < 0:                                  # committed, and not yet answered
        commit = engine.dialect.do_commit
        def then_die(connection):
            commit(connection)
            die()
        engine.dialect.do_commit = then_die
    else:
        event.listen(engine, "before_cursor_execute", statement)
    act(store, f"{n}")
    os._exit(0)

def run(act, n):
    pid = os.fork()
    if not pid:
        child(act, n)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL

def seen(store):
    (alias,), moves = store.list_aliases("acme")[0], store.list_alias_moves("acme", "duck")[0]
    return [alias.version, alias.previous_version, [move.version for move in moves],
            len(store.list_gate_decisions("acme")[0])]

ACTS = {
    "publish": lambda store, request: point(store, 3, request_id="p" + request),
    "roll_back": lambda store, request: store.roll_back_alias(
        "acme", "duck", "live", actor="ann", request_id="r" + request),
}
store = Store(sys.argv[1])
for version in (1, 2, 3):
    publish(store)
for version in (1, 2):
    point(store, version)
for name, act in ACTS.items():
    start, n = seen(store), 1
    store.close()                                # a fork must not share a connection
    while run(act, n):
        print(json.dumps(["before", name, start, seen(store)]), flush=True)
        store.close()
        n += 1
    # it ran to its end: from here it is what happened, for the two that die around the commit
    before = seen(store)
    store.close()
    assert run(act, 0)
    print(json.dumps(["before", name, before, seen(store)]), flush=True)
    if name == "publish":
        store.roll_back_alias("acme", "duck", "live", actor="ann")
    else:
        point(store, 2), point(store, 3)
    before = seen(store)
    store.close()
    assert run(act, -1)
    after = seen(store)
    act(store, "-1")                             # the caller, who got no answer, asks again
    print(json.dumps(["after", name, before, after, seen(store), n]), flush=True)
"""


def test_killed_at_any_statement_and_around_the_commit(database_url: str, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, str(worker), database_url, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    for kind, name, start, found, *rest in told:
        if kind == "before":
            assert found == start, name  # all of it is undone
            continue
        again, statements = rest
        assert again == found, name  # the repeat found the first answer
        assert len(found[2]) == len(start[2]) + 1
        assert found[3] == start[3] + (name == "publish")
        assert found[0] == (3 if name == "publish" else 2)
        assert statements > 5
    assert sum(kind == "after" for kind, *_ in told) == 2
