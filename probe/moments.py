"""AdamW's two moments as they stand before the step that is being measured.

Either as a checkpoint saved them, or accumulated over batches with the parameters fixed
(learning rate 0), as the critical-sharpness paper does for OLMo-2. Which one is recorded.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from probe.checkpoints.betas import SaysBetas
from probe.checkpoints.published import SaysWhereFrom
from probe.checkpoints.source import Source
from probe.errors import CheckpointError, ConfigError
from probe.parallel import Shard
from probe.parallel.collectives import gather_floats
from probe.parallel.resident import num_ranks
from probe.result import MomentsSource
from probe.spec import AdamW


class Moments(Protocol):
    """Moments before the step, shard by shard."""

    source: MomentsSource

    def before(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """(exp_avg, exp_avg_sq) of shard `index`, flat; None: no step was taken yet."""

    def step_after(self, index: int) -> int:
        """The optimizer's step count once the measured step is taken, >= 1."""

    def absorb(self, index: int, grad: Tensor) -> None:
        """Let a (clipped) gradient of shard `index` enter the moments, where they move on."""

    @property
    def detail(self) -> str:
        """One sentence for the result: where the moments came from."""


class CheckpointMoments:
    """Moments as saved: every repeat starts from them, so repeats are independent draws.

    A state saved after t steps gives the direction of step t + 1. Read shard by shard when
    asked for, so that no two whole copies stand in memory.

    Raises:
        CheckpointError: The checkpoint has no optimizer state, or lacks a parameter's.
    """

    source: MomentsSource = "checkpoint"

    def __init__(self, checkpoint: Source, shards: Sequence[Shard], *, label: str) -> None:
        if not checkpoint.has_moments:
            raise _none_there(checkpoint, shards[0].name, label)
        origin = checkpoint.moments_origin if isinstance(checkpoint, SaysWhereFrom) else None
        self._origin = origin or "the checkpoint"
        self._checkpoint = checkpoint
        self._shards = shards
        self._steps = [int(checkpoint.hyper(shard.name)["step"]) for shard in shards]

    def before(self, index: int) -> tuple[Tensor, Tensor]:
        """Both moments of one shard, on its device, in its base's dtype."""
        return self._read(index, "exp_avg"), self._read(index, "exp_avg_sq")

    def _read(self, index: int, kind: Literal["exp_avg", "exp_avg_sq"]) -> Tensor:
        shard = self._shards[index]
        stored = self._checkpoint.read(shard.name, kind, shard.lo, shard.hi)
        if stored.shape != shard.base.shape:
            raise CheckpointError(
                f"{kind} of {shard.name!r} has {stored.numel()} elements, its weight has "
                f"{shard.base.numel()}. The optimizer state belongs to another model."
            )
        return stored.to(shard.live.device, shard.base.dtype)

    def step_after(self, index: int) -> int:
        """Saved step count + 1."""
        return self._steps[index] + 1

    def absorb(self, index: int, grad: Tensor) -> None:
        """Nothing: saved moments stay as they are."""

    @property
    def detail(self) -> str:
        """Names the optimizer step the state was saved at."""
        steps = sorted(set(self._steps))
        shown = str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
        return f"Read from {self._origin}, saved at optimizer step {shown}."


class WarmupMoments:
    """Moments accumulated at learning rate 0; they go on accumulating over the repeats.

    Memory: two buffers, 8 bytes per parameter (16 in fp64), kept while a checkpoint is measured.
    """

    source: MomentsSource = "warmup"

    def __init__(self, shards: Sequence[Shard], betas: tuple[float, float], *, why: str) -> None:
        self._betas = betas
        self.why = why  # a phrase
        self._exp_avg: list[Tensor | None] = [None] * len(shards)
        self._exp_avg_sq: list[Tensor | None] = [None] * len(shards)
        self._steps = [0] * len(shards)
        self.num_warmup_batches = 0

    def before(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """The running averages so far, not corrected for bias. Do not write them."""
        return self._exp_avg[index], self._exp_avg_sq[index]

    def step_after(self, index: int) -> int:
        """Gradients seen so far + 1."""
        return self._steps[index] + 1

    @torch.no_grad()
    def absorb(self, index: int, grad: Tensor) -> None:
        """In place: m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2."""
        beta1, beta2 = self._betas
        exp_avg, exp_avg_sq = self._exp_avg[index], self._exp_avg_sq[index]
        if exp_avg is None or exp_avg_sq is None:
            exp_avg, exp_avg_sq = torch.zeros_like(grad), torch.zeros_like(grad)
            self._exp_avg[index], self._exp_avg_sq[index] = exp_avg, exp_avg_sq
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        self._steps[index] += 1

    @property
    def detail(self) -> str:
        """Says over how many batches, and why."""
        return (
            f"Accumulated over {self.num_warmup_batches} batches with the parameters fixed, and "
            f"over the repeats before each one ({self.why})."
        )


class NoMoments:
    """For directions that keep none."""

    source: MomentsSource = "none"
    detail = "The direction keeps no moments."

    def before(self, index: int) -> tuple[None, None]:
        """None."""
        return None, None

    def step_after(self, index: int) -> int:
        """Every step is like the first."""
        return 1

    def absorb(self, index: int, grad: Tensor) -> None:
        """Nothing."""


def choose_moments(
    optimizer: AdamW, checkpoint: Source, shards: Sequence[Shard], *, label: str
) -> CheckpointMoments | WarmupMoments:
    """What `optimizer.moments` asks for: checkpoint, warmup, or auto (checkpoint where present).

    Raises:
        CheckpointError: `checkpoint` is asked for and the checkpoint has no optimizer state.
        ConfigError: Its moments were made with other betas than the job's.
    """
    wanted = optimizer.moments
    if wanted == "warmup":
        return WarmupMoments(shards, optimizer.betas, why="asked for")
    here = checkpoint.has_moments
    if _on_every_rank(here, shards[0].base.device):
        _refuse_other_betas(optimizer, checkpoint, label)
        return CheckpointMoments(checkpoint, shards, label=label)
    if wanted == "checkpoint":
        raise _none_there(checkpoint, shards[0].name, label)
    failure = _failure(checkpoint)
    why = "another rank has no optimizer state" if here else "the checkpoint has no optimizer state"
    why += "" if failure is None else f"; {failure}"
    return WarmupMoments(shards, optimizer.betas, why=why)


def _refuse_other_betas(optimizer: AdamW, checkpoint: Source, label: str) -> None:
    stored = checkpoint.stored_betas if isinstance(checkpoint, SaysBetas) else None
    if stored is not None and stored != tuple(optimizer.betas):
        raise ConfigError(
            f"the moments of checkpoint {label} were made with betas {list(stored)}, "
            f"optimizer.betas is {list(optimizer.betas)}: together they are no step of the run. "
            f"Set optimizer.betas: {list(stored)}, or optimizer.moments: warmup."
        )


def _failure(checkpoint: Source) -> CheckpointError | None:
    return checkpoint.moments_failure if isinstance(checkpoint, SaysWhereFrom) else None


def _on_every_rank(found: bool, device: torch.device) -> bool:
    """A download can fail on one rank alone; then every rank accumulates moments instead."""
    if num_ranks() == 1:
        return found
    return all(row[0] for row in gather_floats([float(found)], device))


def _none_there(checkpoint: Source, name: str, label: str) -> CheckpointError:
    """The error for `moments: checkpoint`; one that trying again can help stays one."""
    failure = _failure(checkpoint)
    kind = CheckpointError if failure is None else type(failure)
    why = "" if failure is None else f" ({failure})"
    return kind(
        f"adamw direction needs exp_avg_sq for {name!r}; checkpoint {label} has none{why}. "
        "Use optimizer.moments: warmup, or a checkpoint saved with optimizer state."
    )
