"""The learning rate a run used at a step: the spec's schedule, or a known run's (torch-free)."""

import math
from collections.abc import Callable

from probe.known_models import known_revision
from probe.result import CheckpointRef
from probe.spec import Schedule


def run_learning_rate(
    schedule: Schedule, checkpoint: CheckpointRef
) -> tuple[float | None, str | None]:
    """Learning rate of the update that follows a checkpoint, and where it is known from.

    Args:
        schedule: Of the job spec; what it states wins over what is known here.
        checkpoint: With its step; of the hub with its revision.

    Returns:
        (rate, source): source is `spec` or a published file; both None where nothing is known.
    """
    rate, source = rate_function(schedule, checkpoint)
    found = None if rate is None else rate(checkpoint.step)
    return (None, None) if found is None else (found, source)


def rate_function(
    schedule: Schedule, checkpoint: CheckpointRef
) -> tuple[Callable[[int | None], float | None] | None, str | None]:
    """Learning rate by step, of the run (and its stage) that a checkpoint belongs to.

    Returns:
        (function, source) as for `run_learning_rate`; the function may still give None.
    """
    if schedule.type != "auto":
        return (lambda step: learning_rate_at(schedule, step)), "spec"
    known = known_revision(checkpoint.location, checkpoint.revision)
    if checkpoint.source != "hub" or known is None or known.step != checkpoint.step:
        return None, None  # a step_pattern of one's own counts something else
    stage = known.stage
    return (lambda step: None if step is None else stage.learning_rate(step)), stage.source


def learning_rate_at(schedule: Schedule, step: int | None) -> float | None:
    """Learning rate of the update that follows `step`, or None where nothing is known of it.

    Linear warm-up from `start` to `peak` over `warmup_steps`; then, by type: constant; constant
    until `decay_start` and linear to `final` at `total_steps`; half a cosine to `final`; or
    linear to `final`. After `total_steps` the rate stays at `final`.

    Args:
        schedule: As stated in the job spec; types `auto` and `none` give None.
        step: Training step of the checkpoint; None gives None, except for a constant schedule
            without warm-up, where the step does not matter.

    Returns:
        The learning rate, in the units of eta, or None.
    """
    if schedule.type in ("auto", "none") or schedule.peak is None:
        return None
    if step is None:
        no_warmup = schedule.type == "constant" and schedule.warmup_steps == 0
        return schedule.peak if no_warmup else None
    if step < schedule.warmup_steps:
        done = step / schedule.warmup_steps
        return schedule.start + (schedule.peak - schedule.start) * done
    if schedule.type == "constant":
        return schedule.peak
    return schedule.final + (schedule.peak - schedule.final) * _share_left(schedule, step)


def _share_left(schedule: Schedule, step: int) -> float:
    """Share of the way from `final` back to `peak` that is left after the decay so far."""
    begin = schedule.warmup_steps
    if schedule.type == "warmup_stable_decay" and schedule.decay_start is not None:
        begin = schedule.decay_start
    end = schedule.total_steps
    assert end is not None  # the spec requires it for every decaying type
    done = min(max((step - begin) / (end - begin), 0.0), 1.0)
    if schedule.type == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done
