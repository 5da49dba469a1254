"""Does a server stay as large as it is under half an hour of mixed load? `python -m benchmarks.soak`.

A real server process on dinghy takes at once: images of more adapters than slots, batches, uploads, training
and evaluation jobs, imports, exports, deletes, callers that cancel and callers whose connection breaks
(`benchmarks.soak_load`). Every ten seconds its memory, threads, file handles, sockets, database connections
and decoder processes are read from the system, and the bytes of arena and tiers from its metrics.

The first half warms up. Over the second half a straight line is fitted to each figure, with three standard
errors of what it grows by. A figure is flat when its growth *and* those together are within 2 % of it (half a
thing, where things are counted), so that noise cannot pass for flatness: where it is too much, the verdict is
"cannot tell". What may still hide is printed, per piece of work. Nothing here is a timing: it may run beside
other work.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from mooring_server.engine.adapters import LORA_FILE, export_diffusers
from PIL import Image

from benchmarks import bases
from benchmarks.common import Row, parser, show
from benchmarks.engine_common import random_adapter
from benchmarks.soak_load import WORKERS, Load

MINUTES, QUICK_MINUTES = 30.0, 1.0
EVERY, QUICK_EVERY = 10.0, 1.0
GOAL = 0.02
"""Growth over the second half, as a share of the figure."""
HALF_A_THING = 0.5
"""Growth of a small count that is still none."""
BLOCKS = 15
"""Means that a line is fitted to: samples near each other are alike, and would feign certainty."""
LEAST = 20
"""Samples that a line is fitted to."""
START_SECONDS = 600.0
_BARS = "▁▂▃▄▅▆▇█"
_MIB = 2.0**20

Sample = dict[str, float]

UNITS: Mapping[str, str] = {
    "resident": "MiB",
    "private": "MiB",
    "threads": "",
    "file handles": "",
    "sockets": "",
    "database connections": "",
    "decoders": "",
    "decoders' private": "MiB",
    "arena": "MiB",
    "tier device": "MiB",
    "tier host": "MiB",
}


def main() -> None:
    """Run the benchmark."""
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that its server ends with it
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="mooring-soak-") as folder, _server(Path(folder)) as server:
        load = _load(server, options.only)
        load.start()
        begin = time.monotonic()
        try:
            while (passed := time.monotonic() - begin) < options.minutes * 60:
                time.sleep(max(0.0, len(samples) * options.every - passed))
                samples.append({"seconds": time.monotonic() - begin, **server.sample()})
                _progress(samples, load, options)
        except KeyboardInterrupt:  # what was seen until then is worth its table
            if len(samples) < LEAST:
                raise
        except OSError as error:
            raise SystemExit(f"the server is gone ({error}): {_tail(Path(folder) / 'log')}") from None
        finally:
            load.stop()
        settled = server.settled()
    rows = [row_of(name, samples) for name in UNITS]
    failed = sum(load.failed.values())
    rows.append(Row("calls that failed unasked", failed, 0.0, None, "0", failed == 0))
    rows.append(Row("calls under way after the load", settled, 0.0, None, "0", settled == 0))
    work = sum(load.done.values())
    mixed = set(options.only) == set(WORKERS)
    done = ", ".join(f"{kind} {count:,}" for kind, count in sorted(load.done.items()))
    show(
        "soak" if mixed else "-".join(["soak", *options.only]),
        f"{samples[-1]['seconds'] / 60:.0f} minutes of {'mixed load' if mixed else ', '.join(options.only)} "
        "on one server process, "
        f"sampled every {options.every:g} s",
        rows,
        notes=(
            *(f"{name:>22} {curve(values(samples, name))}" for name in UNITS),
            "ours: the fitted line at the end of the second half; peer: at its begin; ratio: ours / peer.",
            f"flat: growth + noise (3 standard errors) within {GOAL:.0%}, or {HALF_A_THING:g} of a count.",
            f"hidden at most in the {work / 2:,.0f} pieces of work of that half: {hidden(rows, work / 2)}.",
            f"work done: {done}.",
            "Nothing here is a timing: other programs may have run on the machine.",
            *(f"failed: {what} ×{count}" for what, count in load.failed.most_common(10)),
        ),
        summary={
            "seconds": round(samples[-1]["seconds"], 1),
            "samples": float(len(samples)),
            "pieces of work": float(work),
        },
        options=options,
    )


def _options() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument(
        "--minutes", type=float, help=f"of load (default: {MINUTES:g}; quick: {QUICK_MINUTES:g})"
    )
    options.add_argument("--every", type=float, help=f"seconds between samples (default: {EVERY:g})")
    options.add_argument(
        "--only", choices=WORKERS, nargs="+", default=[*WORKERS], help="these kinds of work (default: all)"
    )
    chosen = options.parse_args()
    chosen.minutes = chosen.minutes or (QUICK_MINUTES if chosen.quick else MINUTES)
    chosen.every = chosen.every or (QUICK_EVERY if chosen.quick else EVERY)
    return chosen


def values(samples: Sequence[Sample], name: str) -> list[float]:
    """One figure of all samples."""
    return [sample[name] for sample in samples]


class Verdict(StrEnum):
    """What a fit says."""

    FLAT = "flat"
    GROWS = "grows"
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True)
class Fit:
    """A straight line through a figure: both its ends, and three standard errors of what it grows by."""

    begin: float
    end: float
    noise: float

    @staticmethod
    def of(seconds: Sequence[float], figures: Sequence[float]) -> Fit:
        """Least squares through the means of `BLOCKS` parts."""
        blocks = min(BLOCKS, len(figures))
        times = np.asarray([part.mean() for part in np.array_split(np.asarray(seconds), blocks)])
        found = np.asarray([part.mean() for part in np.array_split(np.asarray(figures), blocks)])
        centred = times - times.mean()
        spread = float(centred @ centred)
        slope = float(centred @ found) / spread
        rest = found - found.mean() - slope * centred
        error = (float(rest @ rest) / (blocks - 2) / spread) ** 0.5
        length = float(seconds[-1] - seconds[0])
        middle, half = float(found.mean()), slope * length / 2
        return Fit(middle - half, middle + half, 3.0 * error * length)

    @property
    def growth(self) -> float:
        """From begin to end."""
        return self.end - self.begin

    def verdict(self, least: float) -> Verdict:
        """Whether it grew no more than it may, as far as the noise lets one see.

        Args:
            least: growth that is none however small the figure is.
        """
        allowed = max(GOAL * abs(self.begin), least)
        if self.growth + self.noise <= allowed:
            return Verdict.FLAT
        return Verdict.GROWS if self.growth > max(allowed, self.noise) else Verdict.CANNOT_TELL


def row_of(name: str, samples: Sequence[Sample]) -> Row:
    """The verdict on one figure, over the second half."""
    second = samples[len(samples) // 2 :]
    found, seconds = values(second, name), values(second, "seconds")
    fit = Fit.of(seconds, found)
    verdict = fit.verdict(0.0 if UNITS[name] else HALF_A_THING)
    return Row(
        f"{name} {UNITS[name]}".strip(),
        round(fit.end, 3),
        round(fit.begin, 3),
        fit.end / fit.begin if fit.begin else None,
        "flat",
        {Verdict.FLAT: True, Verdict.GROWS: False, Verdict.CANNOT_TELL: None}[verdict],
        extra={
            "verdict": str(verdict),
            "growth": round(fit.growth, 3),
            "noise": round(fit.noise, 3),
            "per hour": round(fit.growth * 3600 / (seconds[-1] - seconds[0]), 2),
            "least": round(min(found), 3),
            "most": round(max(found), 3),
            "at start": round(samples[0][name], 3),
        },
    )


def hidden(rows: Sequence[Row], pieces: float) -> str:
    """How large a leak the rows of the process itself leave room for."""
    room = {
        row.name: max(0.0, float(row.extra["growth"] or 0) + float(row.extra["noise"] or 0))
        for row in rows
        if row.name in {"private MiB", "threads", "file handles", "sockets"}
    }
    memory = room.pop("private MiB")
    each = f" ({memory * 1024 / pieces:.1f} KiB a piece)" if pieces else ""
    return ", ".join([f"{memory:.1f} MiB{each}", *(f"{most:.2f} {name}" for name, most in room.items())])


def curve(figures: Sequence[float], width: int = 60) -> str:
    """A figure over time as a line of bars between its least and its most."""
    pieces = [float(np.mean(part)) for part in np.array_split(np.asarray(figures), min(width, len(figures)))]
    low, high = min(pieces), max(pieces)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    bars = "".join(_BARS[round((piece - low) * scale)] for piece in pieces)
    return f"{bars}  {low:,.4g} … {high:,.4g}"


def _progress(samples: Sequence[Sample], load: Load, options: argparse.Namespace) -> None:
    terminal = sys.stderr.isatty()
    if not terminal and len(samples) % 6 != 1:
        return
    last = samples[-1]
    line = (
        f"{last['seconds'] / 60:.1f} of {options.minutes:g} min: {last['resident']:.1f} MiB, "
        f"{last['threads']:.0f} threads, {last['file handles']:.0f} handles; "
        f"{sum(load.done.values()):,} pieces of work, {sum(load.failed.values())} failed"
    )
    sys.stderr.write(f"\r\033[K{line}" if terminal else f"{line}\n")
    sys.stderr.flush()


# ---------------------------------------------------------------------- the server


@dataclass(frozen=True)
class Process:
    """The server under load.

    Args:
        pid: of its process.
        target: where it serves.
        metrics_url: where its metrics are.
        database: its database file.
    """

    pid: int
    target: str
    metrics_url: str
    database: Path

    def sample(self) -> Sample:
        """Everything that must not grow. Bytes in MiB."""
        links = list(_links(self.pid))
        metrics = self._metrics()
        status = _status(self.pid)
        decoders = list(_children(self.pid))
        found: Sample = {
            "resident": status["VmRSS"] / 1024,
            "private": status["RssAnon"] / 1024,
            "threads": float(status["Threads"]),
            "file handles": float(len(links)),
            "sockets": float(sum(link.startswith("socket:") for link in links)),
            "database connections": float(sum(link == str(self.database) for link in links)),
            "decoders": float(len(decoders)),
            "decoders' private": sum(each.get("RssAnon", 0) for each in decoders) / 1024,
            "arena": metrics.get('mooring_device_bytes{kind="arena"}', 0.0) / _MIB,
        }
        for tier in ("device", "host"):
            found[f"tier {tier}"] = metrics.get(f'mooring_adapter_cache_bytes{{tier="{tier}"}}', 0.0) / _MIB
        return found

    def settled(self) -> int:
        """Calls still under way a while after the last caller has gone."""
        deadline = time.monotonic() + 60.0
        while time.monotonic() < deadline:
            under_way = int(self._metrics()["mooring_rpcs_in_flight"])
            if not under_way:
                return 0
            time.sleep(0.2)
        return under_way

    def _metrics(self) -> dict[str, float]:
        text = urllib.request.urlopen(self.metrics_url, timeout=60).read().decode()
        found = re.findall(r"^(mooring_[a-z_]+(?:\{[^}]*\})?) ([-+0-9.eE]+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}


@contextmanager
def _server(folder: Path) -> Iterator[Process]:
    """`mooring serve` on dinghy, as anybody would start it."""
    environment = {
        **os.environ,
        "MOORING_LISTEN": "127.0.0.1:0",
        "MOORING_METRICS_LISTEN": "127.0.0.1:0",
        "MOORING_LOG_FORMAT": "json",
        "MOORING_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "mooring_server", "serve", "--state-dir", str(folder)]
    with (folder / "log").open("wb") as log:
        # Ctrl-C at the terminal is the benchmark's: it ends its load before its server
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        serving = _wait_for(folder / "log", process)
        yield Process(process.pid, serving["target"], serving["metrics"], folder / "mooring.db")
        process.send_signal(signal.SIGTERM)
        if process.wait(120) != 0:
            raise SystemExit(f"the server ended with {process.returncode}: {_tail(folder / 'log')}")
    finally:
        process.kill()
        process.wait()


def _wait_for(log: Path, process: subprocess.Popen[bytes]) -> dict[str, str]:
    """The log line that says where it serves."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text(encoding="utf-8").splitlines():
            if '"serving"' in line and line.startswith("{"):
                found: dict[str, str] = json.loads(line)
                return found
        time.sleep(0.1)
    raise SystemExit(f"no server: {_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-2000:]


def _load(server: Process, kinds: Sequence[str]) -> Load:
    base = bases.load("dinghy")
    photos = [(f"{number}.png", _photo(number)) for number in range(3)]
    factors = export_diffusers(random_adapter(base, 1, 4))[LORA_FILE]
    workers = {kind: WORKERS[kind] for kind in kinds}
    return Load(server.target, bases.prompts(base)[:8], photos, factors, workers)


def _photo(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (96, 120, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _status(pid: int) -> dict[str, int]:
    """Of a process that may have ended as a zombie: then without its memory."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+)", text, re.MULTILINE)}


def _children(pid: int) -> Iterator[dict[str, int]]:
    """The status of every process that one of its threads started."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            for child in (task / "children").read_text(encoding="utf-8").split():
                yield _status(int(child))


def _links(pid: int) -> Iterator[str]:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            yield str(entry.readlink())
        except FileNotFoundError:
            continue


if __name__ == "__main__":
    main()
