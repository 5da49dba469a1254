"""Sends messages to methods, counts what became of them, and tells whether they got far enough to matter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure
from mooring.v1 import job_pb2
from mooring_server.errors import REASON_CODE, Code, Reason

from .calling import PATIENCE, Leave, Outcome, ask, call
from .mutator import STREAM, Hints, calls, metadata
from .site import BY_NAME, METHODS, Site

DOOR = {
    "INVALID_FIELD",
    "BAD_RESOURCE_NAME",
    "BAD_PAGE_TOKEN",
    "NOT_AUTHENTICATED",
    "NOT_ALLOWED",
    "MESSAGE_TOO_LARGE",
}
"""Reasons of calls that were refused before anything was looked up or computed."""
LEAST_OK, LEAST_DEEP = 0.1, 0.3
"""Shares of a method's calls that must be answered, and that must get past the door."""
_ENDLESS = {"Watch"}
"""Streams that say one thing and then wait for news."""


@dataclass
class Tally:
    """What became of the calls of one method.

    Attributes:
        codes: statuses of calls whose caller stayed.
        reasons: of their ErrorInfo.
        inside: what single requests of a stream were answered with: results, or reasons of their errors.
        left: calls whose caller left.
        answered: of all calls, those that got an answer before they ended or their caller left.
        slowest: seconds.
        problems: calls that ended as none may.
    """

    method: str
    messages: int = 0
    calls: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    inside: Counter[str] = field(default_factory=Counter)
    left: int = 0
    answered: int = 0
    slowest: float = 0.0
    problems: list[str] = field(default_factory=list)

    def add(self, requests: int, outcome: Outcome) -> None:
        """Count a call."""
        self.messages += max(1, requests)
        self.calls += 1
        self.slowest = max(self.slowest, outcome.seconds)
        self.answered += outcome.code is grpc.StatusCode.OK or (outcome.left and bool(outcome.answers))
        if outcome.left:
            self.left += 1
            return
        self.codes[outcome.code.name] += 1
        if outcome.reason:
            self.reasons[outcome.reason] += 1

    @property
    def ok(self) -> float:
        """Share of the calls that were answered, of those that could be told."""
        return self.answered / max(1, self._told)

    @property
    def _told(self) -> int:
        """Calls that ended, or whose caller left with an answer."""
        return sum(self.codes.values()) + self.answered - self.codes["OK"]

    @property
    def deep(self) -> float:
        """Share of the calls that could be told, or of the single requests, that got past the door."""
        told = self.inside or self.reasons
        refused = sum(count for reason, count in told.items() if reason in DOOR)
        return 1.0 - refused / max(1, sum(self.inside.values()) or self._told)

    def shallow(self) -> str:
        """Why this fuzzing would pass anything; "" where it would not."""
        if self.ok >= LEAST_OK and self.deep >= LEAST_DEEP:
            return ""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common(4))
        return (
            f"{self.method}: {self.ok:.0%} answered, {self.deep:.0%} past the door ({reasons}); "
            "Hints in tests/fuzz/site.py lack values that it takes"
        )


class Campaign:
    """Fuzzes the methods of one site.

    Args:
        site: the server.
        methods: what to call.
        patience: seconds after which a call hangs.
    """

    def __init__(
        self, site: Site, methods: Sequence[MethodDescriptor] = METHODS, patience: float = PATIENCE
    ) -> None:
        self.site, self.methods, self.patience = site, methods, patience
        self.tallies = {method.name: Tally(method.name) for method in methods}
        self._jobs = 0

    @property
    def messages(self) -> int:
        """Sent so far."""
        return sum(tally.messages for tally in self.tallies.values())

    def run(self, method: MethodDescriptor, wanted: int, number: int, *, shrink: bool = True) -> None:
        """Send about so many messages.

        Args:
            method: what to call.
            wanted: messages.
            number: seed of what is drawn.
            shrink: look for the smallest call that fails.

        Raises:
            AssertionError: a call ended as none may; it says which.
        """
        hints, tally = self.site.hints(), self.tallies[method.name]
        per_call = (1 + STREAM) / 2 if method.client_streaming else 1
        channels = [grpc.insecure_channel(self.site.target)]

        @seed(number)
        @settings(
            max_examples=max(4, int(wanted / per_call)),
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        )
        @given(requests=calls(method, hints), leave=_leaving(method), beside=metadata(hints.keys))
        def send(requests: list[bytes], leave: Leave, beside: list[tuple[str, str | bytes]]) -> None:
            target: Any = self.site.target if leave.drop else channels[0]
            outcome = call(target, method, requests, leave, beside, self.patience)
            tally.add(len(requests), outcome)
            _look_inside(method, outcome, tally.inside)
            self._tidy(channels[0], method, outcome, hints)

        try:
            send()
        except FlakyFailure as group:  # it does not fail every time: a defect all the same
            raise AssertionError(str(group.exceptions[0])) from group
        finally:
            channels[0].close()

    def _tidy(self, channel: grpc.Channel, method: MethodDescriptor, outcome: Outcome, hints: Hints) -> None:
        """Most of the started jobs are cancelled: the device is for the fuzzed calls."""
        job = method.output_type.fields_by_name.get("job")
        if not outcome.answers or job is None or method.name in {"GetJob", "CancelJob", "WatchJob"}:
            return
        self._jobs += 1
        if self._jobs % 10 == 0 and method.name != "Evaluate":  # an evaluation takes a minute of ticks
            return
        name = GetMessageClass(method.output_type).FromString(outcome.answers[0]).job.name
        try:
            ask(channel, hints.keys[0], BY_NAME["CancelJob"], job_pb2.CancelJobRequest(name=name))
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION, error  # noqa: PT017 - it had ended

    def shallow(self) -> list[str]:
        """Methods whose fuzzing would pass anything."""
        return [text for tally in self.tallies.values() if (text := tally.shallow())]


def _look_inside(method: MethodDescriptor, outcome: Outcome, inside: Counter[str]) -> None:
    """Count how single requests of a stream ended. Raises AssertionError for one that ended in a bug."""
    error = method.output_type.fields_by_name.get("error")
    if error is None or error.message_type is not status_pb2.Status.DESCRIPTOR:
        return
    for data in outcome.answers:
        answer = GetMessageClass(method.output_type).FromString(data)
        if answer.HasField("error"):
            info = error_details_pb2.ErrorInfo()
            answer.error.details[0].Unpack(info)
            inside[info.reason] += 1
            code = REASON_CODE[Reason(info.reason)]
            assert code not in {Code.INTERNAL, Code.DATA_LOSS}, (
                f"{method.name}: {answer.error.message[:300]!r}"
            )
        elif not answer.HasField("image"):
            inside["answered"] += 1


def _leaving(method: MethodDescriptor) -> st.SearchStrategy[Leave]:
    """Three callers out of four stay to the end, one of the others closes its connection."""
    answers = 1 if method.name in _ENDLESS else 30
    leaving = st.builds(
        Leave,
        sent=st.integers(0, STREAM) if method.client_streaming else st.sampled_from([0, None, None]),
        answers=st.just(answers) if answers == 1 else st.sampled_from([1, 2, 5, answers]),
        drop=st.sampled_from([False, False, True]),
    )
    return st.integers(0, 7).flatmap(
        lambda number: leaving if number >= 6 else st.just(Leave(answers=answers))
    )
