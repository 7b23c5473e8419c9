"""One float for all ranks: losses reduced by their counts before anything branches on them.

Every rank must call the same methods in the same order. In a process without
`torch.distributed` they cost nothing. Values are gathered and summed in rank order, so all
ranks hold the same bits whatever the back-end's reduction tree is.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from probe.errors import ConfigError, DirectionError, ParallelismError

LossValue: TypeAlias = float | Tensor | tuple[float | Tensor, float | Tensor]
T = TypeVar("T")

_MEAN, _PAIR, _FAILED, _MEETING = 0.0, 1.0, 2.0, 3.0
# Groups that move CPU memory, one beside each group that does not.
_CPU_GROUPS: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


class Agreement:
    """Collective arithmetic over the ranks that hold a replica of the model.

    Args:
        group: Process group; None: all ranks, or this process alone where
            `torch.distributed` is not initialised.

    Attributes:
        apart: This rank no longer knows where the others are: it was interrupted, or a
            collective failed. Another collective could wait for ever.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        ready = dist.is_available() and dist.is_initialized()
        self._group = group
        self.num_ranks = dist.get_world_size(group) if ready else 1
        self.apart = False
        self._over: str | None = None  # why nothing more will be exchanged

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

    def sums(self, values: Sequence[float]) -> list[float]:
        """Elementwise sums over the ranks, each rounded once, the same on every rank.

        Args:
            values: Two at most.
        """
        rows = self._gather([_MEAN, *values, *[0.0] * (2 - len(values))])
        columns = list(zip(*rows, strict=True))[1 : 1 + len(values)]
        return [math.fsum(c) if all(map(math.isfinite, c)) else sum(c) for c in columns]

    @contextmanager
    def meeting_before(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """A block in which the ranks meet before each of these modules' forward.

        For modules whose forward waits for the other ranks (gathers of sharded weights): a rank
        whose loss function failed, or took another way, says so at the next meeting, where all
        raise. Without it they would wait for that rank until a time-out.

        Cost: one exchange of 24 bytes per module and forward, on the CPU.
        """
        handles = []
        if self.num_ranks > 1:
            self._group = _cpu_group(self._group)
            for index, module in enumerate(modules):
                hook = self._meeting(float(index))
                handles.append(module.register_forward_pre_hook(hook, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _meeting(self, index: float) -> Callable[..., None]:
        def meet(module: nn.Module, _: Any) -> None:
            if self._over:  # loss_fn caught the error and went on
                raise ParallelismError(self._over)
            rows = self._gather([_MEETING, index, 0.0])
            if len({row[1] for row in rows}) > 1:
                self._end("the ranks run different modules at the same time; see loss_fn.")

        return meet

    def _attempt(self, function: Callable[[], T]) -> T:
        """Call it; on failure tell the other ranks before raising."""
        try:
            result = function()
        except Exception:
            if self.num_ranks > 1 and not self._over:
                self._over = "the measurement failed on this rank."
                self._exchange([_FAILED, 0.0, 0.0])
            raise
        except BaseException:
            self.apart = True
            raise
        if self._over:
            raise ParallelismError(self._over)
        return result

    def _gather(self, row: list[float]) -> list[list[float]]:
        """Every rank's row, in rank order; raises where a rank reported a failure."""
        if self.num_ranks == 1:
            return [row]
        rows = self._exchange(row)
        failed = [rank for rank, other in enumerate(rows) if other[0] == _FAILED]
        if failed:
            self._end(f"the measurement failed on rank {failed}; see its own error.")
        inside = [rank for rank, other in enumerate(rows) if other[0] == _MEETING]
        if inside and len(inside) < self.num_ranks:
            self._end(
                f"ranks {inside} are inside a forward pass that the others have left or have not "
                "begun. On sharded models loss_fn must run the same forward passes on every rank: "
                "give a rank with fewer batches one without targets."
            )
        return rows

    def _end(self, reason: str) -> None:
        self._over = reason
        raise ParallelismError(reason)

    def _exchange(self, row: list[float]) -> list[list[float]]:
        # NCCL moves device memory only; every back-end with gloo takes the CPU.
        on_cuda = dist.get_backend(self._group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else "cpu"
        mine = torch.tensor(row, dtype=torch.float64, device=device)
        rows = [torch.empty_like(mine) for _ in range(self.num_ranks)]
        try:
            dist.all_gather(rows, mine, group=self._group)
        except BaseException:
            self.apart = True
            raise
        return [other.tolist() for other in rows]


def _cpu_group(group: "dist.ProcessGroup | None") -> "dist.ProcessGroup | None":
    """The group itself where it moves CPU memory; else a gloo group of its ranks, made once.

    A meeting through a GPU would make the host wait for it before every module.
    """
    group = dist.group.WORLD if group is None else group
    if "cpu:" in dist.get_backend_config(group):
        return group
    if group not in _CPU_GROUPS:
        ranks = dist.get_process_group_ranks(group)
        _CPU_GROUPS[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    twin: dist.ProcessGroup = _CPU_GROUPS[group]
    return twin


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
