"""The policy on a simulated machine: shares, starvation, deadlines, work conservation, determinism."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mooring_server.engine.policy import (
    CLASS_PATIENCE_SECONDS,
    CREDIT_CAP_SECONDS,
    DEADLINE_LEAD_SECONDS,
    MAX_KINDS,
    MIN_COSTS,
    MINOR_SHARE,
    SchedulingPolicy,
    TaskClass,
    Ticket,
)

I, E, B, T = TaskClass
SIMULATED = settings(deadline=None, max_examples=60)
URGENT = [I, E, B]


@dataclass(eq=False, kw_only=True)
class Work(Ticket):
    """A task of the simulated machine: `ticks` ticks of `cost` seconds, arriving at `arrival`."""

    name: str = ""
    arrival: float = 0.0
    ticks: int = 1
    cost: float = 0.1


@dataclass
class Machine:
    """One device under a policy. Slots are as many as `slots`; None: no task ever waits for one."""

    policy: SchedulingPolicy
    max_running: int = 4
    slots: int | None = None
    now: float = 0.0
    waiting: dict[TaskClass, list[Work]] = field(default_factory=lambda: {klass: [] for klass in TaskClass})
    started: list[Work] = field(default_factory=list)
    log: list[tuple[float, Work]] = field(default_factory=list)
    starts: list[tuple[Work, Work]] = field(default_factory=list)  # who started, who was the oldest then
    refused: list[tuple[float, Work]] = field(default_factory=list)
    finished: dict[str, float] = field(default_factory=dict)

    def add(self, work: Work) -> Work:
        self.waiting[work.klass].append(work)
        return work

    def admit(self) -> None:
        for klass, waiting in self.waiting.items():
            while self._start_one(klass, waiting):
                pass

    def _start_one(self, klass: TaskClass, waiting: list[Work]) -> bool:
        running = [work for work in self.started if work.klass is klass]
        pinned = {work.adapter for work in self.started} - {""}
        options = self.policy.starts(
            waiting, running, self.now, max_running=self.max_running, resident=pinned
        )
        assert len(set(map(id, options))) == len(options)
        for work in options:
            if self.slots is None or not work.adapter or work.adapter in pinned or len(pinned) < self.slots:
                self.starts.append((work, waiting[0]))
                self.policy.start(work, waiting, self.now)
                waiting.remove(work)
                self.started.append(work)
                return True
        return False

    def refuse(self) -> None:
        for tasks in (*self.waiting.values(), self.started):
            for work in self.policy.hopeless(tasks, self.now):
                self.refused.append((self.now, work))
                tasks.remove(work)

    def step(self) -> Work:
        work = self.policy.pick(self.started, self.now)
        self.now += work.cost
        self.log.append((self.now, work))
        self.policy.charge(work, work.cost, self.now, steps=1)
        work.ticks -= 1
        if not work.ticks:
            self.started.remove(work)
            self.finished[work.name] = self.now
        return work

    def idle(self) -> bool:
        return not self.started and not any(self.waiting.values())

    def run(self, arrivals: list[Work], seconds: float = math.inf) -> None:
        """To the end of all work; never idle while there is some."""
        todo = sorted(arrivals, key=lambda work: work.arrival)
        while (todo or not self.idle()) and self.now < seconds:
            if self.idle():
                self.now = max(self.now, todo[0].arrival)
            while todo and todo[0].arrival <= self.now:
                self.add(todo.pop(0))
            self.refuse()
            self.admit()
            if not self.idle():
                assert self.started, "the device idles beside work that could run"
                self.step()

    def used(self, key) -> dict:
        seconds: dict = {}
        for _, work in self.log:
            seconds[key(work)] = seconds.get(key(work), 0.0) + work.cost
        return seconds


def endless(klass: TaskClass, cost: float = 0.1, **values) -> Work:
    return Work(klass=klass, cost=cost, ticks=10**9, **{"name": klass.name, **values})


def by_class(work: Work) -> TaskClass:
    return work.klass


DEADLINES = st.none() | st.floats(0.0, 60.0)
WORKS = st.lists(
    st.builds(
        Work,
        klass=st.sampled_from(TaskClass),
        tenant=st.sampled_from(["a", "b", "c"]),
        deadline=DEADLINES,
        adapter=st.sampled_from(["", "x", "y", "z"]),
        kind=st.sampled_from(["k", "l"]),
        arrival=st.floats(0.0, 5.0),
        ticks=st.integers(1, 6),
        cost=st.sampled_from([0.05, 0.1, 0.3]),
    ),
    max_size=25,
).map(lambda works: [replace(work, name=str(index)) for index, work in enumerate(works)])
WEIGHTS = st.fixed_dictionaries({}, optional={name: st.floats(0.3, 4.0) for name in "ab"})


# ---------------------------------------------------------------------- the whole machine


@SIMULATED
@given(WORKS, WEIGHTS, st.sampled_from([0.0, 0.2, 0.7]), st.integers(1, 4), st.sampled_from([None, 1, 2]))
def test_everything_ends_and_the_device_never_idles_beside_work(works, weights, share, places, slots):
    machine = Machine(SchedulingPolicy(share, weights=weights), places, slots)
    machine.run(works)
    assert len(machine.finished) + len(machine.refused) == len(works)
    assert all(work.deadline is not None for _, work in machine.refused)


@SIMULATED
@given(WORKS, WEIGHTS, st.sampled_from([0.0, 0.2]), st.integers(1, 3))
def test_the_same_work_is_done_in_the_same_order_whatever_its_tenants_are_called(
    works, weights, share, places
):
    machines = []
    for rename in ("{}", "{}x", "tenant-{}"):
        renamed = {rename.format(tenant): weight for tenant, weight in weights.items()}
        machine = Machine(SchedulingPolicy(share, weights=renamed), places)
        machine.run([replace(work, tenant=rename.format(work.tenant)) for work in works])
        machines.append(machine)
    first, *others = ([(when, work.name) for when, work in machine.log] for machine in machines)
    assert all(other == first for other in others)


@SIMULATED
@given(WORKS, st.integers(1, 3), st.integers(1, 4))
def test_the_oldest_waiting_task_is_passed_over_a_bounded_number_of_times(works, places, bypasses):
    machine = Machine(SchedulingPolicy(max_bypasses=bypasses), places)
    machine.run([replace(work, deadline=None) for work in works])
    passed: dict[str, int] = {}
    for work, oldest in machine.starts:
        if work is not oldest:
            passed[oldest.name] = passed.get(oldest.name, 0) + 1
    assert all(count <= bypasses for count in passed.values())


# ---------------------------------------------------------------------- classes


@SIMULATED
@given(st.lists(st.sets(st.sampled_from(TaskClass), min_size=1), min_size=1, max_size=40), st.floats(0, 0.9))
def test_only_classes_with_work_are_picked_and_urgent_ones_first_unless_another_is_owed(history, share):
    policy = SchedulingPolicy(share)
    for tick, runnable in enumerate(history):
        work = policy.pick([endless(klass) for klass in runnable], tick * 0.1)
        assert work.klass in runnable
        assert work.klass in {min(runnable), T}  # in these four seconds others are owed nothing yet
        policy.charge(work, 0.1, tick * 0.1 + 0.1)


@SIMULATED
@given(
    share=st.floats(0.05, 0.9),
    urgent=st.sampled_from(URGENT),
    training=st.floats(0.05, 0.5),
    other=st.floats(0.05, 0.5),
)
def test_training_gets_its_share_and_not_much_more(share, urgent, training, other):
    machine = Machine(SchedulingPolicy(share))
    machine.run([endless(urgent, other), endless(T, training)], 60.0)
    used = machine.used(by_class)
    total = sum(used.values())
    assert abs(used[T] - share * total) <= 1.0


@SIMULATED
@given(share=st.sampled_from([0.0, 0.2, 0.6]), costs=st.lists(st.floats(0.1, 0.4), min_size=4, max_size=4))
def test_no_class_starves_beside_a_busy_interactive_one(share, costs):
    machine = Machine(SchedulingPolicy(share))
    seconds = 200.0
    machine.run([endless(klass, cost) for klass, cost in zip(TaskClass, costs, strict=True)], seconds)
    used = machine.used(by_class)
    minor = MINOR_SHARE * (1 - share)
    for klass in (E, B):
        assert abs(used[klass] - minor * seconds) <= 1.0
        served = [0.0, *(when for when, work in machine.log if work.klass is klass), seconds]
        longest = max(later - earlier for earlier, later in pairwise(served))
        # its patience, what it has to earn for its own tick, and ticks of others that cannot be interrupted
        assert longest <= CLASS_PATIENCE_SECONDS + costs[klass] / minor + 4 * max(costs)
    assert used.get(T, 0.0) >= share * seconds - 1.0
    assert used[I] >= (1 - share - 2 * minor) * seconds - 3.0


def test_without_a_share_training_waits_for_an_idle_device():
    machine = Machine(SchedulingPolicy(0.0))
    machine.run([endless(T), Work(klass=I, ticks=100)], 20.0)
    assert [work.klass for _, work in machine.log[:100]] == [I] * 100
    assert machine.log[100][1].klass is T


def test_a_long_wait_is_no_licence_for_a_long_monopoly():
    policy = SchedulingPolicy(0.5)
    busy = [endless(I), endless(T)]
    policy.pick(busy, 0.0)
    for _ in range(1000):
        policy.charge(busy[0], 1.0, 0.0)
    run = 0
    while policy.pick(busy, 0.0) is busy[1]:
        policy.charge(busy[1], 1.0, 0.0)
        run += 1
    assert run <= CREDIT_CAP_SECONDS / 0.5 + 1


def test_training_alone_neither_earns_nor_owes():
    machine = Machine(SchedulingPolicy(0.5))
    machine.run([endless(T)], 50.0)
    machine.add(endless(I))
    machine.admit()
    ran = [machine.step().klass for _ in range(20)]
    assert 9 <= ran.count(T) <= 11


def test_leaving_is_no_way_out_of_a_debt():
    """Training in many short tasks gets no more than in a long one."""
    policy = SchedulingPolicy(0.2)
    interactive, ran, now = endless(I), [], 0.0
    for _ in range(200):
        training = [endless(T)] if len(ran) % 2 == 0 else []
        work = policy.pick([interactive, *training], now)
        now += 0.1
        policy.charge(work, 0.1, now)
        ran.append(work.klass)
    assert 30 <= ran.count(T) <= 42


# ---------------------------------------------------------------------- tenants


@SIMULATED
@given(
    weights=st.lists(st.floats(0.3, 4.0), min_size=2, max_size=4),
    costs=st.lists(st.floats(0.02, 0.3), min_size=4, max_size=4),
    pressed=st.lists(st.booleans(), min_size=4, max_size=4),
    many=st.integers(1, 3),
)
def test_tenants_share_a_class_by_their_weights_whatever_deadlines_they_claim(weights, costs, pressed, many):
    names = {f"t{index}": weight for index, weight in enumerate(weights)}
    machine = Machine(SchedulingPolicy(weights=names), max_running=100)
    for (tenant, _), cost, hurry in zip(names.items(), costs, pressed, strict=False):
        for index in range(many if hurry else 1):
            deadline = 1e6 + index if hurry else None
            machine.add(endless(B, cost, tenant=tenant, deadline=deadline))
    machine.admit()
    used = dict.fromkeys(names, 0.0)
    slack = DEADLINE_LEAD_SECONDS + 2 * max(costs) / min(weights)
    for _ in range(600):
        work = machine.step()
        used[work.tenant] += work.cost
        normalised = [seconds / names[tenant] for tenant, seconds in used.items()]
        assert max(normalised) - min(normalised) <= slack + 1e-6


def test_a_tenant_that_was_away_gets_no_arrears_and_no_rebate():
    machine = Machine(SchedulingPolicy())
    machine.run([endless(I, tenant="busy")], 60.0)
    machine.add(endless(I, tenant="new"))
    machine.admit()
    ran = [machine.step().tenant for _ in range(40)]
    assert 19 <= ran.count("new") <= 21


def test_a_tenant_that_leaves_ahead_of_its_share_comes_back_ahead_of_it():
    machine = Machine(SchedulingPolicy(weights={"light": 0.1}))
    light, heavy = endless(I, tenant="light"), endless(I, tenant="heavy")
    machine.run([light, heavy], 1.0)
    assert machine.policy.pick([heavy], machine.now) is heavy
    assert machine.policy.pick([light, heavy], machine.now) is heavy


def test_a_tenant_with_nothing_running_finds_a_place_beside_a_tenant_with_many():
    machine = Machine(SchedulingPolicy(), max_running=2)
    for _ in range(5):
        machine.add(endless(I, tenant="flood"))
    machine.admit()
    assert [work.tenant for work in machine.started] == ["flood", "flood"]
    for tenant in ("b", "b", "c", "d"):
        machine.add(endless(I, tenant=tenant))
    machine.admit()
    assert [work.tenant for work in machine.started] == ["flood", "flood", "b", "c"]  # no more than twice


def test_places_are_dealt_out_by_weight_before_deadlines_and_arrival():
    policy = SchedulingPolicy(weights={"big": 2.0})
    waiting = [
        *(Work(klass=I, tenant="small", name=f"s{index}") for index in range(2)),
        *(Work(klass=I, tenant="big", name=f"b{index}") for index in range(3)),
        Work(klass=I, tenant="small", name="hurry", deadline=5.0),
    ]
    started = [Work(klass=I, tenant="big")]
    names = [work.name for work in policy.order(waiting, started)]
    # small has 0, 1, 2 places before each; big 1/2, 2/2, 3/2 per weight
    assert names == ["hurry", "b0", "s0", "b1", "b2", "s1"]


# ---------------------------------------------------------------------- deadlines


@SIMULATED
@given(
    jobs=st.lists(
        st.tuples(st.integers(1, 8), st.sampled_from([0.05, 0.1]), st.floats(0, 0.5)), min_size=1, max_size=8
    ),
    klass=st.sampled_from(URGENT),
)
def test_whatever_can_meet_its_deadlines_does(jobs, klass):
    """Earliest deadline first is optimal on one device: what is feasible is done in time, and not refused."""
    machine = Machine(SchedulingPolicy(patience_seconds=1e9), max_running=len(jobs))
    total, works = 0.0, []
    for index, (ticks, cost, spare) in enumerate(jobs):
        total += ticks * cost
        due = total + spare + 1e-6
        works.append(
            Work(
                klass=klass,
                ticks=ticks,
                steps_left=ticks,
                cost=cost,
                kind=cost,
                deadline=due,
                name=str(index),
            )
        )
    machine.run(list(reversed(works)))
    assert not machine.refused
    assert all(machine.finished[work.name] <= work.deadline for work in works)


@SIMULATED
@given(WORKS, st.floats(0.3, 3.0))
def test_only_what_is_lost_for_certain_is_refused_and_then_at_once(works, hurry):
    costs = {"k": 0.1, "l": 0.3}
    works = [
        replace(
            work,
            klass=I,
            cost=costs[work.kind],
            steps_left=work.ticks,
            deadline=work.arrival + hurry * work.ticks * costs[work.kind],
        )
        for work in works
    ]
    machine = Machine(SchedulingPolicy())
    machine.run(works)
    for when, work in machine.refused:
        assert when + work.ticks * work.cost > work.deadline - 1e-9
    # once costs are known, no step is spent on work that cannot end in time
    known = {}
    for when, work in machine.log:
        if known.get(work.kind, 0) >= MIN_COSTS:
            assert when <= work.deadline + 1e-6
        known[work.kind] = known.get(work.kind, 0) + 1


def test_nobody_is_refused_on_a_guess():
    policy = SchedulingPolicy()
    late = Work(klass=I, kind="k", steps_left=100, deadline=1.0)
    runner = Work(klass=I, kind="k", steps_left=100)
    for measured, seconds in enumerate([9.0, 0.5, 0.1]):  # the first ones are slow
        assert policy.hopeless([late], 0.0) == [], f"after {measured} steps"
        policy.pick([runner], 0.0)
        policy.charge(runner, seconds, 0.0, steps=1)
    assert policy.needs(late) == pytest.approx(10.0)
    assert policy.hopeless([late, runner], 0.0) == [late]
    assert policy.needs(runner) == pytest.approx(9.7)
    late.steps_left = 0
    assert policy.hopeless([late], 0.99) == []
    assert policy.hopeless([late], 1.01) == [late]


def test_costs_follow_the_machine_and_few_kinds_are_kept():
    policy = SchedulingPolicy()
    runner = Work(klass=I, kind="k")
    for seconds in [0.1] * 40 + [0.4] * 40:
        policy.charge(runner, seconds, 0.0, steps=1)
    waiting = Work(klass=I, kind="k", steps_left=10)
    assert policy.needs(waiting) == pytest.approx(4.0)
    for kind in range(MAX_KINDS):
        policy.charge(Work(klass=I, kind=kind), 1.0, 0.0, steps=1)
    assert policy.needs(waiting) == 0.0


def test_equal_deadlines_take_turns_and_earlier_ones_go_first():
    machine = Machine(SchedulingPolicy(patience_seconds=1e9))
    works = [Work(klass=B, ticks=3, name=name, deadline=50.0 - (name == "c")) for name in "abc"]
    machine.run(works)
    assert "".join(work.name for _, work in machine.log) == "cccababab"


def test_a_task_without_deadline_is_not_left_out_for_ever():
    machine = Machine(SchedulingPolicy(max_bypasses=4, patience_seconds=2.0))
    patient = machine.add(endless(I))
    for index in range(3):
        machine.add(endless(I, deadline=1e6 + index))
    machine.admit()
    for _ in range(1000):
        machine.step()
    served = [0.0, *(when for when, work in machine.log if work is patient)]
    # four tasks, each of which may be overdue, and one tick in five goes to the stalest
    longest = max(later - earlier for earlier, later in pairwise(served))
    assert longest <= 2.0 + 4 * 5 * 0.1 + 1e-6
    hurried = sum(work.deadline == 1e6 for _, work in machine.log)
    assert hurried >= 800


# ---------------------------------------------------------------------- adapters


def names_of(options: list[Work]) -> list[str]:
    return [work.name for work in options]


def test_an_adapter_in_use_goes_first_as_often_as_it_may():
    policy = SchedulingPolicy(max_bypasses=2)
    waiting = [Work(klass=I, adapter=adapter, name=adapter + str(n)) for n in range(4) for adapter in "xy"]
    started: list[Work] = []
    order = []
    while waiting:
        best = policy.starts(waiting, started, 0.0, max_running=100, resident={"y"})[0]
        policy.start(best, waiting, 0.0)
        waiting.remove(best)
        order.append(best.name)
    assert order == ["y0", "y1", "x0", "y2", "y3", "x1", "x2", "x3"]


def test_an_adapter_in_use_does_not_cost_others_their_deadline_or_their_place():
    policy = SchedulingPolicy()
    runner = Work(klass=I, kind="k", tenant="a", adapter="x")
    for _ in range(MIN_COSTS):
        policy.charge(runner, 1.0, 0.0, steps=1)
    first = Work(klass=I, kind="k", steps_left=5, deadline=20.0, name="first", tenant="b")
    second = Work(klass=I, kind="k", steps_left=5, name="second", tenant="b", adapter="x")
    ask = {"max_running": 4, "resident": {"x"}}
    assert names_of(policy.starts([first, second], [], 0.0, **ask)) == ["second", "first"]
    assert names_of(policy.starts([first, second], [], 10.5, **ask)) == ["first", "second"]
    second.tenant = "a"
    assert names_of(policy.starts([first, second], [], 0.0, **ask)) == ["second", "first"]
    assert names_of(policy.starts([first, second], [runner], 0.0, **ask)) == ["first", "second"]


def test_who_was_passed_over_often_enough_is_passed_only_by_what_takes_no_slot():
    policy = SchedulingPolicy(max_bypasses=1)
    old = Work(klass=I, adapter="old", name="old")
    base, other = Work(klass=I, name="base"), Work(klass=I, adapter="x", name="other")
    waiting = [old, base, other]
    policy.start(base, waiting, 0.0)
    assert names_of(policy.starts(waiting, [], 0.0, max_running=1, resident={"x"})) == ["old", "base"]
    assert policy.starts(waiting, [endless(I)], 0.0, max_running=1) == []
    policy.start(old, waiting, 0.0)
    assert names_of(policy.starts([base, other], [], 0.0, max_running=1)) == ["base", "other"]


# ---------------------------------------------------------------------- impossible settings


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_impossible_shares_are_refused(share):
    with pytest.raises(ValueError, match="training_share"):
        SchedulingPolicy(share)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_weights_are_refused(weight):
    with pytest.raises(ValueError, match="weight of a"):
        SchedulingPolicy(weights={"a": weight})


@pytest.mark.parametrize("bounds", [{"max_bypasses": 0}, {"patience_seconds": -1.0}])
def test_impossible_bounds_are_refused(bounds):
    with pytest.raises(ValueError, match="impossible bounds"):
        SchedulingPolicy(**bounds)
