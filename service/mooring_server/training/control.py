"""Drift during training and at its end: cheap measurements, calibrated by exact ones, and the final back-off.

At first the drift grows by a power of the step: measured at steps that lie a constant factor apart, it grows
by about the same factor between any two measurements, and the controller sees it coming. Once those steps lie
further apart than the regular interval, the regular interval takes over.

During training a fixed window of the probe is measured every few steps. A fixed window has a bias (its points
are not all points) but little variance from one measurement to the next, which is what a controller needs;
at a quarter, half and three quarters of the run the whole probe is measured as well, and the ratio of the two
corrects the window from then on.

At the end the whole probe is measured. When it is above the budget, the update is scaled down by the s that
brings it to the budget. Drift is quadratic in s to first order (ΔW enters linearly, P&P's ablation finds
‖Δε‖/‖ΔW‖ constant within 10 %), so √(ρ/D) is nearly right at once and a secant on √D finishes in one or two
measurements. An update is never scaled up: what was not learnt cannot be had by amplification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

from mooring_server.engine.bank import TrainingSlot
from mooring_server.evaluation.probe import DriftProbe, DriftResult

BACKOFF_TOLERANCE = 0.02
"""The back-off stops within [(1 - tolerance)·ρ, ρ]."""
MAX_BACKOFF_MEASUREMENTS = 12
EARLY_FACTOR = 1.25
"""Between two early measurements."""
CALIBRATION_SHARES = (0.25, 0.5, 0.75)


@dataclass
class DriftGauge:
    """Estimates the whole probe's drift from one fixed window of it.

    Args:
        probe: the whole probe.
        points: size of the window.
        correction: whole-probe drift over window drift, at the last calibration.
    """

    probe: DriftProbe
    points: int
    correction: float = 1.0

    @property
    def window(self) -> slice:
        """The points that are measured during training."""
        return self.probe.window(0, self.points)

    def estimate(self, slot: TrainingSlot) -> Generator[None, None, float]:
        """Drift now, from the window. One yield a tick."""
        result = yield from self.probe.measure(slot, subset=self.window)
        return result.drift * self.correction

    def calibrate(self, slot: TrainingSlot) -> Generator[None, None, float]:
        """Drift now, from the whole probe; corrects later estimates. One yield a tick."""
        whole = yield from self.probe.measure(slot)
        window = whole.over(self.window)
        if window > 0.0 and whole.drift > 0.0:
            self.correction = whole.drift / window
        return whole.drift


def early_steps(every: int) -> frozenset[int]:
    """Steps after which drift is measured before steps `EARLY_FACTOR` apart lie `every` apart."""
    found, step = {1}, 1
    while (following := max(step + 1, int(step * EARLY_FACTOR))) - step < every:
        step = following
        found.add(step)
    return frozenset(found)


def calibration_steps(steps: int, every: int) -> frozenset[int]:
    """Steps (multiples of `every`) after which the window is calibrated."""
    return frozenset(every * max(1, round(steps * share / every)) for share in CALIBRATION_SHARES)


def back_off(
    measure: Callable[[float], Generator[None, None, DriftResult]], budget: float
) -> Generator[None, None, tuple[float, DriftResult]]:
    """The largest scale s ≤ 1 found at which the drift keeps to the budget.

    Args:
        measure: drift of the update scaled by s.
        budget: ρ.

    Returns:
        s and the measurement at s; its drift is ≤ ρ, and ≥ (1 - tolerance)·ρ unless s is 1.
    """
    result = yield from measure(1.0)
    if result.drift <= budget:
        return 1.0, result
    aim = math.sqrt(budget * (1 - BACKOFF_TOLERANCE / 2))
    low, at_low, low_result = 0.0, 0.0, None  # √drift is 0 at s = 0, and ≤ aim at `low` always
    high, at_high = 1.0, math.sqrt(result.drift)
    for _ in range(MAX_BACKOFF_MEASUREMENTS):
        scale = low + (high - low) * (aim - at_low) / (at_high - at_low)
        result = yield from measure(scale)
        if budget * (1 - BACKOFF_TOLERANCE) <= result.drift <= budget:
            return scale, result
        if result.drift > budget:
            high, at_high = scale, math.sqrt(result.drift)
        else:
            low, at_low, low_result = scale, math.sqrt(result.drift), result
    if low_result is None:  # a curve far from quadratic: halve until it fits
        scale = high
        while result.drift > budget:
            scale /= 2
            result = yield from measure(scale)
        return scale, result
    return low, low_result
