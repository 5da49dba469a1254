"""Which task gets the next tick, who may start, and who is too late: a pure object without clock or threads.

The caller passes `now` and what the last tick cost, so the same calls give the same choices, and a simulated
machine can prove the bounds (tests/engine/test_policy.py). The levels, from the outside in:

1. Classes: interactive before evaluation before batch before training. A class that waits earns its
   guaranteed share of the time the others use, and runs once it is owed enough of it: training at once,
   evaluation and batch after some seconds (aging).
2. Tenants of a class: start-time fair queueing over measured seconds divided by the tenant's weight (Goyal,
   Vin and Cheng, “Start-time fair queuing”, SIGCOMM 1996). A tenant that was away comes back at the least
   virtual time of those present: absence earns nothing.
3. Tasks, among tenants that are not too far ahead of the others: the earliest deadline first; those without
   one take turns. A task left out for long gets a tick now and then, whatever the deadlines of the others.

Starting is decided in the same spirit (places, deadlines, then order of arrival, with a preference for
adapters that are in use), and whatever is preferred, the task that waits longest is passed over a bounded
number of times.

Left out: preemption of a started task (it keeps its slot and latents to its end), and queueing delay in the
estimate of what can still meet its deadline; only work that is lost for certain is refused.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeVar

CREDIT_CAP_SECONDS = 2.0
"""Most that a class can be owed: a long wait is no licence for a long monopoly."""
MINOR_SHARE = 0.05
"""Guaranteed shares of evaluation and of batch, of the time that training's share leaves."""
CLASS_PATIENCE_SECONDS = 5.0
"""Time of others after which evaluation and batch are given what they are owed."""
DEADLINE_LEAD_SECONDS = 1.0
"""How far, in seconds per unit of weight, deadlines may carry a tenant ahead of the others of its class."""
COST_WINDOW = 32
"""Measured steps of one kind that are remembered; the cheapest counts."""
MIN_COSTS = 3
"""Measured steps of a kind before anything is concluded from them."""
MAX_KINDS = 256
"""Kinds of steps whose costs are remembered."""


class TaskClass(IntEnum):
    """Classes of work, most urgent first."""

    INTERACTIVE = 0
    EVALUATION = 1
    BATCH = 2
    TRAINING = 3


@dataclass(eq=False, kw_only=True)
class Ticket:
    """A task as the policy sees it.

    Args:
        klass: decides first.
        tenant: whom its time is booked to.
        deadline: when it must be done, on the clock of `now`; None for whenever.
        adapter: digest of the adapter it needs a slot for; empty when it needs none.
        kind: tasks of one kind have equally expensive steps.
        steps_left: steps not yet done; 0 when unknown.
        turn: kept by the policy: order of the last tick or start.
        served_at: kept by the policy: time of the last tick or start.
    """

    klass: TaskClass
    tenant: str = ""
    deadline: float | None = None
    adapter: str = ""
    kind: Hashable = None
    steps_left: int = 0
    turn: int = 0
    served_at: float = 0.0

    @property
    def due(self) -> float:
        """The deadline; infinity without one."""
        return math.inf if self.deadline is None else self.deadline


TicketT = TypeVar("TicketT", bound=Ticket)


@dataclass
class _Guarantee:
    """Least share of a class, and what it is owed, in seconds; it runs once it is owed `threshold`."""

    share: float
    threshold: float
    credit: float = 0.0


@dataclass
class _Lane:
    """What is remembered of a class: virtual times of tenants, and the counts that bound preferences."""

    virtual: dict[str, float] = field(default_factory=dict)
    present: frozenset[str] = frozenset()
    floor: float = 0.0
    ticks_by_preference: int = 0
    bypasses: int = 0


class SchedulingPolicy:
    """See the module.

    Args:
        training_share: least part of the device's time that training gets while it has work, in [0, 1).
        weights: of tenants; those not named have 1.
        max_bypasses: how often in a row the task of a class that waits longest may be passed over, for a
            start or (once its patience is over) for a tick.
        patience_seconds: time without a tick after which a started task is served before deadlines are.

    Raises:
        ValueError: a share, weight or bound that is impossible.
    """

    def __init__(
        self,
        training_share: float = 0.2,
        *,
        weights: Mapping[str, float] | None = None,
        max_bypasses: int = 4,
        patience_seconds: float = 2.0,
    ) -> None:
        if not 0 <= training_share < 1:
            raise ValueError(f"training_share must lie in [0, 1), not {training_share}")
        if max_bypasses < 1 or not patience_seconds >= 0:
            raise ValueError(f"impossible bounds: {max_bypasses} bypasses, patience of {patience_seconds} s")
        for tenant, weight in (weights or {}).items():
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"weight of {tenant} must be positive, not {weight}")
        self.training_share = training_share
        self.max_bypasses = max_bypasses
        self.patience_seconds = patience_seconds
        self._weights = dict(weights or {})
        minor = MINOR_SHARE * (1 - training_share)
        self._guarantees = {
            TaskClass.EVALUATION: _Guarantee(minor, minor * CLASS_PATIENCE_SECONDS),
            TaskClass.BATCH: _Guarantee(minor, minor * CLASS_PATIENCE_SECONDS),
            TaskClass.TRAINING: _Guarantee(training_share, 0.0),
        }
        self._lanes = {klass: _Lane() for klass in TaskClass}
        self._runnable: frozenset[TaskClass] = frozenset()
        self._costs: OrderedDict[Hashable, deque[float]] = OrderedDict()  # least recently measured first
        self._cheapest: dict[Hashable, float] = {}
        self._turns = 0

    # ------------------------------------------------------------------ who gets the next tick

    def pick(self, started: Sequence[TicketT], now: float) -> TicketT:
        """The task that runs next.

        Args:
            started: all that could run, of all classes, at least one.
            now: in seconds, on any clock that does not go back.
        """
        self._runnable = frozenset(ticket.klass for ticket in started)
        klass = self._pick_class()
        return self._pick_in_class(
            self._lanes[klass], [ticket for ticket in started if ticket.klass is klass], now
        )

    def companions(self, tickets: Iterable[TicketT]) -> list[TicketT]:
        """Tasks that could share the pass of the one picked, those with the best claim first.

        By class, how little their tenant has used, deadline, and how long they have gone without a tick.
        """
        return sorted(
            tickets,
            key=lambda ticket: (
                ticket.klass,
                self._lanes[ticket.klass].virtual.get(ticket.tenant, 0.0),
                ticket.due,
                ticket.turn,
            ),
        )

    def charge(
        self, ticket: Ticket, seconds: float, now: float, *, steps: int = 0, wall: float | None = None
    ) -> None:
        """Book a tick, or a task's part of one.

        Args:
            ticket: the task that ran.
            seconds: what it cost.
            now: when it ended.
            steps: steps of the task that it completed; the cost of its kind is learned from them.
            wall: how long it took, where that is more than its part; None: as long as it cost.
        """
        self._serve(ticket, now)
        lane = self._lanes[ticket.klass]
        lane.virtual[ticket.tenant] = lane.virtual.get(ticket.tenant, lane.floor) + seconds / self._weight(
            ticket.tenant
        )
        if steps:
            ticket.steps_left = max(0, ticket.steps_left - steps)
            self._learn(ticket.kind, (seconds if wall is None else wall) / steps)
        self._charge_class(ticket.klass, seconds)

    def _pick_class(self) -> TaskClass:
        first = min(self._runnable)
        for klass, guarantee in self._guarantees.items():
            if klass is first or klass not in self._runnable:
                guarantee.credit = min(guarantee.credit, 0.0)  # credit is earned by waiting only
        owed = [
            ((guarantee.credit - guarantee.threshold) / guarantee.share, klass)
            for klass, guarantee in self._guarantees.items()
            if klass in self._runnable
            and klass is not first
            and guarantee.share > 0
            and guarantee.credit >= guarantee.threshold
        ]
        return max(owed)[1] if owed else first

    def _charge_class(self, ran: TaskClass, seconds: float) -> None:
        for klass, guarantee in self._guarantees.items():
            if klass is ran:
                if klass is not min(self._runnable, default=klass):  # it ran on its guarantee
                    guarantee.credit -= (1 - guarantee.share) * seconds
            else:
                # a debt is paid off whether the class waits or not, or leaving would be a way out of it
                most = CREDIT_CAP_SECONDS if klass in self._runnable else 0.0
                guarantee.credit = min(most, guarantee.credit + guarantee.share * seconds)

    def _pick_in_class(self, lane: _Lane, tickets: Sequence[TicketT], now: float) -> TicketT:
        tenants = frozenset(ticket.tenant for ticket in tickets)
        for tenant in tenants - lane.present:
            lane.virtual[tenant] = max(lane.virtual.get(tenant, 0.0), lane.floor)
        lane.present = tenants
        least = min(lane.virtual[tenant] for tenant in tenants)
        lane.floor = max(lane.floor, least)
        lane.virtual = {
            tenant: time for tenant, time in lane.virtual.items() if tenant in tenants or time > lane.floor
        }
        near = [t for t in tickets if lane.virtual[t.tenant] - least <= DEADLINE_LEAD_SECONDS]
        stalest = min(near, key=lambda ticket: (ticket.served_at, ticket.turn))
        overdue = now - stalest.served_at >= self.patience_seconds
        if overdue and lane.ticks_by_preference >= self.max_bypasses:
            lane.ticks_by_preference = 0
            return stalest
        lane.ticks_by_preference += 1
        pressed = [ticket for ticket in near if ticket.deadline is not None]
        if pressed:
            return min(pressed, key=lambda ticket: (ticket.due, ticket.turn))
        return min(tickets, key=lambda ticket: (lane.virtual[ticket.tenant], ticket.turn))

    # ------------------------------------------------------------------ who may start

    def order(self, waiting: Sequence[TicketT], started: Iterable[Ticket]) -> list[TicketT]:
        """The waiting tasks of one class in the order they would start if nothing else came.

        Tenants with the fewest started tasks per unit of weight come first, then the earliest deadline, then
        the earliest arrival.

        Args:
            waiting: in order of arrival.
            started: tasks of the same class that run.
        """
        places = Counter(ticket.tenant for ticket in started)
        keys: list[tuple[float, float, int]] = []
        for index in sorted(range(len(waiting)), key=lambda index: (waiting[index].due, index)):
            ticket = waiting[index]
            keys.append((places[ticket.tenant] / self._weight(ticket.tenant), ticket.due, index))
            places[ticket.tenant] += 1
        return [waiting[index] for *_, index in sorted(keys)]

    def starts(
        self,
        waiting: Sequence[TicketT],
        started: Sequence[Ticket],
        now: float,
        *,
        max_running: int,
        resident: Collection[str] = frozenset(),
    ) -> list[TicketT]:
        """Waiting tasks of one class that may start now, best first; the first that can should.

        Args:
            waiting: in order of arrival.
            started: tasks of the same class that run.
            now: as for `pick`.
            max_running: places. When some tenant has several, as many again are for tenants that have none,
                so that nobody's long requests keep others from starting.
            resident: adapters that take no loading; a task with one of them may go before others, unless that
                would cost one of these its deadline or give its tenant more places than theirs.
        """
        if not waiting:
            return []
        full = len(started) >= max_running
        if self._lanes[waiting[0].klass].bypasses >= self.max_bypasses:
            if full:
                return []
            # what takes no slot cannot keep the oldest from getting the one it may be waiting for
            others = (ticket for ticket in self.order(waiting, started) if not ticket.adapter)
            return [waiting[0], *(ticket for ticket in others if ticket is not waiting[0])]
        places = Counter(ticket.tenant for ticket in started)
        if not full:
            return self._with_affinity(self.order(waiting, started), places, now, resident)
        if len(started) >= 2 * max_running or max(places.values()) < 2:
            return []
        newcomers = [ticket for ticket in self.order(waiting, started) if not places[ticket.tenant]]
        return self._with_affinity(newcomers, places, now, resident)

    def start(self, ticket: Ticket, waiting: Sequence[Ticket], now: float) -> None:
        """Note that one of `waiting` (in order of arrival, itself included) starts."""
        lane = self._lanes[ticket.klass]
        lane.bypasses = 0 if ticket is waiting[0] else lane.bypasses + 1
        self._serve(ticket, now)

    def _with_affinity(
        self, order: list[TicketT], places: Mapping[str, int], now: float, resident: Collection[str]
    ) -> list[TicketT]:
        slack = math.inf  # of those that would be passed over
        for index, ticket in enumerate(order):
            fair = self._places(ticket, places) <= self._places(order[0], places)
            if ticket.adapter in resident and fair and self.needs(ticket) <= slack:
                return [ticket, *order[:index], *order[index + 1 :]]
            slack = min(slack, ticket.due - now - self.needs(ticket))
        return order

    # ------------------------------------------------------------------ who is too late

    def needs(self, ticket: Ticket) -> float:
        """Least seconds a task still takes: alone on the device, by the cheapest measured step of its kind.

        0 until a few steps of the kind were measured: the first ones are slower, and nobody shall be refused
        on a guess.
        """
        return ticket.steps_left * self._cheapest.get(ticket.kind, 0.0)

    def hopeless(self, tickets: Iterable[TicketT], now: float) -> list[TicketT]:
        """Those that cannot make their deadline even if nothing else ran from now on."""
        return [ticket for ticket in tickets if now + self.needs(ticket) > ticket.due]

    def _learn(self, kind: Hashable, seconds: float) -> None:
        if kind not in self._costs and len(self._costs) >= MAX_KINDS:
            forgotten, _ = self._costs.popitem(last=False)
            self._cheapest.pop(forgotten, None)
        costs = self._costs.setdefault(kind, deque(maxlen=COST_WINDOW))
        costs.append(seconds)
        self._costs.move_to_end(kind)
        if len(costs) >= MIN_COSTS:
            self._cheapest[kind] = min(costs)

    # ------------------------------------------------------------------ small parts

    def _serve(self, ticket: Ticket, now: float) -> None:
        self._turns += 1
        ticket.turn, ticket.served_at = self._turns, now

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def _places(self, ticket: Ticket, places: Mapping[str, int]) -> float:
        return places.get(ticket.tenant, 0) / self._weight(ticket.tenant)
