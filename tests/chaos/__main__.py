"""`python -m tests.chaos [TRIALS] [--seed N] [--only kill|disk|shared]`: break things, see what is lost.

TRIALS is how many workers are killed in each of the two kill scenarios; the others follow from it.
"""

from __future__ import annotations

import argparse
import sys

from tests.chaos import storm


def say(line: str) -> None:
    """Print at once: a scenario takes minutes."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Run everything; 1 when anything was lost, half or double."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trials", nargs="?", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    shape = "{:<30} {:>7} {:>13} {:>6} {:>10} {:>8} {:>9}"
    say(shape.format("what broke", "trials", "acknowledged", "jobs", "takeovers", "orphans", "problems"))
    bad = 0
    for row in storm.storm(given.trials, given.seed, only=given.only):
        figures = (row.trials, row.acknowledged, row.jobs, row.takeovers, row.orphans, len(row.problems))
        say(shape.format(row.name, *figures))
        for problem in row.problems[:10]:
            say(f"    {problem}")
        bad += len(row.problems)
    say("nothing lost, nothing half, nothing double" if not bad else f"{bad} problems")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
