"""What a mix scan comes to, in words and as a grid, for tables and pages (torch-free)."""

from collections.abc import Sequence
from itertools import groupby

from probe.result_mix import MixCrossing, MixPoint, MixScan


def grid(scan: MixScan) -> list[tuple[float, list[MixPoint]]]:
    """The points of every ratio, ascending, in the order of tasks."""
    return [(ratio, list(points)) for ratio, points in groupby(scan.points, lambda p: p.ratio)]


def tasks_of(scan: MixScan) -> list[str]:
    """The scan's tasks in the spec's order."""
    return list(dict.fromkeys(point.task for point in scan.points))


def outcome_words(point: MixPoint) -> str:
    """Why a point has no answer: `not descended` for a step that hurts the task at once."""
    words = {"not_a_descent_direction": "not descended"}
    return ", ".join(
        words.get(outcome, outcome.replace("_", " "))
        for outcome, count in point.outcomes.items()
        if count and outcome != "converged"
    )


def sweet_spot_sentence(scan: MixScan) -> str:
    """The sweet spot with its interval, or why there is none."""
    spot = scan.sweet_spot
    if spot is None:
        return f"no sweet spot: {scan.no_sweet_spot_reason}"
    interval = ""
    if spot.lower is not None and spot.upper is not None:
        interval = f" (90 % of bootstraps: {spot.lower:.3g} to {spot.upper:.3g})"
    return (
        f"sweet spot: {spot.ratio:.3g} {scan.varied}{interval}; {spot.task} objects first, at "
        f"lambda_c {spot.lambda_c:.4g} (eta {spot.eta_c:.3g})"
    )


def crossing_sentences(crossings: Sequence[MixCrossing]) -> list[str]:
    """One sentence per crossing."""
    return [
        f"{c.tasks[0]} and {c.tasks[1]} cross at {c.ratio:.3g}, lambda_c {c.lambda_c:.4g}: below "
        f"it {c.tasks[0]} is the sharper one"
        for c in crossings
    ]
