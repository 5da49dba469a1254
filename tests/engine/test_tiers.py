"""The tiers: nothing in use is evicted, budgets hold, one load serves all who wait, failures are not kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

import pytest
import torch
from engine_helpers import random_adapter
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from mooring_server.engine.adapters import to_safetensors
from mooring_server.engine.tiers.disk import DiskCache
from mooring_server.engine.tiers.host import AdapterTiers
from mooring_server.engine.tiers.lru import ByteLru
from mooring_server.errors import MooringError, Reason

WAIT = 60.0
KEYS = st.sampled_from("abcdef")


class LruMachine(RuleBasedStateMachine):
    """`ByteLru` against a plain list in order of use."""

    def __init__(self):
        super().__init__()
        self.lru = ByteLru(10)
        self.model: OrderedDict[str, list[int]] = OrderedDict()  # key → [size, pins]

    def expect(self, evicted):
        gone = []
        while sum(size for size, _ in self.model.values()) > 10:
            idle = [key for key, (_, pins) in self.model.items() if not pins]
            if not idle:
                break
            gone.append(idle[0])
            del self.model[idle[0]]
        assert evicted == gone

    @rule(key=KEYS, size=st.integers(0, 12), pinned=st.booleans())
    def add(self, key, size, pinned):
        if key not in self.model:
            evicted = self.lru.add(key, key, size, pinned=pinned)
            self.model[key] = [size, int(pinned)]
            self.expect(evicted)

    @rule(key=KEYS)
    def find(self, key):
        assert self.lru.find(key) == (key if key in self.model else None)
        if key in self.model:
            self.model.move_to_end(key)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), size=st.integers(0, 12))
    def resize(self, data, size):
        key = data.draw(st.sampled_from(sorted(self.model)))
        evicted = self.lru.resize(key, size)
        self.model[key][0] = size
        self.expect(evicted)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def pin(self, data):
        key = data.draw(st.sampled_from(sorted(self.model)))
        self.lru.pin(key)
        self.model[key][1] += 1

    @precondition(lambda self: any(pins for _, pins in self.model.values()))
    @rule(data=st.data())
    def unpin(self, data):
        key = data.draw(st.sampled_from(sorted(key for key, (_, pins) in self.model.items() if pins)))
        evicted = self.lru.unpin(key)
        self.model[key][1] -= 1
        if not self.model[key][1]:
            self.model.move_to_end(key)
        self.expect(evicted)

    @rule(key=KEYS)
    def remove(self, key):
        assert self.lru.remove(key) == (key if key in self.model else None)
        self.model.pop(key, None)

    @invariant()
    def budget(self):
        assert self.lru.bytes == sum(size for size, _ in self.model.values())
        assert self.lru.bytes <= 10 or all(pins for _, pins in self.model.values())
        assert sorted(self.lru.values()) == sorted(self.model)


LruMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestLru = LruMachine.TestCase


# ---------------------------------------------------------------------- disk


def test_a_file_is_found_again_after_a_restart_and_the_oldest_goes_first(tmp_path):
    cache = DiskCache(tmp_path, 30)
    for key in "abc":
        cache.put(key, key.encode() * 10)
    assert cache.get("a") == b"a" * 10
    again = DiskCache(tmp_path, 30)
    assert again.held_bytes == 30
    again.put("d", b"d" * 10)
    assert [again.get(key) is not None for key in "abcd"] == [True, False, True, True]
    assert DiskCache(tmp_path, 10).get("d") == b"d" * 10
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_file_is_deleted_and_never_served(tmp_path):
    cache = DiskCache(tmp_path, 100)
    cache.put("a", b"right")
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"wrong")
    assert cache.get("a") is None
    assert not list(tmp_path.iterdir())
    assert cache.held_bytes == 0
    cache.put("a", b"right")
    assert cache.get("a") == b"right"


def test_a_disk_that_fails_costs_hits_only(tmp_path):
    folder = tmp_path / "gone"
    cache = DiskCache(folder, 100)
    folder.rmdir()
    cache.put("a", b"data")
    assert cache.get("a") is None
    assert cache.held_bytes == 0


def test_what_a_crash_left_and_what_is_too_large_is_not_kept(tmp_path):
    (tmp_path / ".tmp-half").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"x")
    cache = DiskCache(tmp_path, 3)
    cache.put("a", b"four")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# ---------------------------------------------------------------------- host


@dataclass(frozen=True)
class Record:
    object_key: str
    base_digest: str
    name: str = "duck@1"


@dataclass
class Store:
    """Objects whose fetches can be held up."""

    objects: dict[str, bytes] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    go_on: threading.Event = field(default_factory=threading.Event)

    def fetch(self, key: str) -> bytes:
        self.fetched.append(key)
        self.begun.release()
        assert self.go_on.wait(WAIT)
        return self.objects[key]


@pytest.fixture
def store(base):
    made = Store({f"k{seed}": to_safetensors(random_adapter(base, seed)) for seed in range(6)})
    made.go_on.set()
    return made


@pytest.fixture
def make_tiers(bank, store):
    made = []

    def make(rows=2, **options):
        budget = rows * 4 * bank.layout.size
        made.append(AdapterTiers(store.fetch, bank, host_bytes=budget, **options))
        return made[-1]

    yield make
    store.go_on.set()
    for tiers in made:
        tiers.close()


def test_what_comes_out_is_the_adapter_and_a_swap_is_its_row(base, bank, make_tiers):
    tiers = make_tiers()
    weights = random_adapter(base, 1)
    packed = tiers.get(Record("k1", base.digest))
    assert packed.digest == weights.digest
    assert to_safetensors(packed) == to_safetensors(weights)
    slot = bank.acquire(packed)
    assert torch.equal(bank.arena[slot], packed.row)
    assert torch.equal(packed.row, bank.pack(weights).row)
    assert bank.pack(packed) is packed


def test_one_load_serves_all_who_wait(base, store, make_tiers):
    tiers = make_tiers()
    store.go_on.clear()
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(tiers.get(Record("k1", base.digest)))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    assert store.begun.acquire(timeout=WAIT)
    store.go_on.set()
    for thread in threads:
        thread.join(WAIT)
    assert len(found) == 8
    assert len({id(packed) for packed in found}) == 1
    assert store.fetched == ["k1"]


def test_different_adapters_load_side_by_side_and_nobody_is_blocked(base, store, make_tiers):
    tiers = make_tiers()
    store.go_on.clear()
    leases = [tiers.lease(Record(f"k{seed}", base.digest)) for seed in (1, 2)]
    for _ in leases:
        assert store.begun.acquire(timeout=WAIT)
    assert not any(lease.ready() for lease in leases)
    woken = threading.Event()
    leases[0].add_done_callback(woken.set)
    store.go_on.set()
    assert woken.wait(WAIT)
    assert leases[0].ready()
    for lease in leases:
        lease.wait(WAIT)
        lease.release()
        lease.release()


def test_leased_rows_are_kept_over_the_budget_and_go_when_released(base, bank, store, make_tiers):
    tiers = make_tiers(rows=1)
    row = 4 * bank.layout.size
    leases = [tiers.lease(Record(f"k{seed}", base.digest)) for seed in range(3)]
    kept = [lease.wait(WAIT) for lease in leases]
    assert tiers.held_bytes == 3 * row
    for lease in leases:
        lease.release()
    tiers.close()
    assert tiers.held_bytes == row
    assert all(torch.equal(bank.pack(random_adapter(base, i)).row, p.row) for i, p in enumerate(kept))


def test_a_failed_load_is_told_to_all_and_not_remembered(base, store, make_tiers):
    tiers = make_tiers()
    data = store.objects.pop("k1")
    store.go_on.clear()
    leases = [tiers.lease(Record("k1", base.digest)) for _ in range(2)]
    store.go_on.set()
    for lease in leases:
        with pytest.raises(MooringError, match="duck@1"):
            lease.wait(WAIT)
        with pytest.raises(MooringError) as caught:
            lease.ready()
        assert caught.value.reason is Reason.ADAPTER_NOT_FOUND
        lease.release()
    assert tiers.held_bytes == 0
    store.objects["k1"] = data
    assert tiers.get(Record("k1", base.digest)).rank == 4


def test_a_load_that_nobody_waits_for_does_not_begin(base, store, make_tiers):
    tiers = make_tiers(threads=1)
    store.go_on.clear()
    first, second = (tiers.lease(Record(key, base.digest)) for key in ("k1", "k2"))
    assert store.begun.acquire(timeout=WAIT)
    second.release()
    store.go_on.set()
    first.wait(WAIT)
    tiers.close()
    assert store.fetched == ["k1"]
    with pytest.raises(MooringError) as caught:
        tiers.lease(Record("k3", base.digest))
    assert caught.value.reason is Reason.DRAINING


def test_closing_fails_loads_that_have_not_begun(base, store, make_tiers):
    tiers = make_tiers(threads=1)
    store.go_on.clear()
    first, second = (tiers.lease(Record(key, base.digest)) for key in ("k1", "k2"))
    assert store.begun.acquire(timeout=WAIT)
    failed = threading.Event()
    second.add_done_callback(failed.set)
    closing = threading.Thread(target=tiers.close)
    closing.start()
    assert failed.wait(WAIT)
    with pytest.raises(MooringError, match="shutting down"):
        second.wait(0)
    store.go_on.set()
    closing.join(WAIT)
    assert first.ready()


def test_another_bases_adapter_is_refused_unread(store, make_tiers):
    with pytest.raises(MooringError) as caught:
        make_tiers().lease(Record("k1", "sha256:other"))
    assert caught.value.reason is Reason.BASE_DIGEST_MISMATCH
    assert not store.fetched


def test_the_disk_saves_the_fetch_and_a_damaged_file_does_not_harm(base, store, make_tiers, tmp_path):
    def load():
        tiers = make_tiers(disk=DiskCache(tmp_path, 10**9))
        assert tiers.get(Record("k1", base.digest)).digest == random_adapter(base, 1).digest
        tiers.close()
        return len(store.fetched)

    assert [load(), load()] == [1, 1]
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"damaged")
    assert [load(), load()] == [2, 2]


def test_a_deleted_adapter_leaves_memory_and_disk(base, store, make_tiers, tmp_path):
    tiers = make_tiers(disk=DiskCache(tmp_path, 10**9))
    store.go_on.clear()
    lease = tiers.lease(Record("k1", base.digest))
    assert store.begun.acquire(timeout=WAIT)
    tiers.forget("k1")
    store.go_on.set()
    assert lease.wait(WAIT).rank == 4  # what was claimed before goes on
    lease.release()
    tiers.close()
    assert tiers.held_bytes == 0
    assert not list(tmp_path.iterdir())


def test_memory_stays_flat_over_swaps(base, bank, make_tiers):
    import psutil  # accelerate brings it

    tiers = make_tiers(rows=6)
    packed = [tiers.get(Record(f"k{seed}", base.digest)) for seed in range(6)]

    def swap(count):
        for index in range(count):
            bank.release(bank.acquire(packed[index % 6]))

    swap(500)
    before = psutil.Process().memory_info().rss
    swap(10_000)
    assert psutil.Process().memory_info().rss < 1.02 * before
