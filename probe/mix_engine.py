"""The mix scan: one checkpoint, a direction per mixture ratio, a search per evaluation task.

    eta_c^{task <- mix(r)} = min { eta > 0 : L_task(theta - eta delta_r) > L_task(theta) }

With shared gradients a unit is a checkpoint at all ratios: one gradient per source and step, from
which the direction at every ratio follows. With exact ones a unit is a checkpoint at one ratio,
measured on batches mixed at it. Every task's batch is fixed and in no update.
"""

import datetime as dt
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from torch import Tensor

from probe.batches import Batch
from probe.batches.mixtures import MixtureBatches
from probe.memory import PeakMemory, out_of_memory_explained
from probe.mix_steps import ExactSteps, SharedSteps, Steps
from probe.mix_summary import eta_table
from probe.progress import Meter, OnProgress
from probe.ray_search import RaySearch, search_fields
from probe.result import Unit
from probe.result_mix import MixMeasurement, MixUnitResult
from probe.shares import source_shares
from probe.spec_load import resolved, spec_sha256
from probe.spec_mix import MixScanSpec, ratios_of
from probe.sweet_spot import next_ratio
from probe.update import check_no_decay, slope_along
from probe.workbench import Opened, Workbench

T = TypeVar("T")


class MixSession:
    """Scans checkpoints of one `mix_scan` spec on this machine.

    Args:
        spec: The job.

    Raises:
        ConfigError: As `probe.workbench.Workbench`.
    """

    def __init__(self, spec: MixScanSpec) -> None:
        self.spec = spec
        batches = spec.batches
        largest = max(batches.batch_sequences, *(task.sequences for task in spec.eval_tasks))
        self.workbench = Workbench(
            spec.model,
            spec.parallel,
            micro_batch_sequences=min(batches.micro_batch_sequences, largest),
            sequence_length=batches.sequence_length,
            draw=partial(MixtureBatches, spec),
        )

    def measure(
        self,
        unit: Unit,
        *,
        eta_init: dict[str, float] | None = None,
        on_progress: OnProgress | None = None,
    ) -> MixUnitResult:
        """Relative critical sharpness of every task along the mixtures of one unit.

        Args:
            unit: A checkpoint at all ratios (`unit.ratio` None), or at one.
            eta_init: First guess per task; None: `measurement.eta_init`.
            on_progress: Called with `phase`, `done`, `total`, `num_forward_passes`.

        Raises:
            CheckpointError: The checkpoint is broken or lacks what the spec asks for.
            BatchError: The text does not last for the steps asked for.
            NonFiniteLossError: A loss at the checkpoint's own parameters is NaN or inf.
            DirectionError: A gradient or a direction is not finite.
            OutOfMemoryError: It did not fit.

        Cost: per task one backward pass and two forward passes once; per source and step (shared)
            or per step (exact) one backward pass; per ratio, task and repeat about 3 forward
            passes.
        """
        started_at, clock = dt.datetime.now(dt.UTC), time.perf_counter()
        workbench = self.workbench
        memory, meter = PeakMemory(workbench.device), Meter(on_progress)
        with out_of_memory_explained(workbench.micro_batch_sequences, self.spec.model.dtype):
            meter.report("load", 0, 1)
            opened = workbench.open(unit.checkpoint_ref)
            check_no_decay([shard.name for shard in opened.model.shards], self.spec.optimizer)
            meter.report("load", 1, 1)
            scan = _Scan(self.spec, unit, opened, meter, eta_init or {})
            scan.run()
        return MixUnitResult(
            unit=unit,
            spec=resolved(self.spec),
            measurements=scan.measurements,
            num_forward_passes=meter.num_forward_passes,
            num_backward_passes=meter.num_backward_passes,
            duration_s=time.perf_counter() - clock,
            direction_s=scan.direction_s,
            memory_bytes=memory.peak_bytes(),
            provenance=workbench.provenance(
                opened,
                spec_sha256=spec_sha256(self.spec),
                moments=scan.steps.source,
                moments_detail=scan.steps.detail,
                memory_kind=memory.kind,
                started_at=started_at,
            ),
        )


@dataclass
class _Task:
    """One evaluation loss: its fixed batch, its gradient at theta, its searches."""

    name: str
    batch: Batch
    gradient: list[Tensor | None]
    search: RaySearch
    eta_c: dict[float, float] = field(default_factory=dict)  # ratio -> the last one found there

    def guess(self, ratio: float) -> float | None:
        """The last eta_c at this ratio, else at the nearest one; None: no answer anywhere yet."""
        if not self.eta_c:
            return None
        return self.eta_c[min(self.eta_c, key=lambda known: abs(known - ratio))]


class _Scan:
    """One unit under measurement."""

    def __init__(
        self,
        spec: MixScanSpec,
        unit: Unit,
        opened: Opened[MixtureBatches],
        meter: Meter,
        eta_init: dict[str, float],
    ) -> None:
        self.spec, self.opened, self.meter = spec, opened, meter
        self.ratios = ratios_of(spec.mixture) if unit.ratio is None else [unit.ratio]
        self.measurements: list[MixMeasurement] = []
        self.direction_s = 0.0
        num_ratios = len(self.ratios) + spec.mixture.refine
        self._num_searches = spec.measurement.repeats * num_ratios * len(spec.eval_tasks)
        self.steps: Steps
        if spec.mixture.gradients == "shared":
            self.steps = SharedSteps(spec, unit, opened, meter)
        else:
            self.steps = ExactSteps(
                spec, unit, opened, meter, source_shares(spec.mixture, self.ratios[0])
            )
        self.tasks = [self._task(task.data.name, eta_init) for task in spec.eval_tasks]

    def run(self) -> None:
        """Warm up, then every repeat at every ratio.

        Further ratios are chosen in the first repeat, one by one, and measured in all of them.
        """
        self._timed(self.steps.warm_up)
        for repeat in range(self.spec.measurement.repeats):
            hashes = self._timed(partial(self.steps.begin_repeat, repeat))
            for ratio in self.ratios:
                self._at(repeat, ratio, hashes)
            for _ in range(self.spec.mixture.refine if repeat == 0 else 0):
                further = next_ratio(self.ratios, eta_table(self.measurements))
                if further is None:
                    break
                self._at(repeat, further, hashes)
                self.ratios = sorted([*self.ratios, further])
        self.meter.report("search", len(self.measurements), len(self.measurements))

    def _at(self, repeat: int, ratio: float, hashes: list[str]) -> None:
        """All tasks along the direction of one mixture."""
        shares = source_shares(self.spec.mixture, ratio)
        delta = self._timed(partial(self.steps.direction, shares))
        for task in self.tasks:
            self.meter.report("search", len(self.measurements), self._num_searches)
            searched = task.search.search(
                delta,
                slope_along(self.opened.model, delta, task.gradient),
                task.batch,
                eta_init=task.guess(ratio),
            )
            if searched.found.eta_c is not None:
                task.eta_c[ratio] = searched.found.eta_c
            self.measurements.append(
                MixMeasurement(
                    repeat=repeat,
                    ratio=ratio,
                    task=task.name,
                    shares=shares,
                    update_batch_sha256=hashes,
                    loss_batch_sha256=task.batch.sha256,
                    **search_fields(searched),
                )
            )

    def _task(self, name: str, eta_init: dict[str, float]) -> _Task:
        batch = self.opened.batches.task(name)
        options = self.spec.measurement
        search = RaySearch(
            self.opened.model, self.opened.loss, options, self.meter, name, eta_init.get(name)
        )
        return _Task(name, batch, self.opened.gradient(batch, self.meter), search)

    def _timed(self, work: Callable[[], T]) -> T:
        clock = time.perf_counter()
        try:
            return work()
        finally:
            self.direction_s += time.perf_counter() - clock
