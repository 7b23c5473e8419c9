"""The recipe: checkpoint -> model -> batches -> update direction -> loss along the ray -> search.

One `Session` measures the units of one job, one after the other; tokenizer, batches and model
stay resident between them. It knows nothing of queues, sockets or files of results.
"""

import datetime as dt
import time
from functools import partial

from torch import Tensor

from probe.batches import Batch, BatchSet
from probe.errors import BatchError
from probe.memory import PeakMemory, out_of_memory_explained
from probe.moments import Moments, NoMoments, WarmupMoments, choose_moments
from probe.progress import Meter, OnProgress
from probe.ray_search import RaySearch
from probe.result import LossBatch, Measurement, Unit, UnitResult
from probe.spec import AdamW, CheckpointSeriesSpec
from probe.spec_load import resolved, spec_sha256
from probe.summary import summarise
from probe.update import UpdateRule, check_no_decay, slope_along
from probe.workbench import Opened, Workbench
from probe.workbench import choose_device as choose_device

_LOSS_BATCHES: dict[str, tuple[LossBatch, ...]] = {
    "update": ("update",),
    "held_out": ("held_out",),
    "both": ("update", "held_out"),
}


class Session:
    """Measures checkpoints of one job spec on this machine.

    Where torch.distributed was initialised with more than one rank, the model is sharded over all
    of them: every rank makes a session of the same spec and measures the same units.

    Args:
        spec: The job. The tokenizer is each checkpoint's own unless `model.tokenizer` names
            one for all; batches are drawn again only where it differs from the one before.

    Raises:
        ConfigError: The device or the attention kernel asked for cannot be had here, or
            `parallel` asks for another number of ranks than there are.
    """

    def __init__(self, spec: CheckpointSeriesSpec) -> None:
        self.spec = spec
        self.loss_batches = _LOSS_BATCHES[spec.measurement.loss_batch]
        self.workbench = Workbench(
            spec.model,
            spec.parallel,
            micro_batch_sequences=min(
                spec.batches.micro_batch_sequences,
                max(spec.batches.batch_sequences, spec.batches.held_out_sequences or 0),
            ),
            sequence_length=spec.batches.sequence_length,
            draw=partial(BatchSet, spec.batches),
        )

    def measure(
        self,
        unit: Unit,
        *,
        eta_init: dict[str, float] | None = None,
        on_progress: OnProgress | None = None,
    ) -> UnitResult:
        """Critical sharpness of one checkpoint: every repeat, on every loss batch asked for.

        Args:
            unit: One of `probe.plan.expand_units`.
            eta_init: First guess per loss batch, from `probe.result.eta_init_hint` of the unit
                before; None: `measurement.eta_init`.
            on_progress: Called with `phase`, `done`, `total`, `num_forward_passes`.

        Returns:
            The result. The same unit, spec and hint give the same numbers, in this process or
            another one on the same machine.

        Raises:
            CheckpointError: The checkpoint is broken or lacks what the spec asks for.
            BatchError: The text does not last for the batches asked for.
            NonFiniteLossError: The loss at the checkpoint's own parameters is NaN or inf.
            DirectionError: The gradient is not finite.
            OutOfMemoryError: It did not fit.

        Cost: per repeat one backward pass and about 3 forward passes per loss batch; once per
            checkpoint the moments' warm-up, one backward pass for the held-out gradient, and
            one forward pass per loss batch for the loss resolution.
        """
        started_at, clock = dt.datetime.now(dt.UTC), time.perf_counter()
        workbench = self.workbench
        memory, meter = PeakMemory(workbench.device), Meter(on_progress)
        with out_of_memory_explained(workbench.micro_batch_sequences, self.spec.model.dtype):
            meter.report("load", 0, 1)
            opened = workbench.open(unit.checkpoint_ref)
            check_no_decay([shard.name for shard in opened.model.shards], self.spec.optimizer)
            meter.report("load", 1, 1)
            checkpoint = _Checkpoint(self, unit, opened, meter)
            measurements = checkpoint.measure(eta_init or {})
        return UnitResult(
            unit=unit,
            spec=resolved(self.spec),
            measurements=measurements,
            summaries=[summarise(measurements, batch) for batch in self.loss_batches],
            stability_threshold=None if not unit.learning_rate else 2.0 / unit.learning_rate,
            num_forward_passes=meter.num_forward_passes,
            num_backward_passes=meter.num_backward_passes,
            duration_s=time.perf_counter() - clock,
            memory_bytes=memory.peak_bytes(),
            provenance=workbench.provenance(
                opened,
                spec_sha256=spec_sha256(self.spec),
                moments=checkpoint.moments.source,
                moments_detail=checkpoint.moments.detail,
                memory_kind=memory.kind,
                started_at=started_at,
            ),
        )


class _Checkpoint:
    """One unit under measurement."""

    def __init__(
        self, session: Session, unit: Unit, opened: Opened[BatchSet], meter: Meter
    ) -> None:
        self.spec = session.spec
        self.loss_batches = session.loss_batches
        self.opened, self.meter = opened, meter
        self.model, self.loss, self.batches = opened.model, opened.loss, opened.batches
        self.moments: Moments = NoMoments()
        if isinstance(self.spec.optimizer, AdamW):
            self.moments = choose_moments(
                self.spec.optimizer,
                opened.source,
                opened.model.shards,
                label=unit.checkpoint_ref.label,
            )
        self.rule = UpdateRule(self.model, self.spec.optimizer, self.moments)

    def measure(self, eta_init: dict[str, float]) -> list[Measurement]:
        """Warm up, then for each repeat: gradient, direction, a search per loss batch."""
        self._warm_up()
        held_out = self._held_out()
        searches: dict[LossBatch, RaySearch] = {
            name: RaySearch(
                self.model, self.loss, self.spec.measurement, self.meter, name, eta_init.get(name)
            )
            for name in self.loss_batches
        }
        total = self.spec.measurement.repeats * len(searches)
        measurements: list[Measurement] = []
        for repeat in range(self.spec.measurement.repeats):
            self.meter.report("gradient", repeat, self.spec.measurement.repeats)
            update = self.batches.update(first_repeat_batch(self.spec) + repeat)
            delta, slope = self.rule.direction(self._gradient(update))
            for name, search in searches.items():
                self.meter.report("search", len(measurements), total)
                batch = update
                if name == "held_out" and held_out is not None:
                    batch, slope = held_out[0], slope_along(self.model, delta, held_out[1])
                measurements.append(
                    search.run(
                        repeat=repeat,
                        delta=delta,
                        slope=slope,
                        update_batch=update,
                        loss_batch=batch,
                    )
                )
            del delta  # before the next gradient is made
        self.meter.report("search", total, total)
        return measurements

    def _warm_up(self) -> None:
        if not isinstance(self.moments, WarmupMoments):
            return
        assert isinstance(self.spec.optimizer, AdamW)
        total = self.spec.optimizer.warmup_steps
        for index in range(total):
            self.meter.report("moments", index, total)
            self.rule.absorb(self._gradient(self.batches.update(index)))
            self.moments.num_warmup_batches += 1
        self.meter.report("moments", total, total)

    def _held_out(self) -> tuple[Batch, list[Tensor | None]] | None:
        """The fixed batch and its gradient, once per checkpoint, so that each slope is known."""
        if "held_out" not in self.loss_batches:
            return None
        batch = self.batches.held_out
        if batch is None:
            raise BatchError("measurement.loss_batch needs batches.held_out_sequences")
        return batch, self._gradient(batch)

    def _gradient(self, batch: Batch) -> list[Tensor | None]:
        return self.opened.gradient(batch, self.meter)


def first_repeat_batch(spec: CheckpointSeriesSpec) -> int:
    """Index of the update batch of the first repeat: those before it warm the moments up.

    With moments `auto` they are left out where a checkpoint has moments too, so that every
    checkpoint of a series is measured on the same tokens.
    """
    optimizer = spec.optimizer
    if isinstance(optimizer, AdamW) and optimizer.moments != "checkpoint":
        return optimizer.warmup_steps
    return 0
