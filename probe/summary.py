"""All repeats of one loss batch at one checkpoint, in one row (torch-free)."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence

from probe.result import LossBatch, Measurement, Summary


def summarise(measurements: Sequence[Measurement], loss_batch: LossBatch) -> Summary:
    """Mean, standard error and bracket of lambda_c over the repeats that have an answer.

    Args:
        measurements: Of one checkpoint; those of the other loss batch are left out.
        loss_batch: Which ones are summed up; at least one must be there.

    Returns:
        The summary. Repeats without an answer are counted in `outcomes` and enter no mean.
    """
    ours = [m for m in measurements if m.loss_batch == loss_batch]
    values = [m.lambda_c for m in ours]
    found = [value for value in values if value is not None]
    converged = [m for m in ours if m.lambda_c is not None]
    lowest = max((m.eta_upper for m in converged if m.eta_upper is not None), default=None)
    highest = min((m.eta_lower for m in converged if m.eta_lower > 0), default=None)
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    return Summary(
        loss_batch=loss_batch,
        num_repeats=len(ours),
        num_converged=len(found),
        lambda_c_mean=statistics.fmean(found) if found else None,
        lambda_c_standard_error=error,
        lambda_c_values=values,
        lambda_c_lower=None if lowest is None else 2.0 / lowest,
        lambda_c_upper=None if highest is None else 2.0 / highest,
        loss_mean=statistics.fmean(m.loss_at_zero for m in ours),
        outcomes=dict(Counter(m.outcome.value for m in ours)),
        num_forward_passes=sum(m.num_forward_passes for m in ours),
    )
