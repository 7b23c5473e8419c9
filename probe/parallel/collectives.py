"""Exchange of a few numbers between ranks, the same bits on every rank.

Ranks branch only on what comes out of here. Nothing large goes through it: weights and gradients
are the back-end's business.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from probe.errors import ParallelismError


def require_process_group() -> int:
    """The number of ranks.

    Raises:
        ParallelismError: `torch.distributed` was not initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ParallelismError(
            "a sharded back-end needs torch.distributed, which is not initialised. Start the "
            "ranks with torchrun and call torch.distributed.init_process_group first."
        )
    return dist.get_world_size()


def gather_floats(values: Sequence[float], device: torch.device) -> list[list[float]]:
    """What every rank gave, by rank, in fp64.

    Args:
        values: As many on every rank.
        device: Where the back-end communicates.

    Cost: one all-gather of 8 bytes per value and rank.
    """
    mine = torch.tensor(list(values), dtype=torch.float64, device=device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return [each.tolist() for each in found]


def sum_floats(values: Sequence[float], device: torch.device) -> list[float]:
    """Elementwise sums over the ranks, each rounded once, so that no order shows.

    NaN and inf come out as NaN or inf, not as an exception.
    """
    columns = zip(*gather_floats(values, device), strict=True)
    return [math.fsum(c) if all(map(math.isfinite, c)) else sum(c) for c in columns]


def raise_together(error: BaseException | None, device: torch.device, what: str) -> None:
    """Let a failure of one rank be a failure of all, before anyone waits in a collective.

    Args:
        error: This rank's own; None where it did well.
        device: Where the back-end communicates.
        what: The thing that failed, for the other ranks' message.

    Raises:
        BaseException: This rank's own error.
        ParallelismError: Another rank failed.
    """
    failed = [row[0] for row in gather_floats([float(error is not None)], device)]
    if error is not None:
        raise error
    if any(failed):
        ranks = ", ".join(str(rank) for rank, flag in enumerate(failed) if flag)
        raise ParallelismError(f"{what} failed on rank {ranks}; its own error says why.")
