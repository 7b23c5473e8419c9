"""Find the critical learning rate along one update direction.

Plain Python on purpose: no torch, no processes, no checkpoints. The caller hands in a
function from eta to loss, so every branch here is tested on formulas with known answers.
"""

import enum
from dataclasses import dataclass
from typing import Literal

Search = Literal["interpolate", "bisect"]


class SearchOutcome(enum.StrEnum):
    """Why the search stopped. The values are stored in results, so never rename one."""

    CONVERGED = "converged"
    NOT_A_DESCENT_DIRECTION = "not_a_descent_direction"  # slope >= 0, or a rise at every eta tried
    NO_CROSSING = "no_crossing"  # the loss had not risen by eta_max
    BUDGET_EXHAUSTED = "budget_exhausted"  # still bracketing or narrowing at the pass limit


@dataclass(frozen=True, slots=True, kw_only=True)
class LineSearchResult:
    """The bracket around eta_c, and why the search stopped."""

    outcome: SearchOutcome
    eta_lower: float  # largest eta below eta_upper whose loss was not above loss_at_zero; 0 if none
    eta_upper: float  # smallest eta tried whose loss was above loss_at_zero; inf if none
    eta_interpolated: float | None  # the model's own estimate of the crossing, inside the bracket
    loss_at_zero: float  # nats per token
    slope: float | None  # dL/d eta at 0 = -delta.g, where the caller knew it
    num_forward_passes: int  # calls of loss_at, the one at eta = 0 included when it was needed
    trials: tuple[tuple[float, float], ...]  # (eta, loss) in the order tried, eta = 0 left out
    num_extra_sign_changes: int  # sign changes of L(eta) - L(0) seen beyond the reported crossing

    @property
    def eta_c(self) -> float | None:
        """Critical learning rate: the bracket's midpoint, or None unless converged."""
        if self.outcome is not SearchOutcome.CONVERGED:
            return None
        return 0.5 * (self.eta_lower + self.eta_upper)

    @property
    def lambda_c(self) -> float | None:
        """Critical sharpness 2 / eta_c, in 1 / eta, or None unless converged."""
        eta_c = self.eta_c
        return None if eta_c is None else 2.0 / eta_c
