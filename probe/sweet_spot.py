"""The share of a data source that leaves the largest step no task objects to (torch-free).

    sweet spot = argmax over ratios r of  min over tasks  eta_c^{task <- mix(r)}

Where the least eta_c belongs to one task on the left and to another on the right, the curves cross
there: `crossings` lists all such points, also those away from the sweet spot.
"""

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

EtaByTask = Mapping[str, float]  # task -> eta_c; 0: not a descent direction, inf: no crossing seen
NUM_RESAMPLES = 2000
LEVEL = 0.9  # of the bootstrap interval


@dataclass(frozen=True, slots=True)
class Crossing:
    """Two tasks' curves meet between two neighbouring ratios."""

    ratio: float  # where the straight lines of log eta_c meet
    tasks: tuple[str, str]  # the first is the sharper one at smaller ratios
    eta_c: float


@dataclass(frozen=True, slots=True)
class SweetSpot:
    """The ratio with the largest step that raises no task's loss."""

    ratio: float
    eta_c: float  # of the task that objects first
    task: str  # that task
    lower: float | None  # bootstrap interval of the ratio over repeats; None below two repeats
    upper: float | None


def typical(values: Sequence[float]) -> float:
    """The median eta_c of repeats: 0 and inf (no answer on either side) count as such."""
    return statistics.median(values)


def find_sweet_spot(
    ratios: Sequence[float], repeats: Sequence[Sequence[EtaByTask]]
) -> SweetSpot | None:
    """The ratio whose least eta_c over the tasks is largest.

    Args:
        ratios: Ascending.
        repeats: For each repeat, for each ratio, eta_c of every task. Repeats share their noise
            over ratios and tasks, so the bootstrap draws whole repeats.

    Returns:
        The sweet spot; None where every ratio has a task that its step hurts at once (eta_c 0), or
        where no task objects at some ratio (eta_c inf): then no largest step is known.

    Cost: `NUM_RESAMPLES` passes over the table, seeded: the same numbers each time.
    """
    best = _best(ratios, repeats)
    if best is None:
        return None
    index, eta_c, task = best
    if len(repeats) < 2:
        return SweetSpot(ratios[index], eta_c, task, None, None)
    generator = random.Random(0)
    found = []
    for _ in range(NUM_RESAMPLES):
        drawn = [generator.choice(repeats) for _ in repeats]
        again = _best(ratios, drawn)
        if again is not None:
            found.append(ratios[again[0]])
    lower, upper = _interval(sorted(found))
    return SweetSpot(ratios[index], eta_c, task, lower, upper)


def _best(
    ratios: Sequence[float], repeats: Sequence[Sequence[EtaByTask]]
) -> tuple[int, float, str] | None:
    """Index of the best ratio, its least eta_c, and whose that is."""
    least = [_least(_curve(repeats, index)) for index in range(len(ratios))]
    index = max(range(len(ratios)), key=lambda i: (least[i][0], -i))
    eta_c, task = least[index]
    return (index, eta_c, task) if 0.0 < eta_c < math.inf else None


def _curve(repeats: Sequence[Sequence[EtaByTask]], index: int) -> dict[str, float]:
    return {task: typical([r[index][task] for r in repeats]) for task in repeats[0][index]}


def _least(eta_by_task: EtaByTask) -> tuple[float, str]:
    return min((eta, task) for task, eta in eta_by_task.items())


def _interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    tail = (1 - LEVEL) / 2
    last = len(values) - 1
    return values[math.floor(tail * last)], values[math.ceil((1 - tail) * last)]


def find_crossings(ratios: Sequence[float], curves: Sequence[EtaByTask]) -> list[Crossing]:
    """Where two tasks' curves change places, by straight lines of log eta_c between ratios.

    Args:
        ratios: Ascending.
        curves: For each ratio, eta_c of every task. Intervals with an end that has no answer
            (0 or inf) are passed over.

    Returns:
        By ratio. Curves that meet at a ratio itself count once; such that only touch do not.
    """
    found = []
    for one, other in combinations(sorted(curves[0]), 2):
        last: tuple[float, float, float] | None = None  # ratio, log eta_c of one, of the other
        for ratio, at in zip(ratios, curves, strict=True):
            if not (0.0 < at[one] < math.inf and 0.0 < at[other] < math.inf):
                last = None
            elif at[one] != at[other]:
                here = (ratio, math.log(at[one]), math.log(at[other]))
                found += _between(last, here, (one, other))
                last = here
    return sorted(found, key=lambda crossing: crossing.ratio)


def _between(
    left: tuple[float, float, float] | None,
    right: tuple[float, float, float],
    tasks: tuple[str, str],
) -> list[Crossing]:
    """The crossing of two curves between two ratios at which they differ, if there is one."""
    if left is None:
        return []
    before, after = left[1] - left[2], right[1] - right[2]
    if (before < 0) == (after < 0):
        return []
    share = before / (before - after)
    eta_c = math.exp(left[1] + share * (right[1] - left[1]))
    sharper_first = tasks if before < 0 else (tasks[1], tasks[0])
    return [Crossing(left[0] + share * (right[0] - left[0]), sharper_first, eta_c)]


def next_ratio(ratios: Sequence[float], repeats: Sequence[Sequence[EtaByTask]]) -> float | None:
    """The ratio to measure next, so that the sweet spot is known more finely.

    The middle of the wider of the two intervals beside the best ratio; the side whose end has
    the larger least eta_c where both are equally wide. None where no sweet spot is known.
    """
    best = _best(ratios, repeats)
    if best is None or len(ratios) < 2:
        return None
    index = best[0]
    sides = [
        (i, j) for i, j in ((index - 1, index), (index, index + 1)) if 0 <= i < j < len(ratios)
    ]

    def promise(side: tuple[int, int]) -> tuple[float, float]:
        neighbour = side[0] if side[1] == index else side[1]
        width = round(ratios[side[1]] - ratios[side[0]], 9)
        return width, _least(_curve(repeats, neighbour))[0]

    left, right = max(sides, key=promise)
    return (ratios[left] + ratios[right]) / 2
