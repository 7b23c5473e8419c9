"""One float for all ranks: losses reduced by their counts before anything branches on them.

Every rank must call the same methods in the same order. In a process without
`torch.distributed` they cost nothing. Values are gathered and summed in rank order, so all
ranks hold the same bits whatever the back-end's reduction tree is.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from probe.errors import ConfigError, DirectionError, ParallelismError

LossValue: TypeAlias = float | Tensor | tuple[float | Tensor, float | Tensor]
T = TypeVar("T")

_MEAN, _PAIR, _FAILED = 0.0, 1.0, 2.0


class Agreement:
    """Collective arithmetic over the ranks that hold a replica of the model.

    Args:
        group: Process group; None: all ranks, or this process alone where
            `torch.distributed` is not initialised.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        ready = dist.is_available() and dist.is_initialized()
        self._group = group
        self.num_ranks = dist.get_world_size(group) if ready else 1

    def mean_loss(self, loss_fn: Callable[[], LossValue]) -> float:
        """The mean loss over all ranks, weighted by counts where loss_fn returns them.

        Raises:
            ConfigError: What loss_fn returned is neither a number nor a (sum, count) pair.
            ParallelismError: loss_fn failed on another rank, or ranks returned different forms.
        """
        kind, total, count = self._attempt(lambda: _sum_and_count(loss_fn()))
        rows = self._gather([kind, total, count])
        kinds = {row[0] for row in rows}
        if len(kinds) > 1:
            raise ParallelismError(
                "loss_fn returned a mean on some ranks and (sum, count) on others. "
                "Return one form on every rank."
            )
        return _divide(_sum(row[1] for row in rows), _sum(row[2] for row in rows))

    def together(self, function: Callable[[], T]) -> T:
        """Call `function` on every rank; if it fails on one, all raise instead of waiting."""
        result = self._attempt(function)
        self._gather([_MEAN, 0.0, 0.0])
        return result

    def same_direction(self, norm: float, slope: float | None) -> float | None:
        """Rank 0's slope, after a check that all ranks are about to move alike.

        Raises:
            DirectionError: Norms or slopes differ between ranks by more than 1e-4 of themselves:
                replicas that took the same steps differ by rounding at most, gradients that were
                never reduced by far more.
        """
        rows = self._gather([_MEAN, norm, math.nan if slope is None else slope])
        first = rows[0]
        for rank, row in enumerate(rows):
            if not all(_alike(a, b) for a, b in zip(first[1:], row[1:], strict=True)):
                raise DirectionError(
                    f"ranks 0 and {rank} would move differently: |delta| {first[1]:.6g} and "
                    f"{row[1]:.6g}, slope {first[2]:.6g} and {row[2]:.6g}. Reduce the gradients "
                    "over the ranks first (DistributedDataParallel does), or give every rank the "
                    "same direction and slope."
                )
        return None if math.isnan(first[2]) else first[2]

    def _attempt(self, function: Callable[[], T]) -> T:
        """Call it; on failure tell the other ranks before raising."""
        try:
            return function()
        except Exception:
            if self.num_ranks > 1:
                self._exchange([_FAILED, 0.0, 0.0])
            raise

    def _gather(self, row: list[float]) -> list[list[float]]:
        """Every rank's row, in rank order; raises where a rank reported a failure."""
        if self.num_ranks == 1:
            return [row]
        rows = self._exchange(row)
        failed = [rank for rank, other in enumerate(rows) if other[0] == _FAILED]
        if failed:
            raise ParallelismError(f"the measurement failed on rank {failed}; see its own error.")
        return rows

    def _exchange(self, row: list[float]) -> list[list[float]]:
        # NCCL moves device memory only; every back-end with gloo takes the CPU.
        on_cuda = dist.get_backend(self._group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else "cpu"
        mine = torch.tensor(row, dtype=torch.float64, device=device)
        rows = [torch.empty_like(mine) for _ in range(self.num_ranks)]
        dist.all_gather(rows, mine, group=self._group)
        return [other.tolist() for other in rows]


def _sum_and_count(value: LossValue) -> tuple[float, float, float]:
    """(form, sum, count) of what loss_fn returned; a mean counts once."""
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise ConfigError(
                f"loss_fn returned {len(value)} values; return the mean loss, or (sum, count)."
            )
        total, count = _number(value[0]), _number(value[1])
        if not count >= 0 or math.isinf(count):
            raise ConfigError(f"loss_fn returned (sum, count) with count {count}; it must be >= 0.")
        return _PAIR, total, count
    return _MEAN, _number(value), 1.0


def _number(value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ConfigError(
            f"loss_fn returned a tensor of shape {tuple(value.shape)}; return the mean loss as a "
            "float or 0-d tensor, or (sum, count)."
        )
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"loss_fn returned {type(value).__name__}; return the mean loss as a float or 0-d "
            "tensor, or (sum, count)."
        ) from error


def _alike(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4) or (math.isnan(a) and math.isnan(b))


def _sum(values: Any) -> float:
    """Sum in rank order; NaN and inf pass through."""
    total = 0.0
    for value in values:
        total += value
    return total


def _divide(total: float, count: float) -> float:
    if count == 0:
        raise ConfigError("loss_fn returned counts that sum to 0: the batch has no target tokens.")
    return total / count
