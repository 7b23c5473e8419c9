"""The runs of a training grid as one table per checkpoint, and how far each task went unharmed."""

from collections.abc import Iterable, Sequence

from probe.result_train import (
    MixTrainUnitResult,
    TrainCell,
    TrainLimit,
    TrainTable,
    TrainUnitSummary,
)


def summarise_training(results: Iterable[MixTrainUnitResult]) -> list[TrainTable]:
    """One table per checkpoint.

    Args:
        results: Of one job, in unit order; a job that is not finished gives the runs so far.
    """
    by_checkpoint: dict[str, list[MixTrainUnitResult]] = {}
    for result in results:
        key = result.unit.checkpoint_ref.model_dump_json()
        by_checkpoint.setdefault(key, []).append(result)
    return [_table(units) for units in by_checkpoint.values()]


def summarise_run(result: MixTrainUnitResult) -> TrainUnitSummary:
    """One run in a few numbers."""
    return TrainUnitSummary(
        ratio=result.ratio,
        learning_rate=result.learning_rate,
        outcome=result.outcome,
        num_steps=result.num_steps,
        tasks=result.tasks,
    )


def _table(units: Sequence[MixTrainUnitResult]) -> TrainTable:
    first = units[0]
    mixture = first.spec["mixture"]
    ordered = sorted(units, key=lambda unit: (unit.ratio, unit.learning_rate))
    cells = [
        TrainCell(
            ratio=unit.ratio,
            learning_rate=unit.learning_rate,
            outcome=unit.outcome,
            change=change,
        )
        for unit in ordered
        for change in unit.tasks
    ]
    ratios = list(dict.fromkeys(unit.ratio for unit in ordered))
    tasks = [change.task for change in first.tasks]
    return TrainTable(
        checkpoint=first.unit.checkpoint_ref.label,
        step=first.unit.checkpoint_ref.step,
        varied=mixture["varied"] or mixture["sources"][0]["name"],
        cells=cells,
        limits=[
            _limit([c for c in cells if c.ratio == ratio and c.change.task == task])
            for ratio in ratios
            for task in tasks
        ],
    )


def _limit(cells: Sequence[TrainCell]) -> TrainLimit:
    """Cells of one ratio and task, learning rates ascending."""
    harmless: float | None = None
    harmful: float | None = None
    for cell in cells:
        change = cell.change.loss_change
        if change is None or change > 0:  # a run that diverged did harm
            harmful = cell.learning_rate
            break
        harmless = cell.learning_rate
    return TrainLimit(
        ratio=cells[0].ratio,
        task=cells[0].change.task,
        largest_harmless=harmless,
        smallest_harmful=harmful,
    )
