"""Training in place of measuring: stock AdamW on a model's own shards, and its base put back.

Weights that AdamW writes are fp32 whatever the forward dtype is: the live shards themselves where
those are fp32, else a copy beside them that is cast after each step. Gradients come in fp32,
summed over micro-batches. Dropout is off, as in every measurement here.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from probe.batches import Batch
from probe.batches.choices import MixTrainBatches
from probe.errors import DirectionError
from probe.moments import CheckpointMoments
from probe.parallel import Shard, ShardedModel
from probe.progress import Meter
from probe.spec import AdamW
from probe.update import clip_scale, weight_decay_of
from probe.workbench import Opened


class ShardAdamW:
    """`torch.optim.AdamW` over the shards of a model.

    Args:
        model: Its live shards are what is trained.
        optimizer: Betas, eps, decay per parameter, clipping.
        moments: What the moments and step counts begin as; None: at zero.

    Memory: 8 bytes per parameter for the moments; 4 more where the forward dtype is not fp32.
    """

    def __init__(
        self, model: ShardedModel, optimizer: AdamW, moments: CheckpointMoments | None
    ) -> None:
        self._model, self._clip = model, optimizer.clip_grad_norm
        self._weights = [nn.Parameter(_master(shard)) for shard in model.shards]
        groups = [
            {"params": [weight], "weight_decay": weight_decay_of(shard.name, optimizer)}
            for shard, weight in zip(model.shards, self._weights, strict=True)
        ]
        self._optimizer = torch.optim.AdamW(
            groups,
            lr=0.0,
            betas=optimizer.betas,
            eps=optimizer.eps,
            # One kernel without temporaries; on a CPU the plain loop, which has none either.
            fused=True if model.device.type == "cuda" else None,
        )
        if moments is not None:
            self._begin_at(moments)

    def _begin_at(self, moments: CheckpointMoments) -> None:
        for index, weight in enumerate(self._weights):
            exp_avg, exp_avg_sq = moments.before(index)
            step = torch.tensor(float(moments.step_after(index) - 1))
            self._optimizer.state[weight] = {
                "step": step.to(weight.device),  # where the fused kernel looks for it
                "exp_avg": exp_avg.clone(),
                "exp_avg_sq": exp_avg_sq.clone(),
            }

    def step(self, grads: Sequence[Tensor | None], learning_rate: float) -> None:
        """One AdamW step; the model's next forward pass sees it.

        Args:
            grads: Flat fp32 gradients of the mean loss, aligned with the shards; None: left alone.
            learning_rate: Of this step; at 0 only the moments move.

        Raises:
            DirectionError: Clipping is asked for and the gradient is not finite.
        """
        scale = 1.0 if self._clip is None else clip_scale(self._model, grads, self._clip)
        for weight, grad in zip(self._weights, grads, strict=True):
            weight.grad = grad if grad is None or scale == 1.0 else grad.mul_(scale)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for shard, weight in zip(self._model.shards, self._weights, strict=True):
                if weight.data_ptr() != shard.live.data_ptr():
                    shard.live.copy_(weight)
        self._model.push()


def _master(shard: Shard) -> Tensor:
    """What AdamW writes: the live shard where it is as wide as its base, else a copy."""
    if shard.live.dtype == shard.base.dtype:
        return shard.live.detach()
    return shard.base_on_device().clone()


@contextmanager
def put_back(model: ShardedModel) -> Iterator[None]:
    """Afterwards every live shard is its base again, bit for bit, also after an exception."""
    try:
        yield
    finally:
        with torch.no_grad():
            for shard in model.shards:
                shard.live.copy_(shard.base)
        model.push()


@dataclass
class TrainRun:
    """How one run went."""

    losses: list[float | None] = field(default_factory=list)  # before each step; None: not finite
    num_steps: int = 0
    diverged: bool = False


def train_steps(
    opened: Opened[MixTrainBatches],
    optimizer: ShardAdamW,
    batches: Iterator[Batch],
    learning_rates: Sequence[float],
    meter: Meter,
) -> TrainRun:
    """Train until the learning rates are used up or a loss is not finite.

    A loss that is NaN or infinite ends the run and is an outcome; so is a gradient that cannot be
    clipped because it is not finite.

    Args:
        opened: The model, at its base.
        optimizer: Of this run.
        batches: One per step; drawn as they are needed.
        learning_rates: One per step.
        meter: Counts and reports.

    Cost: a backward pass per step.
    """
    run = TrainRun()
    for rate in learning_rates:
        meter.report("train", run.num_steps, len(learning_rates))
        loss, grads = opened.loss_and_gradient(next(batches), meter)
        run.losses.append(loss if math.isfinite(loss) else None)
        run.diverged = run.losses[-1] is None or not _stepped(optimizer, grads, rate)
        del grads  # before the next gradient is made
        if run.diverged:
            break
        run.num_steps += 1
    meter.report("train", run.num_steps, run.num_steps)
    return run


def _stepped(optimizer: ShardAdamW, grads: Sequence[Tensor | None], rate: float) -> bool:
    try:
        optimizer.step(grads, rate)
    except DirectionError:  # a gradient that is not finite, met while clipping; on all ranks alike
        return False
    return True
