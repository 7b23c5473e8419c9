"""The paper's search as a path: which eta comes next, given which ones are known to rise.

`probe.line_search` walks this path for `search="bisect"`, and keeps to within two passes of it
for `search="interpolate"`. Nothing here evaluates a loss.
Source: arXiv:2601.16979, the search for the critical learning rate.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRange:
    """Where a search starts, between which eta it stays and how narrow it must end."""

    eta_init: float  # first eta tried
    eta_min: float  # the last eta tried when every loss has risen
    eta_max: float  # the last eta tried when no loss has risen
    rel_tol: float  # a bracket is narrow when 1 - eta_lower / eta_upper <= rel_tol


@dataclass(frozen=True, slots=True, kw_only=True)
class BisectionPath:
    """How far the known losses take the paper's search, and what it would ask for next."""

    eta_lower: float  # 0 when every step so far rose
    eta_upper: float  # inf when no step so far rose
    num_steps: int  # steps whose answer is known
    next_eta: float | None  # the step whose answer is not known; None at the end of the path


def is_narrow(eta_lower: float, eta_upper: float, rel_tol: float) -> bool:
    """Whether the bracket is the certificate asked for: 1 - eta_lower / eta_upper <= rel_tol."""
    return eta_lower > 0.0 and eta_upper < math.inf and 1.0 - eta_lower / eta_upper <= rel_tol


def follow_bisection(rises: Mapping[float, bool], search_range: SearchRange) -> BisectionPath:
    """Walk from eta_init through every eta whose answer is in `rises`.

    Double while the loss does not rise, or halve while it does, down to eta_min or up to
    eta_max, both tried; then bisect until the bracket is narrow.

    Args:
        rises: eta -> whether L(eta) > L(0), for every eta tried so far.
        search_range: Start, limits and tolerance.

    Returns:
        The path so far. At its end, eta_upper = inf means that no loss rose up to eta_max and
        eta_lower = 0 that every loss rose down to eta_min.
    """
    eta_lower, eta_upper, num_steps = 0.0, math.inf, 0
    while True:
        next_eta = _step(eta_lower, eta_upper, search_range)
        if next_eta is None or next_eta not in rises:
            return BisectionPath(
                eta_lower=eta_lower, eta_upper=eta_upper, num_steps=num_steps, next_eta=next_eta
            )
        num_steps += 1
        if rises[next_eta]:
            eta_upper = next_eta
        else:
            eta_lower = next_eta


def _step(eta_lower: float, eta_upper: float, search_range: SearchRange) -> float | None:
    if eta_lower == 0.0 and eta_upper == math.inf:
        return search_range.eta_init
    if eta_upper == math.inf:
        up = min(2.0 * eta_lower, search_range.eta_max)
        return up if up > eta_lower else None
    if eta_lower == 0.0:
        down = max(0.5 * eta_upper, search_range.eta_min)
        return down if down < eta_upper else None
    if is_narrow(eta_lower, eta_upper, search_range.rel_tol):
        return None
    return 0.5 * (eta_lower + eta_upper)


def halving_reach(num_halvings: int, rel_tol: float) -> float:
    """Largest eta_upper / eta_lower that so many halvings make narrow, whichever half is kept.

    The width is the same whichever half is kept, and 1 - lower/upper is largest when it is
    always the lower one: upper - lower <= 2^n rel_tol / (1 - rel_tol) lower.
    """
    # Short of the bound by more than the midpoints' rounding.
    return 1.0 + (1.0 - 1e-6) * 2.0**num_halvings * rel_tol / (1.0 - rel_tol)


def fewest_bisections(eta_lower: float, eta_upper: float, rel_tol: float) -> int:
    """Halvings until the bracket is narrow when the upper half is always the one kept."""
    num_halvings = 0
    while not is_narrow(eta_lower, eta_upper, rel_tol):
        eta_lower = 0.5 * (eta_lower + eta_upper)
        num_halvings += 1
    return num_halvings


def fewest_passes(path: BisectionPath, search_range: SearchRange) -> int:
    """A lower bound, over every loss that agrees with the known answers, on the path's length.

    The next doubling or halving may be the one that brackets a crossing, and the bisection may
    then keep the upper half each time; or the path may run into eta_min or eta_max first.
    """
    if path.next_eta is None:
        return path.num_steps
    rel_tol = search_range.rel_tol
    if path.eta_lower > 0.0 and path.eta_upper < math.inf:
        return path.num_steps + fewest_bisections(path.eta_lower, path.eta_upper, rel_tol)
    if path.eta_upper < math.inf:
        steps_to_limit = math.log2(path.eta_upper / search_range.eta_min)
        num_bisections = fewest_bisections(path.next_eta, path.eta_upper, rel_tol)
    elif path.eta_lower > 0.0:
        steps_to_limit = math.log2(search_range.eta_max / path.eta_lower)
        num_bisections = fewest_bisections(path.eta_lower, path.next_eta, rel_tol)
    else:
        return 1
    return path.num_steps + max(1, min(1 + num_bisections, math.ceil(steps_to_limit)))
