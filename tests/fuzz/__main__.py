"""`python -m tests.fuzz [MESSAGES]`: fuzz every handler, say what came of it.

A server in a process of its own, on a tiny base. Methods take turns, so that what one makes another finds;
after every round what was deleted is made again. The table counts calls by method and status; below it stand
the reasons of the refusals, and what was compared after the last call.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from servers import Postgres

from .campaign import Campaign, Tally
from .site import METHODS, Resources, Site, chain_of, leftovers, process

ROOT = Path(__file__).resolve().parents[2]
SAVED = Path(__file__).with_name("results.txt")
ROUND = 5000
"""Messages of a round."""
HANDLES, THREADS, GROWTH = 16, 8, 0.25
"""What may have come since the first round: file handles, threads, resident memory as a share. Connections
that close a moment later and thread pools that fill up come; a leak of one a call would be thousands."""


def say(line: str, *, over: bool = False) -> None:
    """Print at once; `over`: where a terminal shows it, in place of the line before."""
    if not over:
        sys.stdout.write(line + "\n")
    elif sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{line}")
    else:
        sys.stderr.write(line + "\n")
    sys.stdout.flush()
    sys.stderr.flush()


@dataclass
class _Progress:
    wanted: int
    started: float = field(default_factory=time.monotonic)
    said: float = 0.0

    def show(self, campaign: Campaign, method: str) -> None:
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if now - self.said < (0.5 if terminal else 30.0):
            return
        self.said = now
        rate = campaign.messages / max(1e-9, now - self.started)
        left = (self.wanted - campaign.messages) / rate / 60 if rate else math.inf
        defects = sum(len(tally.problems) for tally in campaign.tallies.values())
        say(
            f"{campaign.messages:,} of {self.wanted:,} messages, {rate:.1f}/s, "
            f"{max(0.0, left):.0f} min left, {defects} defects, {method}",
            over=True,
        )


def main() -> int:
    """Run everything; 1 when a call ended as none may, or something is not as it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("messages", nargs="?", type=int, default=50_000, help="how many (default: 50,000)")
    parser.add_argument("--seed", type=int, default=1, help="of everything drawn")
    parser.add_argument("--only", action="append", default=[], metavar="METHOD", help="such as Generate")
    parser.add_argument("--postgres", action="store_true", help="on a PostgreSQL server of its own")
    parser.add_argument("--save", action="store_true", help=f"also write {SAVED.relative_to(ROOT)}")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server ends with it
    methods = [method for method in METHODS if not given.only or method.name in given.only]
    if not methods:
        parser.error(f"no such method; there are {', '.join(method.name for method in METHODS)}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mooring-fuzz-")))
        database = stack.enter_context(Postgres()).new_url() if given.postgres else ""
        site, server = stack.enter_context(process(folder, database))
        campaign = Campaign(site, methods)
        before = site.others()
        held = _rounds(campaign, given.messages, given.seed)
        checks = [*_afterwards(site, before, held)]
        code = server.stop()
        checks.append(("exit status after SIGTERM", f"{code}", code == 0))
        left = leftovers(folder, database)
        checks.append(("audit log", *chain_of(folder, database)))
        checks.append(("objects that nothing refers to", ", ".join(left[:3]) or "none", not left))
    lines = [*_table(campaign), "", *_reasons(campaign), "", *_shown(checks)]
    bad = [problem for tally in campaign.tallies.values() for problem in tally.problems]
    lines += ["", *(bad or ["no call ended in INTERNAL, UNKNOWN or not at all"]), *campaign.shallow()]
    for line in lines:
        say(line)
    if given.save:
        sys.path.insert(0, str(ROOT))
        from benchmarks.common import Machine

        command = " ".join(["python -m tests.fuzz", *sys.argv[1:]])
        SAVED.write_text("\n".join([f"$ {command}", *lines, "", str(Machine.here()), ""]), encoding="utf-8")
    good = all(fine for _, _, fine in checks)
    return int(bool(bad) or not good or bool(campaign.shallow()))


def _rounds(campaign: Campaign, wanted: int, seed: int) -> Resources:
    """Send them all; what the server held after the first round."""
    site, progress, held = campaign.site, _Progress(wanted), None
    number = seed * 1_000_000
    share = max(4, min(wanted, ROUND) // len(campaign.methods))
    site.victims = share // 2
    site.restock()
    while campaign.messages < wanted:
        for method in campaign.methods:
            number += 1
            progress.show(campaign, method.name)
            tally = campaign.tallies[method.name]
            try:
                campaign.run(method, share, number, shrink=False)
            except AssertionError as error:
                problem = str(error).splitlines()[0][:700]
                if problem not in tally.problems:
                    tally.problems.append(problem)
                    say(problem)
        site.settle()
        site.restock()
        if held is None:
            held = Resources.of(site.pid)
    assert held is not None
    return held


def _afterwards(site: Site, before: dict[str, bytes], held: Resources) -> Iterator[tuple[str, str, bool]]:
    """What was compared: words, figures, whether it is as it should be."""
    site.settle()
    yield "says SERVING", str(site.serving()), site.serving()
    told = site.bugs_told()
    yield "calls that its own metrics count as defects", str(told or "none"), not told
    broken = site.jobs_broken()
    yield "jobs that failed as defects", "; ".join(broken[:3]) or "none", not broken
    after = site.others()
    other = [name for name in before if before[name] != after[name]]
    yield (
        "another tenant's things, an image by the base and one by an adapter, bit for bit",
        ", ".join(other) or "unchanged",
        not other,
    )
    now = Resources.of(site.pid)
    yield (
        "threads after the first round, and now",
        f"{held.threads}, {now.threads}",
        now.threads <= held.threads + THREADS,
    )
    yield (
        "handles after the first round, and now",
        f"{held.handles}, {now.handles}",
        now.handles <= held.handles + HANDLES,
    )
    yield (
        "MiB resident after the first round, and now",
        f"{held.resident / 2**20:.0f}, {now.resident / 2**20:.0f}",
        now.resident <= held.resident * (1 + GROWTH),
    )


def _table(campaign: Campaign) -> Iterator[str]:
    tallies = list(campaign.tallies.values())
    codes = sorted({code for tally in tallies for code in tally.codes} - {"OK"})
    total = Tally("all")
    for tally in tallies:
        total.messages += tally.messages
        total.calls += tally.calls
        total.left += tally.left
        total.codes += tally.codes
        total.slowest = max(total.slowest, tally.slowest)
        total.problems += tally.problems
    headings = ["method", "messages", "calls", "left", "OK", *codes, "slowest ms", "defects"]
    rows = [headings]
    for tally in (*tallies, total):
        counts = (tally.messages, tally.calls, tally.left, *(tally.codes[code] for code in ("OK", *codes)))
        figures = [f"{count:,}" if count else "–" for count in counts]
        rows.append([tally.method, *figures, f"{tally.slowest * 1000:,.0f}", str(len(tally.problems) or "–")])
    widths = [max(len(row[column]) for row in rows) for column in range(len(headings))]
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
        ]
        yield "  ".join(cells).rstrip()


def _reasons(campaign: Campaign) -> Iterator[str]:
    for tally in campaign.tallies.values():
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in tally.reasons.most_common())
        shares = f"{tally.ok:.0%} answered, {tally.deep:.0%} past the door"
        line = f"{tally.method}: {shares}: {reasons or 'no refusals'}"
        inside = ", ".join(f"{reason} {count:,}" for reason, count in tally.inside.most_common())
        yield f"{line}; single requests: {inside}" if inside else line


def _shown(checks: list[tuple[str, str, bool]]) -> Iterator[str]:
    for name, figure, fine in checks:
        yield f"{'✓' if fine else '✗'} {name}: {figure}"


if __name__ == "__main__":
    sys.exit(main())
