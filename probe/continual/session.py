"""Measure the units of one continual-learning job: a group of runs over a stretch of tasks each.

The group stays resident between units, so that the next stretch goes on where the last ended.
After every task its state is saved; whoever takes over goes on from there with the same numbers.
"""

import datetime as dt
import platform
import time

from probe.continual.datasets import Images, load_images
from probe.continual.saved_state import SavedStates
from probe.continual.training import GroupTrainer
from probe.errors import ConfigError
from probe.memory import PeakMemory
from probe.progress import Meter, OnProgress
from probe.provenance import device_name, git_commit, package_versions
from probe.result import Provenance, RunRef, Unit
from probe.result_continual import ContinualUnitResult, RunRecord, RunTask
from probe.spec_continual import ContinualLearningSpec
from probe.spec_load import resolved, spec_sha256
from probe.workbench import choose_device


class ContinualSession:
    """Trains the groups of one `continual_learning` spec on this machine.

    Args:
        spec: The job.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """

    def __init__(self, spec: ContinualLearningSpec) -> None:
        self.spec = spec
        self.device = choose_device(spec.model.device)
        self._images: Images | None = None
        self._trainer: GroupTrainer | None = None

    def measure(
        self,
        unit: Unit,
        *,
        eta_init: dict[str, float] | None = None,
        on_progress: OnProgress | None = None,
    ) -> ContinualUnitResult:
        """Train a unit's runs through its tasks.

        Args:
            unit: With `runs`, `first_task` and `num_tasks`.
            eta_init: Not used: nothing is searched.
            on_progress: Called with `phase`, and `done` of `total` steps.

        Raises:
            ConfigError: The unit is of another kind of job, or the data has too few images.
            BatchError: The data cannot be read.
            StateStorageError: The state after a task cannot be written.

        Cost: `num_tasks` tasks; before them those of earlier units whose state is not here.
        """
        started_at, clock = dt.datetime.now(dt.UTC), time.perf_counter()
        runs, first, num_tasks = _stretch(unit)
        memory, meter = PeakMemory(self.device), Meter(on_progress)
        meter.report("load", 0, 1)
        if self._images is None:
            self._images = load_images(self.spec.stream.data)
        states = self._states(runs, self._images)
        trainer, rows = self._trainer_at(runs, first, first + num_tasks, states, self._images)
        meter.report("load", 1, 1)
        resumed_at = trainer.next_task if trainer.next_task != first else None
        rows = self._train(trainer, states, rows, (first, first + num_tasks), meter)
        return ContinualUnitResult(
            unit=unit,
            spec=resolved(self.spec),
            layer_names=[*(layer.name for layer in trainer.network.layers), "network"],
            runs=[
                RunRecord(run=run, tasks=[task[number] for task in rows])
                for number, run in enumerate(runs)
            ],
            num_steps_per_task=trainer.steps_per_task,
            resumed_at_task=resumed_at,
            num_forward_passes=meter.num_forward_passes,
            num_backward_passes=meter.num_backward_passes,
            duration_s=time.perf_counter() - clock,
            memory_bytes=memory.peak_bytes(),
            provenance=self._provenance(trainer, memory.kind, started_at),
        )

    def _trainer_at(
        self, runs: list[RunRef], first: int, end: int, states: SavedStates, images: Images
    ) -> tuple[GroupTrainer, list[list[RunTask]]]:
        """A trainer at or before the unit's first task, or within it; results of tasks done."""
        resident = self._trainer
        if resident is not None and resident.runs == runs and resident.next_task == first:
            return resident, []
        self._trainer = None  # free its memory first
        states.remove_forgotten()
        trainer = GroupTrainer(self.spec, runs, images, self.device)
        found = states.load_latest(first, end)
        rows: list[list[RunTask]] = []
        if found is not None:
            _, state, rows = found
            trainer.load({name: value.to(self.device) for name, value in state.items()})
        return trainer, rows

    def _train(
        self,
        trainer: GroupTrainer,
        states: SavedStates,
        rows: list[list[RunTask]],
        stretch: tuple[int, int],
        meter: Meter,
    ) -> list[list[RunTask]]:
        self._trainer = None  # after a failure its state is that of no task
        first, end = stretch
        per_task = trainer.steps_per_task
        total = (end - trainer.next_task) * per_task
        done = 0

        def report(steps_of_task: int) -> None:
            meter.report("train", done + steps_of_task, total)

        while trainer.next_task < end:
            task = trainer.next_task
            found = trainer.train_task(report)
            if task >= first:
                rows = [*rows, found]
            done += per_task
            meter.num_backward_passes += per_task * len(trainer.runs)
            meter.num_forward_passes += trainer.num_evaluation_passes
            states.save(trainer.next_task, trainer.state(), rows)
        self._trainer = trainer
        return rows

    def _states(self, runs: list[RunRef], images: Images) -> SavedStates:
        return SavedStates(resolved(self.spec), runs, images.sha256, device_name(self.device))

    def _provenance(
        self, trainer: GroupTrainer, memory_kind: str, started_at: dt.datetime
    ) -> Provenance:
        return Provenance(
            spec_sha256=spec_sha256(self.spec),
            versions=package_versions(),
            git_commit=git_commit(),
            device=device_name(self.device),
            dtype="float32",
            attention="none",
            moments="none",
            moments_detail="Each run has its own optimizer, from zero.",
            num_parameters=trainer.network.num_parameters,
            memory_kind=memory_kind,
            hostname=platform.node(),
            started_at=started_at,
            finished_at=dt.datetime.now(dt.UTC),
        )


def _stretch(unit: Unit) -> tuple[list[RunRef], int, int]:
    """Runs, first task and number of tasks.

    Raises:
        ConfigError: One of them is missing: the unit is of another kind of job.
    """
    if unit.runs is None or unit.first_task is None or unit.num_tasks is None:
        raise ConfigError(
            f"unit {unit.unit_id!r} has no runs or tasks: it is of another kind of job. Expand the "
            "spec again."
        )
    return unit.runs, unit.first_task, unit.num_tasks
