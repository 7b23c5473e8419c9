"""The training grid: what a mix scan predicts from a few passes, found out by training.

A unit is one checkpoint, one mixture ratio and one learning rate: every evaluation task is scored,
AdamW takes `train.steps` steps on batches drawn at the ratio, every task is scored again, and the
model is put back to the checkpoint's values bit for bit. Runs at one ratio see the same batches in
the same order whatever their learning rate. Nothing that was trained is written to disk.
"""

import datetime as dt
import time
from collections.abc import Iterator
from functools import partial
from itertools import count

from probe.batches import Batch
from probe.batches.choices import MixTrainBatches
from probe.errors import ConfigError, NonFiniteLossError
from probe.memory import PeakMemory, out_of_memory_explained
from probe.mix_training import ShardAdamW, TrainRun, put_back, train_steps
from probe.moments import CheckpointMoments, WarmupMoments, choose_moments
from probe.progress import Meter, OnProgress
from probe.result import MomentsSource, Unit
from probe.result_train import MixTrainUnitResult
from probe.shares import source_shares
from probe.spec_load import resolved, spec_sha256
from probe.spec_train import MixTrainSpec, TrainGrid
from probe.task_scores import ScoredTask, TaskScore
from probe.update import check_no_decay
from probe.workbench import Opened, Workbench

Batches = Opened[MixTrainBatches]


class MixTrainSession:
    """Trains from the checkpoints of one `mix_train` spec on this machine.

    Args:
        spec: The job.

    Raises:
        ConfigError: As `probe.workbench.Workbench`.
    """

    def __init__(self, spec: MixTrainSpec) -> None:
        self.spec = spec
        batches = spec.batches
        largest = max(batches.batch_sequences, *(task.sequences for task in spec.eval_tasks))
        self.workbench = Workbench(
            spec.model,
            spec.parallel,
            micro_batch_sequences=min(batches.micro_batch_sequences, largest),
            sequence_length=batches.sequence_length,
            draw=partial(MixTrainBatches, spec),
        )
        # Scores of the checkpoint last opened: the same for every run that starts at it.
        self._start: tuple[str, list[TaskScore]] = ("", [])

    def measure(
        self,
        unit: Unit,
        *,
        eta_init: dict[str, float] | None = None,
        on_progress: OnProgress | None = None,
    ) -> MixTrainUnitResult:
        """Every task before and after one run.

        Args:
            unit: A checkpoint, with `ratio` and `learning_rate`.
            eta_init: Not used: nothing is searched.
            on_progress: Called with `phase`, `done`, `total`, `num_forward_passes`.

        Raises:
            CheckpointError: The checkpoint is broken or lacks what the spec asks for.
            BatchError: The text does not last for the steps asked for.
            ConfigError: The unit has no ratio or learning rate.
            NonFiniteLossError: A loss at the checkpoint's own parameters is NaN or inf.
            OutOfMemoryError: It did not fit.

        Cost: a backward pass per step and per batch of moments; per task two forward passes
            after the run, and two before it once per checkpoint.
        """
        started_at, clock = dt.datetime.now(dt.UTC), time.perf_counter()
        ratio, rate = _cell(unit)
        workbench = self.workbench
        memory, meter = PeakMemory(workbench.device), Meter(on_progress)
        with out_of_memory_explained(workbench.micro_batch_sequences, self.spec.model.dtype):
            meter.report("load", 0, 1)
            opened = workbench.open(unit.checkpoint_ref)
            check_no_decay([shard.name for shard in opened.model.shards], self.spec.optimizer)
            meter.report("load", 1, 1)
            grid = _GridRun(self.spec, unit, opened, meter, ratio)
            start = self._start_scores(unit, opened, grid.tasks, meter)
            with put_back(opened.model):
                run = grid.train(rate)
                end = None if run.diverged else _scores(grid.tasks, opened, meter)
        finite = end is not None and all(score.is_finite for score in end)
        ends = end if finite and end is not None else [None] * len(start)
        return MixTrainUnitResult(
            unit=unit,
            spec=resolved(self.spec),
            ratio=ratio,
            learning_rate=rate,
            shares=grid.shares,
            outcome="finished" if finite else "diverged",
            num_steps=run.num_steps,
            train_losses=run.losses,
            first_batch_sha256=grid.first_batch_sha256,
            tasks=[
                task.change(before, after)
                for task, before, after in zip(grid.tasks, start, ends, strict=True)
            ],
            num_forward_passes=meter.num_forward_passes,
            num_backward_passes=meter.num_backward_passes,
            duration_s=time.perf_counter() - clock,
            memory_bytes=memory.peak_bytes(),
            provenance=workbench.provenance(
                opened,
                spec_sha256=spec_sha256(self.spec),
                moments=grid.moments,
                moments_detail=grid.moments_detail,
                memory_kind=memory.kind,
                started_at=started_at,
            ),
        )

    def _start_scores(
        self, unit: Unit, opened: Batches, tasks: list[ScoredTask], meter: Meter
    ) -> list[TaskScore]:
        key = unit.checkpoint_ref.model_dump_json()
        if self._start[0] != key:
            for task in tasks:
                task.check(opened.model.model)
            scores = _scores(tasks, opened, meter)
            for task, score in zip(tasks, scores, strict=True):
                if not score.is_finite:
                    raise NonFiniteLossError(
                        f"the loss of task {task.name!r} is not finite at the checkpoint's own "
                        "parameters, so there is nothing to compare a run with. Use model.dtype: "
                        "float32 or bfloat16 if it is float16; otherwise leave this checkpoint out."
                    )
            self._start = (key, scores)
        return self._start[1]


class _GridRun:
    """One run of the grid: its tasks, its batches, its moments."""

    moments: MomentsSource = "none"
    moments_detail = "Zero before the first step."
    first_batch_sha256 = ""

    def __init__(
        self, spec: MixTrainSpec, unit: Unit, opened: Batches, meter: Meter, ratio: float
    ) -> None:
        self._spec, self._unit, self._opened, self._meter = spec, unit, opened, meter
        self.shares = source_shares(spec.mixture, ratio)
        self.tasks = [ScoredTask.of(opened.batches, task.data.name) for task in spec.eval_tasks]

    def train(self, rate: float) -> TrainRun:
        """Moments as asked for, then every step."""
        first = self._spec.num_moment_steps
        batch = self._opened.batches.mixed_step(self.shares, first)
        self.first_batch_sha256 = batch.sha256
        rates = learning_rates(self._spec.train, rate)
        return train_steps(
            self._opened, self._optimizer(), self._batches(first), rates, self._meter
        )

    def _optimizer(self) -> ShardAdamW:
        model, options = self._opened.model, self._spec.optimizer
        if self._spec.train.moments == "zero":
            return ShardAdamW(model, options, None)
        found = choose_moments(
            options, self._opened.source, model.shards, label=self._unit.checkpoint_ref.label
        )
        self.moments = found.source
        if isinstance(found, CheckpointMoments):
            self.moments_detail = found.detail
            return ShardAdamW(model, options, found)
        return self._warmed_up(found)

    def _warmed_up(self, found: WarmupMoments) -> ShardAdamW:
        """Moments of batches drawn at the ratio, the parameters fixed: AdamW steps at lr 0."""
        optimizer = ShardAdamW(self._opened.model, self._spec.optimizer, None)
        batches, total = self._batches(0), self._spec.optimizer.warmup_steps
        for step in range(total):
            self._meter.report("moments", step, total)
            optimizer.step(self._opened.gradient(next(batches), self._meter), 0.0)
        self._meter.report("moments", total, total)
        self.moments_detail = (
            f"Accumulated over {total} batches of the mixture with the parameters fixed, before "
            f"the first step ({found.why})."
        )
        return optimizer

    def _batches(self, first: int) -> Iterator[Batch]:
        """Those of step `first` and after; the same for every learning rate."""
        return (self._opened.batches.mixed_step(self.shares, step) for step in count(first))


def learning_rates(grid: TrainGrid, peak: float) -> list[float]:
    """One per step: a linear rise over `warmup_steps`, then constant at the peak."""
    rise = grid.warmup_steps
    return [peak * min(1.0, step / rise) if rise else peak for step in range(1, grid.steps + 1)]


def _scores(tasks: list[ScoredTask], opened: Batches, meter: Meter) -> list[TaskScore]:
    found = []
    for index, task in enumerate(tasks):
        meter.report("score", index, len(tasks))
        found.append(task.score(opened.loss, meter))
    meter.report("score", len(tasks), len(tasks))
    return found


def _cell(unit: Unit) -> tuple[float, float]:
    """Ratio and learning rate of a unit.

    Raises:
        ConfigError: One of them is missing: the unit is of another kind of job.
    """
    if unit.ratio is None or unit.learning_rate is None:
        raise ConfigError(
            f"unit {unit.unit_id!r} has ratio {unit.ratio} and learning_rate "
            f"{unit.learning_rate}: a unit of mix_train needs both. Expand the spec again."
        )
    return unit.ratio, unit.learning_rate
