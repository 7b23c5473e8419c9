"""What a training grid would do, worked out before anything is queued (torch-free)."""

from probe.plan_parts import (
    assemble,
    lost_share_notes,
    moment_notes,
    unit_id,
    warm_up_passes,
)
from probe.result import CheckpointRef, Plan, Unit
from probe.series import list_checkpoints
from probe.spec import QuestionAnswerFormat
from probe.spec_train import MixTrainSpec


def expand_train_units(spec: MixTrainSpec) -> list[Unit]:
    """One checkpoint, one ratio and one learning rate each.

    Raises:
        CheckpointError: No checkpoint matches, or a series holds one without a step.
        CheckpointUnavailableError: The hub is needed to list revisions and did not answer.
    """
    runs = [
        (checkpoint, ratio, rate)
        for checkpoint in list_checkpoints(spec.checkpoints)
        for ratio in spec.train.ratios
        for rate in spec.train.learning_rates
    ]
    return [
        Unit(
            index=index,
            # The label gives way, not the numbers, where all are too long.
            unit_id=unit_id(index, f"{checkpoint.label[:30]}-ratio-{ratio:g}-lr-{rate:g}"),
            checkpoint=checkpoint,
            ratio=ratio,
            learning_rate=rate,
            learning_rate_source="spec",
        )
        for index, (checkpoint, ratio, rate) in enumerate(runs)
    ]


def make_train_plan(spec: MixTrainSpec) -> Plan:
    """Units, passes, tokens and memory a training grid would take; queues and loads nothing.

    Raises:
        CheckpointError: As `expand_train_units`.
    """
    units = expand_train_units(spec)
    checkpoints = list({unit.checkpoint_ref: None for unit in units})
    # Each task twice per scoring: its loss, its accuracy. The start is scored once per checkpoint,
    # or once per unit where every unit meets a fresh process.
    scoring = 2 * len(spec.eval_tasks)
    largest = max(spec.batches.batch_sequences, *(task.sequences for task in spec.eval_tasks))
    notes = [] if spec.train.moments == "zero" else moment_notes(spec.optimizer, checkpoints)
    lost = lost_share_notes(
        spec.mixture,
        spec.train.ratios,
        spec.batches.batch_sequences,
        "or choose ratios further from 0 and 1",
    )
    return assemble(
        spec,
        units,
        num_forward_passes=scoring * (len(units) + len(checkpoints)),
        max_forward_passes=2 * scoring * len(units),
        num_backward_passes=sum(_backward_passes(spec, unit.checkpoint_ref) for unit in units),
        num_tokens_per_pass=spec.batches.sequence_length * largest,
        notes=[*notes, *lost, *_accuracy_notes(spec)],
    )


def _backward_passes(spec: MixTrainSpec, checkpoint: CheckpointRef) -> int:
    """Of one unit: its steps, and the batches its moments are accumulated over."""
    zero = spec.train.moments == "zero"
    return spec.train.steps + (0 if zero else warm_up_passes(spec.optimizer, checkpoint))


def _accuracy_notes(spec: MixTrainSpec) -> list[str]:
    formats = {task.data.name: task.data.format for task in spec.eval_tasks}
    by_token = [
        name
        for name, form in formats.items()
        if not (isinstance(form, QuestionAnswerFormat) and form.choices)
    ]
    if not by_token:
        return []
    return [
        f"the accuracy of {', '.join(by_token)} is that of single tokens given the true ones "
        "before: without `choices` no answer is picked, and none is generated"
    ]
