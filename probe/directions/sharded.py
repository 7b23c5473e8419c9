"""The update direction of a sharded run: each rank makes its own part, from its own shards.

The formulas work element by element, so they are the same as for whole tensors. Only sums (the
gradient's norm for clipping, |delta|, the slope) need the other ranks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probe.agreement import Agreement
from probe.directions.blocks import inner_product
from probe.directions.mapping import named_tensors
from probe.directions.optimizer import dense_gradient
from probe.errors import DirectionError
from probe.parallel.live import LiveRun, LiveShard, ShardStep
from probe.perturb import compute_dtype


@dataclass(frozen=True, eq=False)
class ShardedDirection:
    """This rank's part of delta, and what all parts have in common."""

    shards: Sequence[LiveShard]
    delta: Sequence[Tensor]  # each like its shard's master; fp32 for half-precision ones
    slope: float | None  # dL/d eta at 0 over all ranks
    norm: float  # |delta| over all ranks


def sharded_optimizer_direction(
    run: LiveRun, optimizer: Any, agreement: Agreement
) -> ShardedDirection:
    """What the run's next optimizer step would subtract, divided by the first group's lr.

    The gradient is taken as the step would take it: divided by the loss scale and clipped, where
    the framework does that inside its step. The slope is that of the loss before clipping.

    Raises:
        DirectionError: No gradient, one that is not finite, an optimizer that is not known, or
            a direction that is zero everywhere.

    Cost: memory one fp32 tensor per shard, and two exchanges of a few bytes.
    """
    steps = agreement.together(lambda: run.steps(optimizer))
    squares = sum(inner_product(s.grad, s.grad) for s in steps if s.grad is not None)
    total = agreement.sums([squares])[0] / run.num_copies
    scale = _gradient_scale(run, math.sqrt(total) if total >= 0 else math.nan)

    def own_part() -> tuple[list[LiveShard], list[Tensor], float]:
        return _own_part(steps, scale)

    shards, delta, descent = agreement.together(own_part)
    return _agreed(run, agreement, shards, delta, descent / run.loss_scale)


def sharded_mapping_direction(
    run: LiveRun, model: nn.Module, direction: Mapping[str, Tensor], agreement: Agreement
) -> ShardedDirection:
    """The caller's tensors, each rank taking its own part of them.

    Args:
        run: The training run.
        model: Names are those of its `named_parameters`.
        direction: fqn -> delta of the WHOLE parameter, any float dtype and device; with FSDP2
            also a DTensor placed as the parameter is.
        agreement: Of all ranks of the run.

    Raises:
        DirectionError: Names missing or unknown, another shape or placement, not finite, zero.
    """

    def own_part() -> tuple[list[LiveShard], list[Tensor]]:
        shards = {shard.name: shard for shard in run.shards()}
        given = named_tensors(model, direction, {n: s.shape for n, s in shards.items()})
        delta = [_like(shards[name], whole) for name, whole in given.items()]
        return [shards[name] for name in given], delta

    shards, delta = agreement.together(own_part)
    return _agreed(run, agreement, shards, delta, None)


def _gradient_scale(run: LiveRun, norm: float) -> float:
    """What the step multiplies its gradients with: 1 / loss scale, and clipping.

    As DeepSpeed clips: limit / (norm + 1e-6), never above 1, of the unscaled gradient.
    """
    if not math.isfinite(norm):
        raise DirectionError(
            "the gradient holds NaN or infinite values on some rank, so the next step would be "
            "skipped or would break the run. Measure after a backward pass that did not overflow."
        )
    unscaled = norm / run.loss_scale
    clip = 1.0 if run.clip_grad_norm is None else run.clip_grad_norm / (unscaled + 1e-6)
    return min(1.0, clip) / run.loss_scale


def _own_part(
    steps: Sequence[ShardStep], scale: float
) -> tuple[list[LiveShard], list[Tensor], float]:
    """Shards that move, delta of each, and delta.g with the gradient as backward left it."""
    shards: list[LiveShard] = []
    deltas: list[Tensor] = []
    descent = 0.0
    for step in steps:
        if step.grad is None:
            continue
        grad = dense_gradient(step.shard.name, step.grad)
        wide = grad.to(compute_dtype(step.shard.master.dtype))
        delta = step.direction(wide if scale == 1.0 else wide * scale)
        descent += inner_product(delta, grad)
        shards.append(step.shard)
        deltas.append(delta)
    if not shards:
        raise DirectionError(
            "no parameter of the optimizer has a gradient. Call this after backward and before "
            "the optimizer's step and zero_grad."
        )
    return shards, deltas, descent


def _agreed(
    run: LiveRun,
    agreement: Agreement,
    shards: Sequence[LiveShard],
    delta: Sequence[Tensor],
    descent: float | None,
) -> ShardedDirection:
    """The direction with its sums over all ranks, after a check that it is one."""
    squares = agreement.together(lambda: _squares(shards, delta))
    totals = agreement.sums([squares, 0.0 if descent is None else descent])
    norm = math.sqrt(totals[0] / run.num_copies)
    if norm == 0.0:
        raise DirectionError(
            f"the update direction is zero in all {len(delta)} parameters that could move, so "
            "there is no ray to measure. Measure after a backward pass with a gradient that is "
            "not zero, or give another direction."
        )
    slope = None if descent is None else -totals[1] / run.num_copies
    return ShardedDirection(shards, delta, slope, norm)


def _squares(shards: Sequence[LiveShard], delta: Sequence[Tensor]) -> float:
    total = 0.0
    for shard, step in zip(shards, delta, strict=True):
        square = inner_product(step, step)
        if not math.isfinite(square):
            raise DirectionError(
                f"the update direction of {shard.name!r} has {int((~torch.isfinite(step)).sum())} "
                "elements that are NaN or infinite on this rank. Look at its gradient and "
                "optimizer state: an overflowed backward, or eps = 0 with a zero second moment, "
                "does this."
            )
        total += square
    return total


def _like(shard: LiveShard, whole: Tensor) -> Tensor:
    part = shard.cut(whole.detach())
    return part.to(shard.master.device, compute_dtype(shard.master.dtype))
