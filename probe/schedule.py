"""The learning rate a run used at a step, from the schedule its spec states (torch-free)."""

import math

from probe.spec import Schedule


def learning_rate_at(schedule: Schedule, step: int | None) -> float | None:
    """Learning rate of the update that follows `step`, or None where nothing is known of it.

    Linear warm-up from `start` to `peak` over `warmup_steps`; then, by type: constant; constant
    until `decay_start` and linear to `final` at `total_steps`; half a cosine to `final`; or
    linear to `final`. After `total_steps` the rate stays at `final`.

    Args:
        schedule: As stated in the job spec; type `none` gives None.
        step: Training step of the checkpoint; None gives None, except for a constant schedule
            without warm-up, where the step does not matter.

    Returns:
        The learning rate, in the units of eta, or None.
    """
    if schedule.type == "none" or schedule.peak is None:
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
