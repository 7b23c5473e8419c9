"""The steps of a mix scan: which gradients are taken, and the direction they give at a ratio."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from probe.batches import Batch
from probe.batches.mixtures import MixtureBatches
from probe.mix_direction import CheckpointMixtures, MixtureRule, WarmupMixtures
from probe.moments import CheckpointMoments, WarmupMoments, choose_moments
from probe.progress import Meter
from probe.result import MomentsSource, Unit
from probe.spec_mix import MixScanSpec
from probe.update import UpdateRule
from probe.workbench import Opened


class Steps(Protocol):
    """Warm up once; then per repeat one step, whose direction can be asked for."""

    def warm_up(self) -> None:
        """Accumulate moments at learning rate 0, where none were saved."""

    def begin_repeat(self, repeat: int) -> list[str]:
        """Take the gradients of a repeat's step; returns the hashes of their batches."""

    def direction(self, shares: Sequence[float]) -> list[Tensor]:
        """Delta of the present repeat at these shares of the sources."""

    @property
    def source(self) -> MomentsSource:
        """Where the moments came from."""

    @property
    def detail(self) -> str:
        """The same as a sentence."""


class SharedSteps:
    """One gradient per source and step serves every ratio.

    Cost: a backward pass per source for every warm-up step and every repeat.
    """

    def __init__(
        self, spec: MixScanSpec, unit: Unit, opened: Opened[MixtureBatches], meter: Meter
    ) -> None:
        self._spec, self._opened, self._meter = spec, opened, meter
        moments = choose_moments(
            spec.optimizer, opened.source, opened.model.shards, label=unit.checkpoint_ref.label
        )
        self._rule: MixtureRule
        if isinstance(moments, CheckpointMoments):
            self._rule = CheckpointMixtures(opened.model, spec.optimizer, moments)
        else:
            self._rule = WarmupMixtures(
                opened.model,
                spec.optimizer,
                len(spec.mixture.sources),
                buffers=getattr(torch, spec.mixture.buffers),
            )

    def warm_up(self) -> None:
        """Every source's gradient of every warm-up step enters the moments."""
        total = self._spec.optimizer.warmup_steps if self.source == "warmup" else 0
        for step in range(total):
            self._meter.report("moments", step, total)
            self._rule.warm_up(self._gradients(self._batches(step)))
        self._meter.report("moments", total, total)

    def begin_repeat(self, repeat: int) -> list[str]:
        """One gradient of every source."""
        self._meter.report("gradient", repeat, self._spec.measurement.repeats)
        self._rule.end_repeat()
        batches = self._batches(first_repeat_step(self._spec) + repeat)
        self._rule.begin_repeat(self._gradients(batches))
        return [batch.sha256 for batch in batches]

    def direction(self, shares: Sequence[float]) -> list[Tensor]:
        """Delta at these shares. Cost: one pass over the moments."""
        return self._rule.direction(shares)

    @property
    def source(self) -> MomentsSource:
        """Saved, or accumulated."""
        return self._rule.source

    @property
    def detail(self) -> str:
        """As the rule says."""
        return self._rule.detail

    def _batches(self, step: int) -> list[Batch]:
        sources = range(len(self._spec.mixture.sources))
        return [self._opened.batches.source_step(source, step) for source in sources]

    def _gradients(self, batches: Sequence[Batch]) -> list[list[Tensor | None]]:
        return [self._opened.gradient(batch, self._meter) for batch in batches]


class ExactSteps:
    """Batches drawn at one ratio, as training on the mixture would draw them.

    Cost: a backward pass for every warm-up step and every repeat, at every ratio anew.
    """

    def __init__(
        self,
        spec: MixScanSpec,
        unit: Unit,
        opened: Opened[MixtureBatches],
        meter: Meter,
        shares: Sequence[float],
    ) -> None:
        self._spec, self._opened, self._meter, self._shares = spec, opened, meter, list(shares)
        self._moments = choose_moments(
            spec.optimizer, opened.source, opened.model.shards, label=unit.checkpoint_ref.label
        )
        self._rule = UpdateRule(opened.model, spec.optimizer, self._moments)
        self._delta: list[Tensor] = []

    def warm_up(self) -> None:
        """Gradients of mixed batches enter the moments."""
        if not isinstance(self._moments, WarmupMoments):
            return
        total = self._spec.optimizer.warmup_steps
        for step in range(total):
            self._meter.report("moments", step, total)
            batch = self._opened.batches.mixed_step(self._shares, step)
            self._rule.absorb(self._opened.gradient(batch, self._meter))
            self._moments.num_warmup_batches += 1
        self._meter.report("moments", total, total)

    def begin_repeat(self, repeat: int) -> list[str]:
        """The gradient of one mixed batch, and its direction."""
        self._meter.report("gradient", repeat, self._spec.measurement.repeats)
        self._delta = []  # before the next gradient is made
        step = first_repeat_step(self._spec) + repeat
        batch = self._opened.batches.mixed_step(self._shares, step)
        self._delta, _ = self._rule.direction(self._opened.gradient(batch, self._meter))
        return [batch.sha256]

    def direction(self, shares: Sequence[float]) -> list[Tensor]:
        """Delta of the present repeat; a unit has one ratio."""
        assert list(shares) == self._shares
        return self._delta

    @property
    def source(self) -> MomentsSource:
        """Saved, or accumulated."""
        return self._moments.source

    @property
    def detail(self) -> str:
        """As the moments say."""
        return self._moments.detail


def first_repeat_step(spec: MixScanSpec) -> int:
    """Step of the first repeat: those before it warm the moments up.

    They are left out with moments `auto` also where a checkpoint has moments, so that every
    checkpoint of a series is measured on the same tokens.
    """
    return 0 if spec.optimizer.moments == "checkpoint" else spec.optimizer.warmup_steps
