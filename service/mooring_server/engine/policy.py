"""Which class of work gets the next tick: a pure object without clock or threads.

Interactive before evaluation before batch before training, except that training never starves: while it
waits, it earns `training_share` of the time the others use, and spends what it earned. Credit is capped, so
that a long wait does not turn into a long monopoly.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import IntEnum

CREDIT_CAP_SECONDS = 2.0


class TaskClass(IntEnum):
    """Classes of work, most urgent first."""

    INTERACTIVE = 0
    EVALUATION = 1
    BATCH = 2
    TRAINING = 3


class ClassPolicy:
    """Strict priority with a guaranteed share for training.

    Args:
        training_share: least part of the device's time that training gets while it has work, in [0, 1).
    """

    def __init__(self, training_share: float = 0.2) -> None:
        if not 0 <= training_share < 1:
            raise ValueError(f"training_share must lie in [0, 1), not {training_share}")
        self.training_share = training_share
        self.credit = 0.0

    def pick(self, runnable: Collection[TaskClass]) -> TaskClass:
        """The class that runs next, of those that have work (at least one)."""
        if TaskClass.TRAINING not in runnable:
            self.credit = 0.0  # credit is earned by waiting only
        elif self.training_share > 0 and self.credit >= 0 and len(runnable) > 1:
            return TaskClass.TRAINING
        return min(runnable)

    def charge(self, klass: TaskClass, seconds: float, runnable: Collection[TaskClass]) -> None:
        """Book a tick.

        Args:
            klass: the class that ran.
            seconds: how long.
            runnable: the classes that had work when it was picked.
        """
        if TaskClass.TRAINING not in runnable or len(runnable) == 1:
            return
        if klass is TaskClass.TRAINING:
            self.credit -= (1 - self.training_share) * seconds
        else:
            self.credit += self.training_share * seconds
        self.credit = max(-CREDIT_CAP_SECONDS, min(CREDIT_CAP_SECONDS, self.credit))
