"""A training run in the middle of a step, spread over ranks: what a measurement needs of it.

One file per kind of run (`attach_fsdp2`, `attach_deepspeed`) finds the tensors; how a direction is
made of them (`probe.directions.sharded`) and moved along (`probe.parallel.live_ray`) is the same
for all. Nothing here is a copy of the model.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class LiveShard:
    """What this rank holds of one parameter; some shards are empty on some ranks."""

    name: str  # fully qualified parameter name
    shape: "torch.Size"  # of the whole parameter
    live: "Tensor"  # what the forward pass reads, or gathers from; a view, any shape
    master: "Tensor"  # what the optimizer steps from, same shape; live itself where there is one
    cut: "Callable[[Tensor], Tensor]"  # this shard's part of a tensor of the whole parameter


@dataclass(frozen=True, slots=True, eq=False)
class ShardStep:
    """What the optimizer's next step would do to one shard."""

    shard: LiveShard
    grad: "Tensor | None"  # as backward left it; None: the step leaves this parameter alone
    direction: "Callable[[Tensor], Tensor]"  # gradient -> what is subtracted, over the lr


class LiveRun(Protocol):
    """A sharded model in training. Every rank calls the same methods in the same order."""

    module: "nn.Module"  # what loss_fn runs; its buffers, modes and gradients are kept
    group: "torch.distributed.ProcessGroup | None"  # all ranks that train it together
    num_copies: int  # of each shard over the group's ranks
    devices: "set[torch.device]"  # whose random states a forward pass may use
    clip_grad_norm: float | None  # what the step itself clips to; None: nothing
    loss_scale: float  # what the step itself divides gradients by

    push_waits: bool  # whether `push` waits for the other ranks

    def shards(self) -> Sequence[LiveShard]:
        """One for every parameter that can be moved, the same names on every rank."""

    def steps(self, optimizer: Any) -> Sequence[ShardStep]:
        """What the next optimizer step would do; None for an engine that has its own.

        Raises:
            ConfigError: Another optimizer than the run's.
            DirectionError: There is no gradient, or the optimizer is not known.
        """

    def push(self) -> None:
        """Make the next forward pass see what was written into the live shards."""

    def meeting_modules(self) -> "Sequence[nn.Module]":
        """Modules before whose forward the ranks wait for each other."""

    def kept(self) -> "AbstractContextManager[LiveKeeper]":
        """A block after which the framework's own bookkeeping is as before it."""


@dataclass(slots=True)
class LiveKeeper:
    """Told how a measurement went, so that clean-up never waits for ranks that are elsewhere."""

    apart: bool = False  # ranks are no longer at the same place: no collectives
    cut_short: bool = False  # a forward pass may have ended in the middle
