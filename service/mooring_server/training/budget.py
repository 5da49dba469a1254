"""The drift budget controller: from "how much may the base move" to a penalty strength λ.

Dual ascent for the constraint D ≤ ρ (constrained diffusion by dual training, arXiv 2408.15094), in the
logarithm of λ because the λ that is needed ranges over many orders of magnitude between bases:

    log λ += η · (e·Δt + τ·Δe),   e = clip(log(D/ρ), ±E)

with Δt the time since the last measurement in units of the regular interval. The error is a log ratio rather
than D/ρ - 1: both agree near the budget, but a run at a tenth of its budget and a run at ten times it are
then equally far off. The second term (a controller of the "velocity" form with proportional gain η·τ) answers
to the *speed* of the drift. Drift is an integrator of the training steps: without that term λ would go on
rising until the drift is back at ρ, and oscillate.

The measurements are not smoothed. They are taken at the same points every time, so they carry no sampling
noise that averaging could remove; the average would only be late, and a late controller oscillates.

λ starts from a measurement, not from a guess: at the *balance strength* ‖∇L‖ / ‖∇P‖, where the penalty pulls
as hard as one batch's loss does (the norms' ratio also sets the weight of VQGAN's adversarial term, arXiv
2012.09841, eq. 7). The norm of one batch's gradient and not of its mean is what counts, because Adam divides
by it: a penalty that is small beside it is drowned, whatever its direction. The controller sleeps with λ = 0
until the drift comes into sight of the budget (`ENGAGE`·ρ): early, since drift grows like the third or fourth
power of the step at first, and what has grown unpenalised spreads over directions that a penalty must undo.

Anti-windup: λ is clamped to a range around the balance strength of the moment, where a smaller one does
nothing and a larger one does nothing more; increments are not accumulated beyond the clamp, and the error is
clipped. The nearer the budget, the higher the lower end: floor·(D/ρ)²·balance. In a slow run λ falls while
the drift is still far below the budget; without that end it would have to climb back from nowhere when the
drift arrives.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ControllerGains:
    """Constants of the controller; the defaults are what docs/method.md measures.

    Args:
        rate: η, integral gain per regular interval.
        damping: τ, regular intervals; proportional gain is rate·damping.
        engage: share of the budget at which control starts.
        error_limit: E, largest |log ratio| that one update sees.
        span: λ stays within [balance/span, balance·span].
        floor: lower end of λ / balance at the budget.
    """

    rate: float = 0.35
    damping: float = 3.5
    engage: float = 0.05
    error_limit: float = 1.0
    span: float = 30.0
    floor: float = 0.5


class BudgetController:
    """Steers measured drift to a budget. Pure: its state is three numbers, no clock, no randomness.

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
        self._log_balance: float | None = None
        self._log_strength = -math.inf
        self._error = 0.0

    @property
    def strength(self) -> float:
        """λ now; 0 before the drift has come near the budget."""
        return math.exp(self._log_strength)

    @property
    def engaged(self) -> bool:
        """Whether λ is being steered yet."""
        return self._log_balance is not None

    def update(self, drift: float, balance: float, elapsed: float = 1.0) -> float:
        """Take one measurement.

        Args:
            drift: measured drift ≥ 0, in units of the base's guidance energy.
            balance: balance strength (module docstring) at the moment. Where it is not positive and finite
                the last one stays, and control does not start unless the budget is reached.
            elapsed: time since the last measurement, in regular intervals.

        Returns:
            The new λ.

        Raises:
            ValueError: when the drift is negative or not finite: a diverged run must be stopped, not
                steered.
        """
        if not (math.isfinite(drift) and drift >= 0):
            raise ValueError(f"drift must be finite and not negative, not {drift}")
        g = self.gains
        ratio = max(drift / self.target, 1e-12)
        error = max(-g.error_limit, min(g.error_limit, math.log(ratio)))
        usable = math.isfinite(balance) and balance > 0
        if self._log_balance is None:
            if ratio >= g.engage and (usable or ratio >= 1.0):
                self._log_balance = self._log_strength = math.log(balance) if usable else 0.0
            self._error = error
            return self.strength
        if usable:
            self._log_balance = math.log(balance)
        step = g.rate * (error * elapsed + g.damping * (error - self._error))
        reach = math.log(g.span)
        nearness = 2 * math.log(min(1.0, ratio))
        lowest = self._log_balance + max(-reach, math.log(g.floor) + nearness)
        highest = self._log_balance + reach
        self._log_strength = max(lowest, min(highest, self._log_strength + step))
        self._error = error
        return self.strength

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        return {
            "target": self.target,
            "gains": asdict(self.gains),
            "log_balance": self._log_balance,
            "log_strength": None if math.isinf(self._log_strength) else self._log_strength,
            "error": self._error,
        }

    @staticmethod
    def from_state(state: dict[str, Any]) -> BudgetController:
        """Continue from `state_dict`, bit for bit."""
        controller = BudgetController(float(state["target"]), ControllerGains(**state["gains"]))
        controller._log_balance = state["log_balance"]
        log_strength = state["log_strength"]
        controller._log_strength = -math.inf if log_strength is None else log_strength
        controller._error = state["error"]
        return controller
