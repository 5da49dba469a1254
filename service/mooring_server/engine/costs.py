"""What a pass of the UNet costs, by latent shape and rows: it decides how many rows one pass takes.

A constant batch size is wrong somewhere: one processor gains nothing beyond two rows, a GPU gains up to
dozens. So passes are timed at start-up (`measure`), the figures are kept for the next start (`cached`), and
the passes that really run correct them (`CostTable.observe`). Only the start-up figures are written to the
file: what ran during one day's load would mislead the next start.

Left out: a model of the hardware. Shapes that never ran are scaled by their number of pixels.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mooring_server.engine.ticks import UnetCall, answer

if TYPE_CHECKING:
    from mooring_server.engine.bank import AdapterBank
    from mooring_server.engine.model import BaseModel
    from mooring_server.engine.static_passes import StaticPasses

Shape = tuple[int, int]
"""Latent height and width."""

MAX_SHAPES = 64
MAX_ROW_COUNTS = 64
"""Row counts remembered of one shape."""
NEAR_BEST = 0.95
MIN_ROWS = 2
"""The rows of one guided image, which always has to run."""
_WINDOW = 5
_ENOUGH = 3
"""Figures of which the median counts: one slow pass changes nothing."""
_MIN_SECONDS = 1e-9
_RUNS = 3
_ENOUGH_SECONDS = 0.5
"""Spent on one row count, this is enough for a figure after the second run."""
_GROWTH = 1.02
_FORMAT = 1


class _Observed:
    """What passes of one shape really took."""

    def __init__(self) -> None:
        self.ratios: deque[float] = deque(maxlen=3 * _WINDOW)  # observed over the estimate from start-up
        self.by_rows: OrderedDict[int, deque[float]] = OrderedDict()
        self.curve: tuple[np.ndarray, np.ndarray] | None = None
        self.limit: int | None = None


class CostTable:
    """Seconds of a pass by shape and rows. Owned by the engine thread; never holds more than `MAX_SHAPES`.

    Args:
        native: the shape that was measured.
        seconds: of one pass at the native shape, by rows; all positive and finite.
        max_step_seconds: how long a pass of more than `MIN_ROWS` rows may take.

    Raises:
        ValueError: no figures, or figures that cannot be.
    """

    def __init__(self, native: Shape, seconds: Mapping[int, float], *, max_step_seconds: float) -> None:
        usable = all(rows >= 1 and 0 < value < math.inf for rows, value in seconds.items())
        if not seconds or not usable or min(native) < 1 or not max_step_seconds > 0:
            message = f"no cost table: {native}, {dict(seconds)}, {max_step_seconds}"
            raise ValueError(message)
        self.native = native
        self.max_step_seconds = max_step_seconds
        self._measured = dict(sorted(seconds.items()))
        self._shapes: OrderedDict[Shape, _Observed] = OrderedDict()

    def seconds(self, shape: Shape, rows: int) -> float:
        """Estimate of one pass; never falls as rows grow.

        Between known row counts it is interpolated; beyond the largest, a row costs what it costs there.
        """
        counts, seconds = self._curve(shape)
        return float(self._estimate(counts, seconds, np.array([rows]))[0])

    def limit(self, shape: Shape) -> int:
        """Rows of the pass to aim at: the fewest within 5 % of the best rows per second that is in time.

        In time is a pass of at most `max_step_seconds`. At least `MIN_ROWS`, at most the largest row count
        that was ever timed.
        """
        known = self._shapes.get(shape)
        if known is not None and known.limit is not None:
            return known.limit
        counts, seconds = self._curve(shape)
        rows = np.arange(1, int(counts[-1]) + 1)
        taken = self._estimate(counts, seconds, rows)
        rate = np.where(taken <= self.max_step_seconds, rows / taken, 0.0)
        found = max(MIN_ROWS, int(rows[np.argmax(rate >= NEAR_BEST * rate.max())]))
        if known is not None:
            known.limit = found
        return found

    def observe(self, shape: Shape, rows: int, seconds: float) -> None:
        """Correct the table by a pass that ran.

        The median of the last few of a (shape, rows) replaces the estimate; the median of what they are off
        corrects the row counts of this shape that did not run.
        """
        if not (rows >= 1 and math.isfinite(seconds)):
            return
        seconds = max(seconds, _MIN_SECONDS)
        observed = self._shapes.setdefault(shape, _Observed())
        self._shapes.move_to_end(shape)
        if len(self._shapes) > MAX_SHAPES:
            self._shapes.popitem(last=False)
        observed.ratios.append(seconds / self._scaled(shape, rows))
        observed.by_rows.setdefault(rows, deque(maxlen=_WINDOW)).append(seconds)
        observed.by_rows.move_to_end(rows)
        if len(observed.by_rows) > MAX_ROW_COUNTS:
            observed.by_rows.popitem(last=False)
        observed.curve = observed.limit = None

    # ------------------------------------------------------------------ the file

    def to_json(self) -> dict[str, Any]:
        """The start-up figures, as JSON values."""
        bounded = math.isfinite(self.max_step_seconds)
        return {
            "native": list(self.native),
            "seconds": {str(rows): value for rows, value in self._measured.items()},
            "max_step_seconds": self.max_step_seconds if bounded else None,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CostTable:
        """A table from `to_json`.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is not one.
        """
        height, width = value["native"]
        bound = value["max_step_seconds"]
        return cls(
            (int(height), int(width)),
            {int(rows): float(seconds) for rows, seconds in value["seconds"].items()},
            max_step_seconds=math.inf if bound is None else float(bound),
        )

    # ------------------------------------------------------------------ estimates

    def _scaled(self, shape: Shape, rows: int) -> float:
        """What the start-up figures say, by pixels."""
        counts = np.array(list(self._measured), dtype=float)
        seconds = np.maximum.accumulate(np.array(list(self._measured.values())))
        return float(self._estimate(counts, seconds, np.array([rows]))[0]) * self._pixels(shape)

    def _pixels(self, shape: Shape) -> float:
        return (shape[0] * shape[1]) / (self.native[0] * self.native[1])

    def _curve(self, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
        """Row counts and seconds, both ascending."""
        observed = self._shapes.get(shape)
        if observed is not None and observed.curve is not None:
            return observed.curve
        ratio = self._pixels(shape)
        if observed is not None and len(observed.ratios) >= _ENOUGH:
            ratio *= median(observed.ratios)
        points = {rows: seconds * ratio for rows, seconds in self._measured.items()}
        if observed is not None:
            points |= {
                rows: median(found) for rows, found in observed.by_rows.items() if len(found) >= _ENOUGH
            }
        counts = np.array(sorted(points), dtype=float)
        # noise must not make more rows cheaper than fewer
        curve = counts, np.maximum.accumulate(np.array([points[int(count)] for count in counts]))
        if observed is not None:
            observed.curve = curve
        return curve

    @staticmethod
    def _estimate(counts: np.ndarray, seconds: np.ndarray, rows: np.ndarray) -> np.ndarray:
        beyond = np.maximum(rows / counts[-1], 1.0)
        return np.asarray(np.interp(rows, counts, seconds) * beyond)


@torch.no_grad()
def measure(
    base: BaseModel,
    bank: AdapterBank,
    *,
    max_rows: int = 32,
    max_step_seconds: float,
    row_wise: bool = False,
    prepared: StaticPasses | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> CostTable:
    """Time passes of 1, 2, 4, … rows with adapters at the native size; best of up to three runs each.

    Ends after a pass of more than `MIN_ROWS` rows that takes longer than `max_step_seconds`, or once two
    doublings in a row brought no more rows per second. Runs on the caller's thread, with its torch threads:
    before an engine owns the base.

    Args:
        base: the base model.
        bank: its bank; one slot is used and given back.
        max_rows: largest row count.
        max_step_seconds: of the table.
        row_wise: as the engine will call `BaseModel.predict`.
        prepared: passes that the engine will use; those that are timed are prepared first.
        progress: called with (rows, seconds) after each row count.

    Raises:
        MooringError: QUEUE_FULL when every slot is pinned.
    """
    side = base.native_size // base.vae_scale_factor
    encoded = base.encode_prompt([""])
    slot = bank.reserve()
    seconds: dict[int, float] = {}
    best, stalled, rows = 0.0, 0, 1
    try:
        while rows <= max_rows:
            if prepared is not None:
                prepared.prepare(rows)
            call = UnetCall(
                torch.zeros(rows, base.latent_channels, side, side, device=base.device),
                torch.tensor(base.num_train_timesteps // 2),
                encoded.rows([0] * rows),
                [[(slot, 1.0)]] * rows,
            )
            runs = []
            for _ in range(_RUNS + 1):
                started = time.perf_counter()
                answer(base, bank, [call], row_wise=row_wise, prepared=prepared)
                if base.device.type == "cuda":
                    torch.cuda.synchronize(base.device)
                runs.append(time.perf_counter() - started)
                if len(runs) > 1 and sum(runs) > _ENOUGH_SECONDS:
                    break
            seconds[rows] = max(min(runs[1:]), _MIN_SECONDS)  # the first run of a shape sets things up
            if progress is not None:
                progress(rows, seconds[rows])
            rate = rows / seconds[rows]
            stalled = 0 if rate > _GROWTH * best else stalled + 1
            best = max(best, rate)
            if rows >= MIN_ROWS and (seconds[rows] > max_step_seconds or stalled == 2):
                break
            rows *= 2
    finally:
        bank.release(slot)
    return CostTable((side, side), seconds, max_step_seconds=max_step_seconds)


def cached(path: Path, key: Mapping[str, Any], make: Callable[[], CostTable]) -> CostTable:
    """The table of a file if it was made for the same key, else a new one, which the file then holds.

    Args:
        path: JSON; replaced in one move. A file that cannot be read or written costs only a measurement.
        key: all that the figures depend on, as JSON values.
        make: measures.
    """
    wanted = json.loads(json.dumps(key))
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] == _FORMAT and content["key"] == wanted:
            return CostTable.from_json(content["table"])
    table = make()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": _FORMAT, "key": wanted, "table": table.to_json()}
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                json.dump(content, out, indent=1, allow_nan=False)
            Path(temporary).replace(path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
    return table
