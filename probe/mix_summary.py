"""What the searches of a mix scan come to: points per ratio and task, sweet spot, crossings."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from probe.line_search import SearchOutcome
from probe.result_mix import (
    MixCrossing,
    MixMeasurement,
    MixPoint,
    MixScan,
    MixSweetSpot,
    MixUnitResult,
    MixUnitSummary,
)
from probe.sweet_spot import find_crossings, find_sweet_spot, typical


def summarise_scans(results: Iterable[MixUnitResult]) -> list[MixScan]:
    """One scan per checkpoint, whether its ratios came in one unit or in several.

    Args:
        results: Of one job, in unit order; a job that is not finished gives the ratios so far.
    """
    by_checkpoint: dict[str, list[MixUnitResult]] = {}
    for result in results:
        key = result.unit.checkpoint_ref.model_dump_json()
        by_checkpoint.setdefault(key, []).append(result)
    return [_scan(units) for units in by_checkpoint.values()]


def summarise_unit(result: MixUnitResult) -> MixUnitSummary:
    """One unit in a few numbers: its sweet spot, or its tasks where it has a single ratio."""
    scan = _scan([result])
    ratios = {m.ratio for m in result.measurements}
    is_single = len(ratios) == 1
    return MixUnitSummary(
        ratio=result.unit.ratio,
        num_ratios=len(ratios),
        num_searches=len(result.measurements),
        outcomes=dict(Counter(m.outcome.value for m in result.measurements)),
        points=scan.points if is_single else [],
        sweet_spot=None if is_single else scan.sweet_spot,
    )


def _scan(units: Sequence[MixUnitResult]) -> MixScan:
    measurements = [m for unit in units for m in unit.measurements]
    tasks = list(dict.fromkeys(m.task for m in measurements))
    ratios = sorted({m.ratio for m in measurements})
    cells = {
        (ratio, task): [m for m in measurements if m.ratio == ratio and m.task == task]
        for ratio in ratios
        for task in tasks
    }
    table = eta_table(measurements)
    spot = find_sweet_spot(ratios, table) if table else None
    curves = [
        {task: typical([eta_of(m) for m in cells[ratio, task]]) for task in tasks}
        for ratio in ratios
    ]
    first = units[0]
    mixture = first.spec["mixture"]
    return MixScan(
        checkpoint=first.unit.checkpoint_ref.label,
        step=first.unit.checkpoint_ref.step,
        varied=mixture["varied"] or mixture["sources"][0]["name"],
        points=[_point(ratio, task, cell) for (ratio, task), cell in cells.items()],
        sweet_spot=spot
        and MixSweetSpot(
            ratio=spot.ratio,
            eta_c=spot.eta_c,
            lambda_c=2.0 / spot.eta_c,
            task=spot.task,
            lower=spot.lower,
            upper=spot.upper,
        ),
        no_sweet_spot_reason=None if spot else _why_none(curves, complete=bool(table)),
        crossings=[
            MixCrossing(ratio=c.ratio, tasks=c.tasks, lambda_c=2.0 / c.eta_c)
            for c in find_crossings(ratios, curves)
        ],
    )


def eta_of(measurement: MixMeasurement) -> float:
    """eta_c as the sweet spot counts it: 0 for a step that hurts at once, inf without crossing.

    A search that ran out of passes counts by what it is sure of: the largest eta that did no harm.
    """
    if measurement.eta_c is not None:
        return measurement.eta_c
    if measurement.outcome is SearchOutcome.NOT_A_DESCENT_DIRECTION:
        return 0.0
    return math.inf if measurement.eta_upper is None else measurement.eta_lower


def eta_table(measurements: Sequence[MixMeasurement]) -> list[list[dict[str, float]]]:
    """For each repeat that is complete, for each ratio, ascending, eta_c of every task."""
    ratios = sorted({m.ratio for m in measurements})
    tasks = {m.task for m in measurements}
    by_place = {(m.repeat, m.ratio, m.task): eta_of(m) for m in measurements}
    table = []
    for repeat in sorted({m.repeat for m in measurements}):
        row = [
            {t: by_place[repeat, r, t] for t in sorted(tasks) if (repeat, r, t) in by_place}
            for r in ratios
        ]
        if all(len(at) == len(tasks) for at in row):
            table.append(row)
    return table


def _point(ratio: float, task: str, cell: Sequence[MixMeasurement]) -> MixPoint:
    found = [m.lambda_c for m in cell if m.lambda_c is not None]
    converged = [m for m in cell if m.lambda_c is not None]
    lowest = max((m.eta_upper for m in converged if m.eta_upper is not None), default=None)
    highest = min((m.eta_lower for m in converged if m.eta_lower > 0), default=None)
    slopes = [m.slope for m in cell if m.slope is not None]
    eta_c = typical([eta_of(m) for m in cell])
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    return MixPoint(
        ratio=ratio,
        task=task,
        num_repeats=len(cell),
        num_converged=len(found),
        outcomes=dict(Counter(m.outcome.value for m in cell)),
        lambda_c_mean=statistics.fmean(found) if found else None,
        lambda_c_standard_error=error,
        lambda_c_lower=None if lowest is None else 2.0 / lowest,
        lambda_c_upper=None if highest is None else 2.0 / highest,
        eta_c_median=eta_c if math.isfinite(eta_c) else None,
        slope_mean=statistics.fmean(slopes) if slopes else None,
        loss_at_zero=statistics.fmean(m.loss_at_zero for m in cell),
        num_forward_passes=sum(m.num_forward_passes for m in cell),
    )


def _why_none(curves: Sequence[dict[str, float]], *, complete: bool) -> str:
    if not complete:
        return "no repeat is complete at every ratio yet"
    if any(min(at.values()) == math.inf for at in curves):
        return "at some ratio no task objected within eta_max, so no largest step is known"
    return "at every ratio the first step already raises the loss of at least one task"
