"""The soak benchmark finds a leak, sees flatness, and admits where noise hides which of them it is."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.soak import HALF_A_THING, UNITS, Fit, Process, Verdict, curve, hidden, row_of

SECONDS = [10.0 * number for number in range(180)]
"""Of 30 minutes; a verdict is about the second half of them."""


def verdict(figures: list[float], name: str = "private") -> str:
    samples = [{"seconds": at, name: figure} for at, figure in zip(SECONDS, figures, strict=True)]
    row = row_of(name, samples)
    assert row.met == {"flat": True, "grows": False, "cannot tell": None}[row.extra["verdict"]]
    return row.extra["verdict"]


def noise(spread: float, *, together: int = 1, seed: int = 0) -> np.ndarray:
    """Noise of which `together` samples at a time are the same."""
    drawn = np.random.default_rng(seed).normal(0, spread, len(SECONDS) // together + 1)
    return np.repeat(drawn, together)[: len(SECONDS)]


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_figure_that_stays_is_flat(seed):
    assert verdict(list(800 + noise(4, seed=seed))) == Verdict.FLAT


@pytest.mark.parametrize("seed", range(5))
def test_a_leak_below_the_noise_of_one_sample_is_found(seed):
    leak = np.linspace(0, 50, len(SECONDS))  # 25 MiB in the second half, 3 % of the figure
    assert verdict(list(800 + leak + noise(4, seed=seed))) == Verdict.GROWS


@pytest.mark.parametrize("seed", range(5))
def test_noise_that_could_hide_a_leak_is_not_called_flat(seed):
    assert verdict(list(800 + noise(80, seed=seed))) == Verdict.CANNOT_TELL


@pytest.mark.parametrize("seed", range(5))
def test_samples_that_are_alike_do_not_feign_certainty(seed):
    alone = Fit.of(SECONDS, list(800 + noise(4, seed=seed)))
    together = Fit.of(SECONDS, list(800 + noise(4, together=12, seed=seed)))
    assert together.noise > 2 * alone.noise


def test_growth_that_ended_in_the_first_half_is_warming_up():
    assert verdict([600.0 + min(number, 80) * 3 for number in range(len(SECONDS))]) == Verdict.FLAT


@pytest.mark.parametrize("name", [name for name, unit in UNITS.items() if not unit])
def test_one_thing_leaked_is_found_where_things_are_counted(name):
    one = [12.0 + (number > len(SECONDS) * 3 // 4) for number in range(len(SECONDS))]
    assert verdict(one, name) != Verdict.FLAT
    assert verdict([12.0] * len(SECONDS), name) == Verdict.FLAT
    many = [12.0 + number // 20 for number in range(len(SECONDS))]
    assert verdict(many, name) == Verdict.GROWS


def test_shrinking_is_no_growth():
    assert Fit.of(SECONDS, [900.0 - number for number in range(len(SECONDS))]).verdict(0) == Verdict.FLAT


def test_a_figure_of_nothing_is_flat():
    fit = Fit.of(SECONDS, [0.0] * len(SECONDS))
    assert fit.verdict(HALF_A_THING) == Verdict.FLAT
    assert fit.growth == fit.noise == 0


def test_what_may_hide_is_told_for_each_piece_of_work():
    samples = [dict.fromkeys(UNITS, 10.0) | {"seconds": at} for at in SECONDS]
    for number, sample in enumerate(samples):
        sample["private"] += number / (len(samples) // 2)  # 1 MiB in the second half
    rows = [row_of(name, samples) for name in UNITS]
    assert hidden(rows, 1024.0) == "1.0 MiB (1.0 KiB a piece), 0.00 threads, 0.00 file handles, 0.00 sockets"
    assert hidden(rows, 0.0).startswith("1.0 MiB, ")


def test_a_curve_shows_its_least_and_its_most():
    assert curve([0.0, 7.0, 3.5]).split() == ["▁█▅", "0", "…", "7"]
    assert curve([5.0] * 4).startswith("▁▁▁▁ ")
    assert len(curve(list(map(float, range(1000)))).split()[0]) == 60


PROGRAM = """
import subprocess, sys, threading, time
kept = [open("mooring.db", "a") for _ in range(3)]
child = lambda: subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE).wait()
threading.Thread(target=child, daemon=True).start()
time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the benchmark reads Linux's /proc")
def test_a_process_is_seen_with_its_handles_and_the_children_of_its_threads(tmp_path):
    metrics = tmp_path / "metrics"
    metrics.write_text('mooring_device_bytes{kind="arena"} 2097152.0\nmooring_rpcs_in_flight 0.0\n')
    with subprocess.Popen([sys.executable, "-S", "-c", PROGRAM], cwd=tmp_path) as program:
        try:
            seen = Process(program.pid, "", metrics.as_uri(), tmp_path / "mooring.db")
            deadline = time.monotonic() + 120
            while (sample := seen.sample())["decoders"] != 1 or sample["database connections"] != 3:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            program.kill()
    assert set(sample) == set(UNITS)
    assert sample["threads"] == 2
    assert sample["resident"] > sample["private"] > 1
    assert sample["arena"] == 2
    assert seen.settled() == 0
