"""What a training grid comes to, in words and as a grid, for tables and pages (torch-free)."""

from itertools import groupby

from probe.result_train import TaskChange, TrainCell, TrainTable


def runs_of(table: TrainTable) -> list[tuple[float, float, list[TrainCell]]]:
    """(ratio, learning rate, a cell per task) of every run, both ascending."""
    by_run = groupby(table.cells, lambda cell: (cell.ratio, cell.learning_rate))
    return [(ratio, rate, list(cells)) for (ratio, rate), cells in by_run]


def tasks_of(table: TrainTable) -> list[str]:
    """The tasks in the spec's order."""
    return list(dict.fromkeys(cell.change.task for cell in table.cells))


def change_text(change: TaskChange, metric: str) -> str:
    """`-0.142 ±0.01`: of `loss` in nats per token, of `accuracy` in % points; or `diverged`."""
    values = {
        "loss": (change.loss_change, change.loss_change_standard_error, 1, 3),
        "accuracy": (change.accuracy_change, change.accuracy_change_standard_error, 100, 1),
    }
    value, error, scale, digits = values[metric]
    if value is None:
        return "diverged"
    spread = "" if error is None else f" ±{error * scale:.2g}"
    return f"{value * scale:+.{digits}f}{spread}"


def harmless_sentences(table: TrainTable) -> list[str]:
    """Per ratio: up to which learning rate no task's loss rose, and which rose first."""
    sentences = []
    for ratio, group in groupby(table.limits, lambda limit: limit.ratio):
        limits = list(group)
        start = f"{ratio:g} {table.varied}: "
        harmful = [m.smallest_harmful for m in limits if m.smallest_harmful is not None]
        if not harmful:
            sentences.append(start + "no task's loss rose at any learning rate")
            continue
        first = min(harmful)
        who = ", ".join(m.task for m in limits if m.smallest_harmful == first)
        below = next(m.largest_harmless for m in limits if m.smallest_harmful == first)
        if below is None:
            sentences.append(
                start + f"at {first:g}, the smallest learning rate, the loss of {who} rose"
            )
        else:
            said = f"no task's loss rose up to {below:g}; at {first:g} that of {who} did"
            sentences.append(start + said)
    return sentences
