"""Versions, aliases and deletions against a model of them: any order of any calls."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mooring_server.errors import MooringError, Reason
from mooring_server.storage.models import MoveKind, Verdict
from mooring_server.storage.store import Store
from store_rows import judged, publish

CHOICES = st.integers(0, 9)
VERDICTS = st.sampled_from([Verdict.PASSED, Verdict.WARNED, Verdict.NOT_CHECKED, Verdict.REFUSED])
ALIASES = st.sampled_from(["live", "live", "live", "canary"])


@dataclass
class Pointer:
    """An alias: where it pointed, oldest first; the last one is where it points."""

    trail: list[int] = field(default_factory=list)


class AliasLife(RuleBasedStateMachine):
    """One adapter. The model keeps a trail per alias: publishing appends, rolling back cuts off."""

    @initialize()
    def open(self) -> None:
        self.files = contextlib.ExitStack()
        folder = self.files.enter_context(tempfile.TemporaryDirectory())
        self.store = Store(f"sqlite:///{folder}/db")
        self.alive: set[int] = set()
        self.made = 0
        self.aliases: dict[str, Pointer] = {}
        self.moves: list[tuple[str, MoveKind, int | None, int | None]] = []
        self.decisions: list[tuple[str, int, Verdict]] = []
        for _ in range(4):
            self.train()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.files.close()

    def reason(self, call, *args, **values) -> Reason | None:
        try:
            call(*args, **values)
        except MooringError as error:
            return error.reason
        return None

    def goes_back_to(self, alias: str) -> int | None:
        """The length of the trail after a rollback; None when there is nothing to go back to."""
        trail = self.aliases[alias].trail
        for length in range(len(trail) - 1, 0, -1):
            if trail[length - 1] in self.alive and trail[length - 1] != trail[-1]:
                return length
        return None

    @rule()
    def train(self) -> None:
        self.made += 1
        self.alive.add(self.made)
        assert publish(self.store).version == self.made

    @rule(version=st.integers(1, 9), alias=ALIASES)
    def publish_what_is_not_there(self, version: int, alias: str) -> None:
        if version not in self.alive:
            found = self.reason(
                self.store.publish_alias, "acme", "duck", version, alias, judge=judged(), actor="ann"
            )
            assert found is Reason.ADAPTER_NOT_FOUND

    @precondition(lambda self: self.alive)
    @rule(alias=ALIASES, verdict=VERDICTS)
    def publish_the_newest(self, alias: str, verdict: Verdict) -> None:
        self._publish(None, max(self.alive), alias, verdict)

    @precondition(lambda self: self.alive)
    @rule(choice=CHOICES, alias=ALIASES)
    def publish(self, choice: int, alias: str) -> None:
        version = sorted(self.alive)[choice % len(self.alive)]
        self._publish(version, version, alias, Verdict.PASSED)

    @precondition(lambda self: len(self.alive) > 1)
    @rule(choice=CHOICES, alias=ALIASES)
    def publish_another_and_the_first_again(self, choice: int, alias: str) -> None:
        """A, B, A: the way back is B and then A, not A at once."""
        alive = sorted(self.alive)
        first, second = (alive[(choice + step) % len(alive)] for step in (0, 1))
        for version in (first, second, first):
            self._publish(version, version, alias, Verdict.PASSED)

    def _publish(self, version: int | None, target: int, alias: str, verdict: Verdict) -> None:
        published, decision = self.store.publish_alias(
            "acme", "duck", version, alias, judge=judged(verdict), actor="ann"
        )
        self.decisions.append((alias, target, verdict))
        assert (decision.alias, decision.version, decision.verdict) == self.decisions[-1]
        assert (published is None) == (verdict is Verdict.REFUSED)
        if published is None:
            return
        trail = self.aliases.setdefault(alias, Pointer()).trail
        self.moves.append((alias, MoveKind.PUBLISH, target, trail[-1] if trail else None))
        if not trail or trail[-1] != target:
            trail.append(target)
        assert published.version == target

    @rule(alias=ALIASES, judged_as=VERDICTS)
    def ask(self, alias: str, judged_as: Verdict) -> None:
        if self.alive:
            self.store.publish_alias(
                "acme", "duck", None, alias, judge=judged(judged_as), actor="ann", validate_only=True
            )

    @rule(alias=ALIASES)
    def roll_back_what_may_not_be(self, alias: str) -> None:
        self._roll_back(alias)

    @precondition(lambda self: self.aliases)
    @rule(choice=CHOICES)
    def roll_back(self, choice: int) -> None:
        self._roll_back(sorted(self.aliases)[choice % len(self.aliases)])

    def _roll_back(self, alias: str) -> None:
        found = None
        if alias not in self.aliases:
            found = Reason.ALIAS_NOT_FOUND
        elif self.goes_back_to(alias) is None:
            found = Reason.NOTHING_TO_ROLL_BACK
        assert self.reason(self.store.roll_back_alias, "acme", "duck", alias, actor="ann") is found
        if found is None:
            trail = self.aliases[alias].trail
            left, length = trail[-1], self.goes_back_to(alias)
            del trail[length:]
            self.moves.append((alias, MoveKind.ROLL_BACK, trail[-1], left))

    @rule(alias=ALIASES)
    def delete_alias(self, alias: str) -> None:
        known = alias in self.aliases
        found = self.reason(self.store.delete_alias, "acme", "duck", alias, actor="ann")
        assert found is (None if known else Reason.ALIAS_NOT_FOUND)
        if known:
            self.moves.append((alias, MoveKind.DELETE, None, self.aliases.pop(alias).trail[-1]))

    @precondition(lambda self: self.alive)
    @rule(choice=CHOICES)
    def delete(self, choice: int) -> None:
        self._delete(sorted(self.alive)[choice % len(self.alive)])

    @precondition(lambda self: self.made > 6)
    @rule(version=st.integers(1, 9) | st.none())
    def delete_what_may_not_be(self, version: int | None) -> None:
        self._delete(version)

    def _delete(self, version: int | None) -> None:
        going = self.alive if version is None else {version} & self.alive
        pointed = {pointer.trail[-1] for pointer in self.aliases.values()}
        wanted = None
        if pointed & ({version} if version is not None else pointed):
            wanted = Reason.ADAPTER_IN_USE
        elif not going:
            wanted = Reason.ADAPTER_NOT_FOUND
        assert self.reason(self.store.delete_adapter, "acme", "duck", version) is wanted
        if wanted is None:
            self.alive -= going

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        shown = {
            item.alias: (item.version, item.previous_version) for item in self.store.list_aliases("acme")[0]
        }
        expected = {}
        for alias, pointer in self.aliases.items():
            length = self.goes_back_to(alias)
            back = None if length is None else pointer.trail[length - 1]
            expected[alias] = pointer.trail[-1], back
            assert self.store.get_adapter("acme", "duck", alias=alias).version == pointer.trail[-1]
        assert shown == expected
        versions = self.store.list_adapters("acme", show_deleted=True, page_size=1000)[0]
        assert [item.version for item in versions] == list(range(self.made, 0, -1))
        assert {item.version for item in versions if item.delete_time is None} == self.alive
        moves = self.store.list_alias_moves("acme", "duck", page_size=1000)[0]
        assert [
            (item.alias, item.kind, item.version, item.previous_version) for item in moves[::-1]
        ] == self.moves
        decisions = self.store.list_gate_decisions("acme", page_size=1000)[0]
        assert [(item.alias, item.version, item.verdict) for item in decisions[::-1]] == self.decisions


TestAliasLife = AliasLife.TestCase
TestAliasLife.settings = settings(
    max_examples=20,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
