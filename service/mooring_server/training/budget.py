"""The drift budget controller: from "how much may the base move" to a penalty strength λ.

Dual ascent for the constraint D ≤ ρ (constrained diffusion by dual training, arXiv 2408.15094), in the
logarithm of λ because the λ that is needed ranges over many orders of magnitude between bases:

    log λ += η · (e + τ·Δe),   e = clip(log(EMA(D)/ρ), ±E)

The error is a log ratio rather than D/ρ - 1: both agree near the budget, but a run at a tenth of its budget
and a run at ten times it are then equally far off. The second term (a controller of the "velocity" form
with proportional gain η·τ) answers to the *speed* of the drift. Drift is an integrator of the training
steps: without that term λ would go on rising until the drift is back at ρ, and oscillate.

λ starts from a measurement, not from a guess. Scaling the whole update by (1+h) changes the loss by
h·⟨∇L, B⟩ and the penalty by h·2λP, as P is quadratic in B; they cancel at the *balance strength*
-⟨∇L, B⟩/(2P), the λ at which the update would stop growing. The controller sleeps with λ = 0 until the drift
comes into sight of the budget (`ENGAGE`·ρ), then starts from the balance strength.

Anti-windup: λ is clamped to a fixed range around the starting strength, increments are not accumulated
beyond the clamp, and the error is clipped.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ControllerGains:
    """Constants of the controller; the defaults are what docs/method.md measures.

    Args:
        rate: η, integral gain per update.
        damping: τ, updates; proportional gain is rate·damping.
        smoothing: weight of the newest measurement in the EMA, 0–1.
        engage: share of the budget at which control starts.
        error_limit: E, largest |log ratio| that one update sees.
        span: λ stays within [start/span, start·span].
    """

    rate: float = 0.25
    damping: float = 4.0
    smoothing: float = 0.6
    engage: float = 0.6
    error_limit: float = 1.0
    span: float = 1e4


class BudgetController:
    """Steers measured drift to a budget. Pure: its state is four numbers, no clock, no randomness.

    Args:
        target: drift to steer to, > 0.
        gains: constants.

    Raises:
        ValueError: when the target is not positive and finite.
    """

    def __init__(self, target: float, gains: ControllerGains | None = None) -> None:
        if not (math.isfinite(target) and target > 0):
            raise ValueError(f"the drift to steer to must be positive and finite, not {target}")
        self.target = target
        self.gains = gains or ControllerGains()
        self._log_start: float | None = None
        self._log_strength = -math.inf
        self._ema: float | None = None
        self._error = 0.0

    @property
    def strength(self) -> float:
        """λ now; 0 before the drift has come near the budget."""
        return math.exp(self._log_strength)

    @property
    def engaged(self) -> bool:
        """Whether λ is being steered yet."""
        return self._log_start is not None

    @property
    def smoothed_drift(self) -> float:
        """EMA of the measurements, 0 before the first."""
        return self._ema or 0.0

    def update(self, drift: float, balance: float) -> float:
        """Take one measurement.

        Args:
            drift: measured drift ≥ 0, in units of the base's guidance energy.
            balance: balance strength (module docstring) at the moment; used once, when control starts.
                A value that is not positive and finite postpones the start, unless the budget is reached.

        Returns:
            The new λ.

        Raises:
            ValueError: when the drift is negative or not finite: a diverged run must be stopped, not
                steered.
        """
        if not (math.isfinite(drift) and drift >= 0):
            raise ValueError(f"drift must be finite and not negative, not {drift}")
        g = self.gains
        self._ema = drift if self._ema is None else g.smoothing * drift + (1 - g.smoothing) * self._ema
        ratio = max(self._ema / self.target, 1e-12)
        error = max(-g.error_limit, min(g.error_limit, math.log(ratio)))
        if self._log_start is None:
            usable = math.isfinite(balance) and balance > 0
            if ratio >= g.engage and (usable or ratio >= 1.0):
                self._log_start = self._log_strength = math.log(balance) if usable else 0.0
            self._error = error
            return self.strength
        step = g.rate * (error + g.damping * (error - self._error))
        reach = math.log(g.span)
        self._log_strength = max(
            self._log_start - reach, min(self._log_start + reach, self._log_strength + step)
        )
        self._error = error
        return self.strength

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        return {
            "target": self.target,
            "gains": asdict(self.gains),
            "log_start": self._log_start,
            "log_strength": None if math.isinf(self._log_strength) else self._log_strength,
            "ema": self._ema,
            "error": self._error,
        }

    @staticmethod
    def from_state(state: dict[str, Any]) -> BudgetController:
        """Continue from `state_dict`, bit for bit."""
        controller = BudgetController(float(state["target"]), ControllerGains(**state["gains"]))
        controller._log_start = state["log_start"]
        log_strength = state["log_strength"]
        controller._log_strength = -math.inf if log_strength is None else log_strength
        controller._ema = state["ema"]
        controller._error = state["error"]
        return controller
