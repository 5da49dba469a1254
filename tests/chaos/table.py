"""What a scenario found, as a row of the table."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field

_COLUMNS = {
    "what broke": 46,
    "times": 5,
    "in mid-work": 11,
    "recovered": 9,
    "lost": 4,
    "half": 4,
    "double": 6,
    "orphan rows": 11,
    "median s": 8,
    "worst s": 7,
    "acknowledged": 12,
    "jobs": 5,
    "takeovers": 9,
    "collected": 9,
}


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: what broke.
        times: how often.
        struck: how often the work that was aimed at was under way at that instant.
        recovered: after how many of them the work went on: every interrupted job ran again (or had ended) and
            calls were answered.
        lost: what was acknowledged or accepted and is not there, in words; the next three likewise.
        half: what is there and not whole.
        double: what one request made twice.
        orphans: rows that refer to nothing.
        seconds: from the start of the next worker (or the end of the trouble) until the work went on.
        acknowledged: requests that were answered.
        jobs: accepted jobs.
        takeovers: claims of jobs that had been claimed before.
        collected: objects that the collector took at the end, without any grace.
        not_run: why it could not be run here; "" where it was.
    """

    name: str
    times: int = 0
    struck: int = 0
    recovered: int = 0
    lost: list[str] = field(default_factory=list)
    half: list[str] = field(default_factory=list)
    double: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    acknowledged: int = 0
    jobs: int = 0
    takeovers: int = 0
    collected: int = 0
    not_run: str = ""

    def found(self, kind: str, problem: str) -> None:
        """Note a problem once, however often it is seen."""
        problems = getattr(self, kind)
        if problem not in problems:
            problems.append(problem)

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong, in words."""
        found = [
            f"{kind}: {problem}"
            for kind in ("lost", "half", "double", "orphans")
            for problem in getattr(self, kind)
        ]
        missing = self.times - self.recovered
        return found + ([f"the work did not go on {missing} times"] if missing else [])

    def dumps(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    def line(self) -> str:
        """The row in Markdown, padded for reading as it is printed."""
        if self.not_run:
            return f"| {self.name:<46} | not run: {self.not_run} |"
        median = f"{statistics.median(self.seconds):.1f}" if self.seconds else ""
        worst = f"{max(self.seconds):.1f}" if self.seconds else ""
        figures = (
            self.name,
            self.times,
            self.struck,
            self.recovered,
            *(len(found) for found in (self.lost, self.half, self.double, self.orphans)),
            median,
            worst,
            self.acknowledged,
            self.jobs,
            self.takeovers,
            self.collected,
        )
        return _padded(figures)


def heading() -> str:
    """The first two lines."""
    rule = [
        width * "-" if index == 0 else (width - 1) * "-" + ":"
        for index, width in enumerate(_COLUMNS.values())
    ]
    return _padded(_COLUMNS) + "\n" + _padded(rule)


def _padded(cells: object) -> str:
    padded = [
        f"{cell!s:<{width}}" if index == 0 else f"{cell!s:>{width}}"
        for index, (cell, width) in enumerate(zip(cells, _COLUMNS.values(), strict=True))
    ]
    return f"| {' | '.join(padded)} |"
