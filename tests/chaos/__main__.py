"""Break things while work goes on, and look for what is lost.

Workers upload photos, import adapters, train, evaluate, draw batches and publish, all at once and each
request twice, through the service's own store, objects, sessions, runner, gate and collector; only the
tensors are pretended, so that a job takes a fraction of a second. Then something breaks:

  kill-local-*     kill -9 aimed at one kind of work (training, evaluation, batch, publish, upload), every
                   fifth one at a worker that is just starting; SQLite and a folder
  kill-shared-*    the same on PostgreSQL and S3
  replicas-killed  two replicas, the one that trains is killed
  replicas-frozen  two replicas, each stopped in turn for longer than its lease and then woken up
  postgresql       PostgreSQL stopped as in a crash, and started
  s3-failing       S3 answers errors, breaks connections, dawdles, is away altogether
  s3-lying         S3 acknowledges writes that it drops, cuts or ignores, and flips bits of what it reads out
  real-server      kill -9 of a real server on a tiny base while a client uses all of it over gRPC
  disk-full        a small file system that fills up and is emptied again (needs root, to mount it)
  disk-limit       no file may grow beyond a limit (needs no root)

Afterwards nothing may be lost (what was acknowledged is there, accepted jobs end well), half (every
published adapter loads with its digest and has the evaluation that let it pass; every manifest is that of
an undisturbed run) or double (one thing per request, however often it was repeated; each row of a batch
once), no row may refer to nothing, and a collector without any grace may take only what nothing refers to.

SIGTERM and Ctrl-C end a run and all that it started; with `--results` the next one goes on from there.

PostgreSQL's binaries must be on the machine; S3 is moto, behind a proxy that misbehaves. The table's
columns: how often it broke; how often the work aimed at was under way at that instant; after how many the
work went on; what was lost, half, double, and rows that refer to nothing; seconds until every interrupted
job ran again and calls were answered, from the start of the next worker (a lease is 1 s here); requests
that were answered, jobs, claims of jobs claimed before, and objects that the collector took at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

_EXAMPLES = """examples:
  python -m tests.chaos                                everything, 100 kills on SQLite and a folder
  python -m tests.chaos 5 --only kill-local            a minute
  python -m tests.chaos 1000 --results chaos.jsonl     resumable: rows in the file are not run again
"""


def say(line: str) -> None:
    """Print at once: a scenario takes minutes."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def end(number: int, _frame: FrameType | None) -> None:
    """Unwind: PostgreSQL and the mount end with their context, workers and folders with theirs. Once."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main() -> int:
    """Run everything; 1 when anything was lost, half or double, or the work did not go on."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "kills",
        nargs="?",
        type=int,
        default=100,
        help="kills on SQLite and a folder, over all five kinds of work; three tenths of it on PostgreSQL "
        "and S3, a tenth of it of everything else (100)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of every random choice (1)")
    parser.add_argument("--only", default="", metavar="PART", help="scenarios whose name has this in it")
    parser.add_argument("--list", action="store_true", help="name the scenarios and end")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="append each row to this file, and do not run again what is in it with the same kills and seed",
    )
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)

    from . import storm, table

    if given.list:
        with storm.contextlib.ExitStack() as stack:
            for scenario in storm.scenarios(given.kills, given.seed, storm.Backends(stack, given.seed)):
                say(scenario.name)
        return 0
    run = [given.kills, given.seed]
    done: dict[str, table.Row] = {}
    if given.results is not None and given.results.exists():
        for line in given.results.read_text().splitlines():
            entry = json.loads(line)
            if entry["run"] == run and given.only in entry["name"]:
                done[entry["name"]] = table.Row(**entry["row"])
    say(table.heading())
    rows = list(done.values())
    for row in rows:
        say(row.line())
    # closed, so that what it started ends with it, wherever a signal comes
    with contextlib.closing(storm.storm(given.kills, given.seed, only=given.only, skip=set(done))) as raging:
        for name, row in raging:
            rows.append(row)
            say(row.line())
            for problem in row.problems[:10]:
                say(f"    {problem}")
            if given.results is not None:
                with given.results.open("a") as file:
                    entry = {"name": name, "run": run, "row": json.loads(row.dumps())}
                    file.write(json.dumps(entry) + "\n")
    problems = sum(len(row.problems) for row in rows)
    not_run = sum(bool(row.not_run) for row in rows)
    times = sum(row.times for row in rows)
    say(
        f"\n{times} breaks: "
        + (f"{problems} problems" if problems else "nothing lost, nothing half, nothing double")
        + (f"; {not_run} scenarios were not run" if not_run else "")
    )
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
