"""The update direction of one gradient: clip, moments, optimizer formula, decay per parameter."""

import fnmatch
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from probe.directions import adamw_direction, sgd_direction
from probe.directions.blocks import inner_product
from probe.errors import ConfigError, DirectionError
from probe.moments import Moments
from probe.parallel import Shard, ShardedModel
from probe.spec import AdamW, Sgd


def weight_decay_of(name: str, optimizer: AdamW | Sgd) -> float:
    """Decay of a parameter: 0 where a `no_decay` pattern matches its name."""
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in optimizer.no_decay):
        return 0.0
    return optimizer.weight_decay


def check_no_decay(names: Sequence[str], optimizer: AdamW | Sgd) -> None:
    """Refuse a `no_decay` pattern that frees nothing from decay: the model's names are others.

    Raises:
        ConfigError: A pattern matches no parameter.
    """
    if optimizer.weight_decay == 0.0:
        return
    for pattern in optimizer.no_decay:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[:3])
            raise ConfigError(
                f"optimizer.no_decay has {pattern!r}, which matches none of this model's "
                f"{len(names)} parameters ({shown}, ...), so decay would be on all of them. Name "
                "those the run did not decay, or set no_decay: [] if there were none."
            )


def clip_scale(model: ShardedModel, grads: Sequence[Tensor | None], limit: float | None) -> float:
    """What the gradient is multiplied with so that its global norm is at most `limit`.

    As `torch.nn.utils.clip_grad_norm_`: limit / (norm + 1e-6), never above 1.

    Raises:
        DirectionError: The gradient holds NaN or inf.
    """
    squares = [0.0 if grad is None else inner_product(grad, grad) for grad in grads]
    total = model.sum_over_ranks([sum(squares)])[0]
    if not total < float("inf"):
        bad = next(
            (s.name for s, q in zip(model.shards, squares, strict=True) if not q < float("inf")),
            "another rank's shard",
        )
        raise DirectionError(
            f"the gradient of {bad!r} is not finite at the checkpoint's own parameters. "
            "Use model.dtype: bfloat16 or float32, or leave this checkpoint out."
        )
    norm = total**0.5
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))


class UpdateRule:
    """Turns gradients into update directions, the way the run's optimizer would.

    Args:
        model: The shards gradients and directions are aligned with.
        optimizer: AdamW or SGD of the spec; decay per parameter, clip first.
        moments: As they stand before the step.
    """

    def __init__(self, model: ShardedModel, optimizer: AdamW | Sgd, moments: Moments) -> None:
        self._model = model
        self._optimizer = optimizer
        self._moments = moments

    def absorb(self, grads: list[Tensor | None]) -> None:
        """Warm-up at learning rate 0: let a gradient enter the moments, nothing else."""
        for index, grad in self._clipped(grads):
            self._moments.absorb(index, grad)

    def direction(self, grads: list[Tensor | None]) -> tuple[list[Tensor], float]:
        """The update direction delta of a gradient, and the slope -delta.g along it.

        Args:
            grads: Flat gradients, not clipped; taken apart on the way, so that no more than
                one of gradient and direction stands in memory per shard.

        Returns:
            delta, flat, aligned with the shards (zeros where there is no gradient, as the
            optimizer would leave the parameter alone); and dL/d eta at 0 = -delta.g with the
            gradient as it was before clipping.

        Raises:
            DirectionError: The gradient or the direction is not finite.
        """
        scale = clip_scale(self._model, grads, self._optimizer.clip_grad_norm)
        descent = 0.0
        bad = "another rank's shard"
        delta: list[Tensor] = []
        for index, shard in enumerate(self._model.shards):
            grad, grads[index] = grads[index], None
            if grad is None:
                delta.append(torch.zeros_like(shard.base, device=shard.live.device))
                continue
            clipped = grad if scale == 1.0 else grad * scale
            step = self._shard_direction(index, shard, clipped)
            product = inner_product(step, grad)
            bad = bad if math.isfinite(product) else shard.name
            descent += product
            self._moments.absorb(index, clipped)
            delta.append(step)
        slope = -self._model.sum_over_ranks([descent])[0]
        if not math.isfinite(slope):
            raise DirectionError(
                f"the update direction of {bad!r} is not finite, though its gradient is: its "
                "moments or weights hold NaN or inf, or a second moment is negative. Use "
                "optimizer.moments: warmup if the saved moments are broken, or leave this "
                "checkpoint out."
            )
        return delta, slope

    def _clipped(self, grads: list[Tensor | None]) -> Iterator[tuple[int, Tensor]]:
        scale = clip_scale(self._model, grads, self._optimizer.clip_grad_norm)
        for index, grad in enumerate(grads):
            if grad is not None:
                yield index, grad if scale == 1.0 else grad * scale

    def _shard_direction(self, index: int, shard: Shard, grad: Tensor) -> Tensor:
        decay = weight_decay_of(shard.name, self._optimizer)
        base = shard.base_on_device()
        if isinstance(self._optimizer, Sgd):
            return sgd_direction(base, grad, weight_decay=decay)
        exp_avg, exp_avg_sq = self._moments.before(index)
        return adamw_direction(
            base,
            grad,
            exp_avg,
            exp_avg_sq,
            step_after=self._moments.step_after(index),
            betas=self._optimizer.betas,
            eps=self._optimizer.eps,
            weight_decay=decay,
        )


def slope_along(
    model: ShardedModel, delta: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> float:
    """dL/d eta at 0 along theta - eta delta, for a loss whose gradient is given: -delta.g."""
    pairs = zip(delta, grads, strict=True)
    total = sum(inner_product(step, grad) for step, grad in pairs if grad is not None)
    return -model.sum_over_ranks([total])[0]
