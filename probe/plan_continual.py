"""What a continual-learning job would do: runs of one shape together, in stretches of tasks.

Torch-free.
"""

from collections.abc import Iterator
from itertools import islice, product

from probe.plan_parts import unit_id
from probe.result import RunRef, Unit
from probe.spec_continual import ContinualLearningSpec, Control, Method

# What may differ between the runs of one batch; all else must be equal. Slopes of activations
# differ freely: ReLU, leaky ReLU and linear are the same computation.
Shape = tuple[str, str, int]


def shape_of(spec: ContinualLearningSpec, method: Method, control: Control) -> Shape:
    """Runs of equal shape can be trained as one batched model."""
    family = (
        "sloped" if method.activation in ("relu", "leaky_relu", "linear") else method.activation
    )
    return family, method.normalization, spec.epochs_of(control)


def run_groups(spec: ContinualLearningSpec) -> list[list[RunRef]]:
    """All runs of a job, those of equal shape together, at most `runs_per_unit` in a group."""
    by_shape: dict[Shape, list[RunRef]] = {}
    for method, control, seed in product(spec.methods, spec.controls, spec.seeds):
        run = RunRef(method=method.name, control=control.name, seed=seed)
        by_shape.setdefault(shape_of(spec, method, control), []).append(run)
    return [group for runs in by_shape.values() for group in _in_parts(runs, spec.runs_per_unit)]


def expand_continual_units(spec: ContinualLearningSpec) -> list[Unit]:
    """One group of runs and one stretch of tasks each; a group's stretches follow each other."""
    units: list[Unit] = []
    for number, runs in enumerate(run_groups(spec)):
        for first in range(0, spec.stream.num_tasks, spec.tasks_per_unit):
            num_tasks = min(spec.tasks_per_unit, spec.stream.num_tasks - first)
            index = len(units)
            label = f"group-{number}-tasks-{first}-{first + num_tasks - 1}"
            units.append(
                Unit(
                    index=index,
                    unit_id=unit_id(index, label),
                    runs=runs,
                    first_task=first,
                    num_tasks=num_tasks,
                )
            )
    return units


def _in_parts(runs: list[RunRef], size: int) -> Iterator[list[RunRef]]:
    rest = iter(runs)
    while part := list(islice(rest, size)):
        yield part
