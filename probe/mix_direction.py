"""AdamW's direction at any shares of the sources, from the gradients of each source alone.

Two kinds, with one interface: moments accumulated at learning rate 0, kept as the forms of
`probe.directions.mixture`; and moments a checkpoint saved, to which one gradient is added.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from probe.directions import adamw_direction
from probe.directions.mixture import MixtureMoments
from probe.errors import DirectionError
from probe.moments import CheckpointMoments
from probe.parallel import ShardedModel
from probe.result import MomentsSource
from probe.spec import AdamW
from probe.update import weight_decay_of

Gradients = Sequence[Tensor | None]  # flat, aligned with the model's shards


class MixtureRule(Protocol):
    """Takes a gradient of every source, gives the direction at any shares."""

    source: MomentsSource

    def warm_up(self, by_source: Sequence[Gradients]) -> None:
        """One step at learning rate 0 before the first repeat."""

    def begin_repeat(self, by_source: Sequence[Gradients]) -> None:
        """The gradients of the step that is measured, one list per source."""

    def end_repeat(self) -> None:
        """Let go of what only this repeat needs, before the next one's gradients are made."""

    def direction(self, shares: Sequence[float]) -> list[Tensor]:
        """Delta of the step at these shares, aligned with the model's shards.

        Raises:
            DirectionError: It is not finite; on every rank alike.
        """

    @property
    def detail(self) -> str:
        """One sentence for the result: where the moments came from."""


class WarmupMixtures:
    """Moments accumulated with the parameters fixed; repeats go on accumulating.

    Args:
        model: Its shards.
        optimizer: AdamW of the spec, without clipping.
        num_sources: S.
        buffers: Dtype the moments are kept in.

    Memory: S (S + 3) / 2 buffers, see `MixtureMoments`; and one direction.
    """

    source: MomentsSource = "warmup"

    def __init__(
        self, model: ShardedModel, optimizer: AdamW, num_sources: int, *, buffers: torch.dtype
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._moments = MixtureMoments(
            num_sources, len(model.shards), optimizer.betas, storage=buffers
        )
        self._num_warmup_steps = 0

    def warm_up(self, by_source: Sequence[Gradients]) -> None:
        """Let one gradient of every source enter the moments."""
        self.begin_repeat(by_source)
        self._num_warmup_steps += 1

    def begin_repeat(self, by_source: Sequence[Gradients]) -> None:
        """As `warm_up`: the measured step's gradients stay in the moments."""
        for index in range(len(self._model.shards)):
            self._moments.absorb(index, [grads[index] for grads in by_source])

    def end_repeat(self) -> None:
        """Nothing: its gradients are in the moments and nowhere else."""

    def direction(self, shares: Sequence[float]) -> list[Tensor]:
        """Delta at these shares. Cost: one pass over the moments."""
        delta = []
        for index, shard in enumerate(self._model.shards):
            step = self._moments.direction(
                index,
                shard.base_on_device(),
                shares,
                eps=self._optimizer.eps,
                weight_decay=weight_decay_of(shard.name, self._optimizer),
            )
            delta.append(
                torch.zeros_like(shard.live, dtype=shard.base.dtype) if step is None else step
            )
        return _finite(self._model, delta, shares)

    @property
    def detail(self) -> str:
        """Says over how many steps, and in what dtype."""
        kept = str(self._moments.storage).removeprefix("torch.")
        return (
            f"Accumulated over {self._num_warmup_steps} steps of every source with the parameters "
            f"fixed, and over the repeats before each one; kept in {kept}, shared by all ratios."
        )


class CheckpointMixtures:
    """Moments as saved: every repeat starts from them.

    Args:
        model: Its shards.
        optimizer: AdamW of the spec, without clipping.
        moments: The checkpoint's.

    Memory: the sources' gradients are held while a repeat is measured; one direction.
    """

    source: MomentsSource = "checkpoint"

    def __init__(self, model: ShardedModel, optimizer: AdamW, moments: CheckpointMoments) -> None:
        self._model, self._optimizer, self._moments = model, optimizer, moments
        self._by_source: Sequence[Gradients] = []

    def warm_up(self, by_source: Sequence[Gradients]) -> None:
        """Nothing: saved moments need no warm-up."""

    def begin_repeat(self, by_source: Sequence[Gradients]) -> None:
        """Hold the gradients until the repeat ends."""
        self._by_source = by_source

    def end_repeat(self) -> None:
        """Let go of the gradients."""
        self._by_source = []

    def direction(self, shares: Sequence[float]) -> list[Tensor]:
        """Delta at these shares. Cost: reads the saved moments, one shard after the other."""
        delta = []
        for index, shard in enumerate(self._model.shards):
            grad = _mixed([grads[index] for grads in self._by_source], shares)
            if grad is None:
                delta.append(torch.zeros_like(shard.live, dtype=shard.base.dtype))
                continue
            exp_avg, exp_avg_sq = self._moments.before(index)
            delta.append(
                adamw_direction(
                    shard.base_on_device(),
                    grad,
                    exp_avg,
                    exp_avg_sq,
                    step_after=self._moments.step_after(index),
                    betas=self._optimizer.betas,
                    eps=self._optimizer.eps,
                    weight_decay=weight_decay_of(shard.name, self._optimizer),
                )
            )
        return _finite(self._model, delta, shares)

    @property
    def detail(self) -> str:
        """As the moments say."""
        return self._moments.detail


def _mixed(grads: Sequence[Tensor | None], shares: Sequence[float]) -> Tensor | None:
    total: Tensor | None = None
    for grad, share in zip(grads, shares, strict=True):
        if grad is not None:
            total = grad * share if total is None else total.add_(grad, alpha=share)
    return total


def _finite(model: ShardedModel, delta: list[Tensor], shares: Sequence[float]) -> list[Tensor]:
    bad = _names_of_broken(model, delta)
    if model.sum_over_ranks([float(len(bad))])[0]:
        named = repr(bad[0]) if bad else "another rank's shard"
        shown = ", ".join(f"{share:g}" for share in shares)
        raise DirectionError(
            f"the update direction of {named} at shares {shown} is not finite: a gradient, a "
            "moment or a weight holds NaN or inf. Use model.dtype: float32 or bfloat16 if it is "
            "float16, optimizer.moments: warmup if saved moments are broken."
        )
    return delta


def _names_of_broken(model: ShardedModel, delta: list[Tensor]) -> list[str]:
    """Shards with NaN or inf: the extremes show both, ten times as fast as `isfinite`."""
    named = [(s.name, d) for s, d in zip(model.shards, delta, strict=True) if d.numel()]
    if not named:
        return []
    extremes = torch.stack([torch.stack(torch.aminmax(d)) for _, d in named])  # (shards, 2)
    finite = extremes.isfinite().all(1).tolist()  # one wait for the device, not one per shard
    return [name for (name, _), good in zip(named, finite, strict=True) if not good]
