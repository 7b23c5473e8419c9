"""What a mix scan would do, worked out before anything is queued (torch-free)."""

from probe.plan_parts import (
    TYPICAL_PASSES,
    assemble,
    lost_share_notes,
    moment_notes,
    unit_id,
    warm_up_passes,
)
from probe.result import CheckpointRef, Plan, Unit
from probe.series import list_checkpoints
from probe.spec_mix import MixScanSpec, ratios_of


def expand_mix_units(spec: MixScanSpec) -> list[Unit]:
    """A checkpoint at all ratios each; with exact gradients at one ratio each.

    Raises:
        CheckpointError: No checkpoint matches, or a series holds one without a step.
        CheckpointUnavailableError: The hub is needed to list revisions and did not answer.
    """
    checkpoints = list_checkpoints(spec.checkpoints)
    if spec.mixture.gradients == "shared":
        return [
            Unit(index=index, unit_id=unit_id(index, ref.label), checkpoint=ref)
            for index, ref in enumerate(checkpoints)
        ]
    places = [(ref, ratio) for ref in checkpoints for ratio in ratios_of(spec.mixture)]
    return [
        Unit(
            index=index,
            # The label gives way, not the ratio, where both are too long.
            unit_id=unit_id(index, f"{ref.label[:40]}-ratio-{ratio:g}"),
            checkpoint=ref,
            ratio=ratio,
        )
        for index, (ref, ratio) in enumerate(places)
    ]


def make_mix_plan(spec: MixScanSpec) -> Plan:
    """Units, passes, tokens and memory a mix scan would take; queues and loads nothing.

    Raises:
        CheckpointError: As `expand_mix_units`.
    """
    units = expand_mix_units(spec)
    options, num_tasks = spec.measurement, len(spec.eval_tasks)
    num_ratios = 1
    if spec.mixture.gradients == "shared":
        num_ratios = len(ratios_of(spec.mixture)) + spec.mixture.refine
    searches = options.repeats * num_ratios * num_tasks
    # Once per task: L(0), and one more evaluation of eta = 0 for the loss resolution.
    at_zero = 2 * num_tasks
    largest = max(spec.batches.batch_sequences, *(task.sequences for task in spec.eval_tasks))
    checkpoints = list({unit.checkpoint_ref: None for unit in units})
    return assemble(
        spec,
        units,
        num_forward_passes=(searches * TYPICAL_PASSES[options.search] + at_zero) * len(units),
        max_forward_passes=(searches * options.max_forward_passes + at_zero) * len(units),
        num_backward_passes=sum(_backward_passes(spec, unit.checkpoint_ref) for unit in units),
        num_tokens_per_pass=spec.batches.sequence_length * largest,
        notes=[*moment_notes(spec.optimizer, checkpoints), *_mixture_notes(spec)],
    )


def _backward_passes(spec: MixScanSpec, checkpoint: CheckpointRef) -> int:
    """Of one unit: a gradient per task, and per step one, or one per source."""
    steps = warm_up_passes(spec.optimizer, checkpoint) + spec.measurement.repeats
    per_step = len(spec.mixture.sources) if spec.mixture.gradients == "shared" else 1
    return len(spec.eval_tasks) + per_step * steps


def _mixture_notes(spec: MixScanSpec) -> list[str]:
    notes = []
    if len(ratios_of(spec.mixture)) + spec.mixture.refine == 1:
        notes.append("one ratio gives no sweet spot: mixture.ratios takes several")
    if spec.measurement.repeats == 1:
        notes.append(
            "one repeat gives no spread of lambda_c and no interval of the sweet spot: "
            "measurement.repeats takes several"
        )
    if spec.mixture.gradients == "shared":
        return notes
    if spec.mixture.buffers != "float32":
        notes.append("mixture.buffers is without effect: exact gradients keep fp32 moments")
    return notes + lost_share_notes(
        spec.mixture,
        ratios_of(spec.mixture),
        spec.batches.batch_sequences,
        "choose ratios further apart, or use gradients: shared",
    )
