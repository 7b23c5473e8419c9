"""What a job would do, worked out before anything is queued (torch-free).

A spec expands into an ordered list of units; the list is stored with the job, so a resumed job
measures the same checkpoints even if the directory has changed since.
"""

from probe.kinds import JobSpec
from probe.plan_continual import expand_continual_units, make_continual_plan
from probe.plan_mix import expand_mix_units, make_mix_plan
from probe.plan_parts import TYPICAL_PASSES, assemble, moment_notes, unit_id, warm_up_passes
from probe.plan_train import expand_train_units, make_train_plan
from probe.result import Plan, Unit
from probe.schedule import run_learning_rate
from probe.series import list_checkpoints
from probe.spec import CheckpointSeriesSpec
from probe.spec_continual import ContinualLearningSpec
from probe.spec_mix import MixScanSpec
from probe.spec_train import MixTrainSpec


def expand_units(spec: JobSpec) -> list[Unit]:
    """The units of a job in the order they are measured: one checkpoint each.

    With exact gradients a mix scan's unit is one ratio of one checkpoint; a training grid's is one
    ratio and learning rate; continual learning's is a stretch of tasks of a group of runs.

    Raises:
        CheckpointError: No checkpoint matches, or a series holds one without a step.
        CheckpointUnavailableError: The hub is needed to list revisions and did not answer.
    """
    if isinstance(spec, MixScanSpec):
        return expand_mix_units(spec)
    if isinstance(spec, MixTrainSpec):
        return expand_train_units(spec)
    if isinstance(spec, ContinualLearningSpec):
        return expand_continual_units(spec)
    units = []
    for index, checkpoint in enumerate(list_checkpoints(spec.checkpoints)):
        rate, source = run_learning_rate(spec.schedule, checkpoint)
        units.append(
            Unit(
                index=index,
                unit_id=unit_id(index, checkpoint.label),
                checkpoint=checkpoint,
                learning_rate=rate,
                learning_rate_source=source,
            )
        )
    return units


def make_plan(spec: JobSpec) -> Plan:
    """Units, passes, tokens and memory a job would take; queues and loads nothing.

    Raises:
        CheckpointError: As `expand_units`.
    """
    if isinstance(spec, MixScanSpec):
        return make_mix_plan(spec)
    if isinstance(spec, MixTrainSpec):
        return make_train_plan(spec)
    if isinstance(spec, ContinualLearningSpec):
        return make_continual_plan(spec)
    units = expand_units(spec)
    options = spec.measurement
    loss_batches = 2 if options.loss_batch == "both" else 1
    searches = loss_batches * options.repeats
    # Beside the search: L(0) once per update batch and once for the held-out batch, and one
    # more evaluation of eta = 0 per loss batch for the loss resolution.
    at_zero = (options.repeats if options.loss_batch != "held_out" else 0) + (
        1 if options.loss_batch != "update" else 0
    )
    per_unit = searches * TYPICAL_PASSES[options.search] + at_zero + loss_batches
    at_most = searches * options.max_forward_passes + at_zero + loss_batches
    return assemble(
        spec,
        units,
        num_forward_passes=per_unit * len(units),
        max_forward_passes=at_most * len(units),
        num_backward_passes=_backward_passes(spec, units),
        num_tokens_per_pass=spec.batches.sequence_length
        * max(spec.batches.batch_sequences, spec.batches.held_out_sequences or 0),
        notes=[
            *moment_notes(spec.optimizer, [unit.checkpoint_ref for unit in units]),
            *_schedule_notes(spec, units),
        ],
    )


def _backward_passes(spec: CheckpointSeriesSpec, units: list[Unit]) -> int:
    held_out = 1 if spec.measurement.loss_batch != "update" else 0
    measured = (spec.measurement.repeats + held_out) * len(units)
    return measured + sum(warm_up_passes(spec.optimizer, unit.checkpoint_ref) for unit in units)


def _schedule_notes(spec: CheckpointSeriesSpec, units: list[Unit]) -> list[str]:
    """What `schedule: auto` found out about a published run."""
    if spec.schedule.type != "auto":
        return []
    sources = {u.learning_rate_source for u in units if u.learning_rate_source is not None}
    return [f"learning rates for 2/eta are those of {source}" for source in sorted(sources)]
