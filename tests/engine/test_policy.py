"""The policy on a simulated clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mooring_server.engine.policy import ClassPolicy, TaskClass

BUSY = st.sets(st.sampled_from(list(TaskClass)), min_size=1)


def simulate(policy, runnable, ticks, seconds):
    """Time each class got over so many ticks."""
    used = dict.fromkeys(TaskClass, 0.0)
    for _ in range(ticks):
        klass = policy.pick(runnable)
        used[klass] += seconds[klass]
        policy.charge(klass, seconds[klass], runnable)
    return used


@given(st.lists(BUSY, min_size=1, max_size=40), st.floats(0, 0.9))
def test_only_classes_with_work_are_picked_and_urgent_ones_first(history, share):
    policy = ClassPolicy(share)
    for runnable in history:
        klass = policy.pick(runnable)
        assert klass in runnable
        assert klass in {min(runnable), TaskClass.TRAINING}
        policy.charge(klass, 0.1, runnable)


@given(
    share=st.floats(0.05, 0.9),
    others=st.sets(st.sampled_from(list(TaskClass)[:-1]), min_size=1),
    training=st.floats(0.01, 0.5),
    other=st.floats(0.01, 0.5),
)
def test_training_gets_its_share_and_not_much_more(share, others, training, other):
    seconds = dict.fromkeys(TaskClass, other) | {TaskClass.TRAINING: training}
    used = simulate(ClassPolicy(share), {*others, TaskClass.TRAINING}, 2000, seconds)
    total = sum(used.values())
    assert abs(used[TaskClass.TRAINING] - share * total) <= 0.02 * total + 1.0
    assert all(used[klass] == 0 for klass in others - {min(others)})


def test_without_a_share_training_waits_for_an_idle_device():
    policy = ClassPolicy(0.0)
    seconds = dict.fromkeys(TaskClass, 0.1)
    used = simulate(policy, {TaskClass.BATCH, TaskClass.TRAINING}, 100, seconds)
    assert used[TaskClass.TRAINING] == 0
    assert policy.pick({TaskClass.TRAINING}) is TaskClass.TRAINING


def test_a_long_wait_is_no_licence_for_a_long_monopoly():
    policy = ClassPolicy(0.5)
    busy = {TaskClass.INTERACTIVE, TaskClass.TRAINING}
    policy.pick({TaskClass.TRAINING})
    for _ in range(1000):
        policy.charge(TaskClass.INTERACTIVE, 1.0, busy)
    run = 0
    while policy.pick(busy) is TaskClass.TRAINING:
        policy.charge(TaskClass.TRAINING, 1.0, busy)
        run += 1
    assert run <= 6


def test_training_alone_neither_earns_nor_owes():
    policy = ClassPolicy(0.2)
    simulate(policy, {TaskClass.TRAINING}, 50, dict.fromkeys(TaskClass, 1.0))
    assert policy.credit == 0


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_impossible_shares_are_refused(share):
    with pytest.raises(ValueError, match="training_share"):
        ClassPolicy(share)
