"""Find the critical learning rate along one update direction.

Plain Python on purpose: no torch, no processes, no checkpoints. The caller hands in a
function from eta to loss, so every branch here is tested on formulas with known answers.
The paper's path of doublings and bisections is in `probe.bisection`, the model of the loss that
tells `interpolate` where to look in `probe.interpolation`.
"""

import enum
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from probe.bisection import (
    BisectionPath,
    SearchRange,
    fewest_passes,
    follow_bisection,
    halving_reach,
    is_narrow,
)
from probe.errors import ConfigError, NonFiniteLossError
from probe.interpolation import Point, estimate_crossing, place_probe

Search = Literal["interpolate", "bisect"]

DEFAULT_ETA_INIT = 1e-3
SMALLEST_REL_TOL = 1e-9  # float64 then still resolves the bracket to a part in a million
SMALLEST_ETA, LARGEST_ETA = 1e-30, 1e30  # beyond these eta and eta * delta leave fp32's range
OCTAVES_TO_SNAP_BEYOND = 1.0 + 1e-9  # leaves a guess that is within a factor 2 alone
NUM_PASSES_OVER_BISECT = 2  # what `interpolate` may cost beyond `bisect` at the worst


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
    eta_upper: float  # the eta next above it whose loss was above loss_at_zero; inf if none
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


def find_critical_learning_rate(
    loss_at: Callable[[float], float],
    *,
    eta_init: float | None = DEFAULT_ETA_INIT,
    rel_tol: float = 1 / 16,
    slope: float | None = None,
    loss_at_zero: float | None = None,
    search: Search = "interpolate",
    eta_min: float = 1e-12,
    eta_max: float = 1e6,
    max_forward_passes: int = 40,
) -> LineSearchResult:
    """Bracket the learning rate at which one step first raises the loss.

        eta_c = min { eta > 0 : L(theta - eta * delta) > L(theta) }

    `bisect` is the paper's search: double or halve from eta_init until the loss crosses L(0),
    then bisect (arXiv:2601.16979). `interpolate` looks for the root of
    phi(eta) = (L(eta) - L(0)) / eta, whose value at 0 is `slope`. Both end with the same
    certificate, 1 - eta_lower / eta_upper <= rel_tol.

    On a ray that falls and then rises this is the smallest crossing. On any other ray it is a
    crossing: a step of either search can pass over an earlier one. Where `interpolate` has
    seen several, it reports the lowest one it has narrowed down, and counts the others.

    Args:
        loss_at: Mean loss in nats per token at theta - eta * delta, on one fixed batch.
            Every rank must get the same float (all-reduce first): ranks branch on it.
        eta_init: First eta tried, in [eta_min, eta_max]. Pass the last eta_c; None, what eta_c is
            where a search had no answer, means 1e-3 or the limit next to it.
        rel_tol: Width of the final bracket, in [1e-9, 1).
        slope: dL/d eta at 0 = -delta.g of this batch, in nats per token per eta, where known.
        loss_at_zero: L(0), where already known; else loss_at(0.0) is called first.
        search: "interpolate" or "bisect".
        eta_min: If the loss still rises here, delta is not a descent direction; >= 1e-30.
        eta_max: If the loss has not risen here, there is no crossing; <= 1e30.
        max_forward_passes: Hard limit on calls of loss_at, the one at eta = 0 included.

    Returns:
        The bracket and why the search stopped. A ray without a crossing is an outcome, not an
        error. A loss at eta > 0 that is not finite counts as a rise. With slope >= 0 the outcome
        is `not_a_descent_direction` without a search: no pass, or one where L(0) was not known.

    Raises:
        ConfigError: An argument is out of range or not finite.
        NonFiniteLossError: L(0) is NaN or infinite.

    Cost: `bisect` 5 or 6 passes at the default rel_tol when eta_c is within a factor 2 of
        eta_init, and one more for each further factor 2; `interpolate` about 3, and where
        `bisect` converges never more than 2 passes over it, whatever the loss looks like. One
        more for L(0) where it is not given.
    """
    if eta_init is None:
        eta_init = min(max(DEFAULT_ETA_INIT, eta_min), eta_max)
    search_range = SearchRange(  # floats: a 0-d tensor would not be found again among those tried
        eta_init=float(eta_init),
        eta_min=float(eta_min),
        eta_max=float(eta_max),
        rel_tol=float(rel_tol),
    )
    _check_arguments(search_range, slope, search, max_forward_passes)
    ray = _Ray(loss_at, loss_at_zero, slope)
    if slope is not None and slope >= 0.0:
        return ray.result(SearchOutcome.NOT_A_DESCENT_DIRECTION, rel_tol)
    while True:
        path = follow_bisection(ray.rises, search_range)
        bracket = ray.bracket(rel_tol)
        if is_narrow(*bracket, rel_tol):
            return ray.result(SearchOutcome.CONVERGED, rel_tol)
        if path.next_eta is None and bracket[1] == math.inf:
            return ray.result(SearchOutcome.NO_CROSSING, rel_tol)
        if path.next_eta is None and bracket[0] == 0.0:
            return ray.result(SearchOutcome.NOT_A_DESCENT_DIRECTION, rel_tol)
        if ray.num_forward_passes >= max_forward_passes:
            return ray.result(SearchOutcome.BUDGET_EXHAUSTED, rel_tol)
        if search == "bisect" and path.next_eta is not None:
            ray.measure(path.next_eta)
        else:
            ray.measure(_next_eta(ray, path, search_range))


def _check_arguments(
    search_range: SearchRange, slope: float | None, search: str, max_forward_passes: int
) -> None:
    eta_min, eta_init, eta_max = search_range.eta_min, search_range.eta_init, search_range.eta_max
    if not (SMALLEST_ETA <= eta_min <= eta_init <= eta_max <= LARGEST_ETA):
        raise ConfigError(
            f"need {SMALLEST_ETA} <= eta_min <= eta_init <= eta_max <= {LARGEST_ETA}, found "
            f"eta_min={eta_min}, eta_init={eta_init}, eta_max={eta_max}"
        )
    if not SMALLEST_REL_TOL <= search_range.rel_tol < 1.0:
        raise ConfigError(
            f"rel_tol must lie in [{SMALLEST_REL_TOL}, 1), found {search_range.rel_tol}; "
            "the paper uses 1/16"
        )
    if slope is not None and not math.isfinite(slope):
        raise ConfigError(
            f"slope must be finite, found {slope}; check the gradient and the update direction "
            "for NaN, or pass None to search without it"
        )
    if search not in get_args(Search):
        raise ConfigError(f"search must be one of {get_args(Search)}, found {search!r}")
    if max_forward_passes < 1:
        raise ConfigError(f"max_forward_passes must be at least 1, found {max_forward_passes}")


class _Ray:
    """The losses seen along one ray, in the order tried, and what they say."""

    def __init__(
        self, loss_at: Callable[[float], float], loss_at_zero: float | None, slope: float | None
    ) -> None:
        self._loss_at = loss_at
        self.num_forward_passes = 0
        if loss_at_zero is None:
            loss_at_zero = float(loss_at(0.0))
            self.num_forward_passes = 1
        self.loss_at_zero = float(loss_at_zero)
        if not math.isfinite(self.loss_at_zero):
            raise NonFiniteLossError(
                f"the loss at eta = 0 is {self.loss_at_zero}; check the checkpoint and the batch"
            )
        self.slope = None if slope is None else float(slope)
        self.losses: dict[float, float] = {}
        self.rises: dict[float, bool] = {}

    def measure(self, eta: float) -> None:
        """Spend one forward pass on an eta > 0 not tried before."""
        loss = float(self._loss_at(eta))
        self.num_forward_passes += 1
        self.losses[eta] = loss
        # nan > x is False, so without the second test a diverged step would pass for a good one.
        self.rises[eta] = loss > self.loss_at_zero or not math.isfinite(loss)

    def bracket(self, rel_tol: float) -> tuple[float, float]:
        """The lowest crossing narrowed down to rel_tol; before there is one, the lowest seen."""
        etas = sorted(self.rises)
        for lower, upper in itertools.pairwise(etas):
            if not self.rises[lower] and self.rises[upper] and is_narrow(lower, upper, rel_tol):
                return lower, upper
        upper = next((eta for eta in etas if self.rises[eta]), math.inf)
        lower = max((eta for eta in etas if eta < upper), default=0.0)
        return lower, upper

    def points(self) -> list[Point]:
        """(eta, phi) in order of eta, with (0, slope) first where the slope is known."""
        known = [] if self.slope is None else [(0.0, self.slope)]
        for eta, loss in sorted(self.losses.items()):
            phi = (loss - self.loss_at_zero) / eta
            if math.isfinite(phi):
                known.append((eta, phi))
        return known

    def result(self, outcome: SearchOutcome, rel_tol: float) -> LineSearchResult:
        lower, upper = self.bracket(rel_tol)
        signs = [False] + [self.rises[eta] for eta in sorted(self.rises)]
        num_sign_changes = sum(a != b for a, b in itertools.pairwise(signs))
        bracketed = lower > 0.0 and upper < math.inf
        return LineSearchResult(
            outcome=outcome,
            eta_lower=lower,
            eta_upper=upper,
            eta_interpolated=estimate_crossing(self.points(), lower, upper) if bracketed else None,
            loss_at_zero=self.loss_at_zero,
            slope=self.slope,
            num_forward_passes=self.num_forward_passes,
            trials=tuple(self.losses.items()),
            num_extra_sign_changes=max(0, num_sign_changes - 1),
        )


def _next_eta(ray: _Ray, path: BisectionPath, search_range: SearchRange) -> float:
    """Where `interpolate` probes next: where the model says, as far as the safeguard allows.

    The safeguard keeps one of two conditions true after every pass, for any loss whatever:

    - all passes but NUM_PASSES_OVER_BISECT lie on bisect's own path, so following it ends in time;
    - or halving our own bracket from here ends, at the worst, no later than that many passes
      after the soonest end that the answers so far leave open to bisect.
    """
    if path.next_eta == search_range.eta_init:
        return search_range.eta_init
    rel_tol = search_range.rel_tol
    wanted = _wanted_eta(ray, path, search_range)
    num_probes = len(ray.losses)
    num_off_path = num_probes - path.num_steps
    if path.next_eta is not None and num_off_path < NUM_PASSES_OVER_BISECT:
        return wanted
    lower, upper = ray.bracket(rel_tol)
    if lower > 0.0 and upper < math.inf:
        deadline = fewest_passes(path, search_range) + NUM_PASSES_OVER_BISECT
        reach = halving_reach(deadline - (num_probes + 1), rel_tol)
        if upper / reach <= lower * reach:
            return min(max(wanted, upper / reach), lower * reach)
    if path.next_eta is not None and num_off_path <= NUM_PASSES_OVER_BISECT:
        return path.next_eta
    return 0.5 * (lower + upper)


def _wanted_eta(ray: _Ray, path: BisectionPath, search_range: SearchRange) -> float:
    """The model's choice, or where there is none the natural next step of the bracket at hand."""
    lower, upper = ray.bracket(search_range.rel_tol)
    estimate = estimate_crossing(ray.points(), lower, upper)
    bracketed = lower > 0.0 and upper < math.inf
    if estimate is None:
        if path.next_eta is not None and lower < path.next_eta < upper:
            return path.next_eta
        probe = 0.5 * (lower + upper) if bracketed else (2.0 * lower or 0.5 * upper)
    else:
        # Nearly parallel points place it anywhere up to infinity; beyond the limits all is alike.
        within = min(max(estimate, 0.5 * search_range.eta_min), 2.0 * search_range.eta_max)
        probe = place_probe(within, lower, upper, search_range.rel_tol)
        octaves = math.log2(within / search_range.eta_init)
        if not bracketed and abs(octaves) > OCTAVES_TO_SNAP_BEYOND:
            probe = _snap_to_path(probe, lower, upper, search_range.eta_init)
    probe = min(max(probe, search_range.eta_min), search_range.eta_max)
    # Only at eta_min or eta_max can the probe be one already made.
    if probe in ray.rises and path.next_eta is not None:
        return path.next_eta
    return probe


def _snap_to_path(probe: float, lower: float, upper: float, eta_init: float) -> float:
    """A far probe moved onto bisect's grid of doublings and halvings.

    Extrapolation over more than a factor 2 is too rough for the place to matter, and a probe on
    the path is one the safeguard need not charge for when the path comes by.
    """
    snapped = eta_init * 2.0 ** round(math.log2(probe / eta_init))
    return snapped if lower < snapped < upper else probe
